"""The conductor: what a user holds, and what runs in its block.

From the ground up: ``options`` (a checked record), ``memory`` (routers) and ``stats`` know nothing
of the others, nor do ``hits`` (hit rates), ``mixture`` (from scores to votes) and ``summary``;
``rater`` asks experts and routers of a layer, and makes a ``rating``; ``forward`` says what a
forward goes by; ``commit`` makes pairs leave, and ``recording`` notes which; ``adoption`` gets a
layer ready to grow; ``growth`` (with ``held``), ``prefill`` and ``streaming`` are what a forward
may call for, and ``planning`` chooses among them;
``session`` is a block with its hooks, ``press`` hands them out, ``chunks`` feeds a prompt in
pieces.

May import everything but ``moekv.contexts``, ``moekv.integrations`` and ``moekv.cli``.
"""

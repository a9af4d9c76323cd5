"""The conductor: what a user holds, and what runs in its block.

From the ground up: ``options`` (a checked record), ``memory`` (routers), ``reports`` (what
statistics look like), ``stats``, ``summary`` and ``held`` (a layer that has grown, as experts see
it); ``hits`` (hit rates), ``later`` (those of queries to come) and ``mixture`` (from scores to
votes); ``rater`` asks experts and routers of a layer, and makes a ``rating``; ``forward`` says what
a forward goes by; ``commit`` makes pairs leave, ``recording`` notes which, ``adoption`` gets a
layer ready to grow; ``prefill``, ``streaming``, ``growth`` and ``looking`` are what a forward may
call for, and ``planning`` chooses among them; ``session`` is a block with its hooks, ``press``
hands them out, ``chunks`` feeds a prompt in pieces.

May import everything but ``moekv.contexts``, ``moekv.integrations`` and ``moekv.cli``.
"""

"""The press: compresses the caches of a model inside a ``with`` block.

From the ground up: ``checks`` (of single values), ``routing`` (options on experts and routers) and
``options`` (all of them, checked and frozen), ``memory`` (routers), ``reports`` (types of the
statistics), ``stats``, ``summary`` and ``held`` (a layer that has grown, as a view for experts);
``hits`` (hit rates), ``later`` (hit rates of later queries) and ``mixture`` (from scores to votes);
``rater`` runs the experts and routers of a layer and makes a ``rating``; ``forward`` has the plan
and the state of a forward; ``commit`` evicts pairs, ``recording`` notes which, ``adoption``
prepares a layer to grow; ``prefill``, ``streaming``, ``growth`` and ``measuring`` are strategies of
a forward, ``planning`` chooses among them, and ``refusals`` raises before one runs; ``session`` is
a block with its hooks, ``press`` opens it, ``chunks`` feeds a prompt in pieces.

May import everything but ``moekv.contexts``, ``moekv.integrations`` and ``moekv.cli``.
"""

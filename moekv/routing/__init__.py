"""Which expert a token trusts: routers, their losses, and one scale for what they mix.

``base`` is what all routers derive from; ``topk_balanced``, ``adaptive``, ``pikv``, ``eplb`` and
``hierarchical`` are one router each; ``registry`` names them; ``losses`` keep experts alive in
training; ``evidence`` is what untrained routers choose by; ``mixing`` makes one order of what
experts say.

May import ``moekv.ops``.
"""

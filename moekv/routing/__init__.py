"""Which expert a token trusts: routers, their losses, and one scale for what they mix.

``base`` is what all routers derive from; ``balance``, ``adaptive``, ``pikv``, ``eplb``,
``hierarchical`` and ``shared`` are one router each; ``registry`` names them; ``losses`` keep
experts alive in training; ``mixing`` brings scores to one scale.

May import ``moekv.ops``.
"""

"""What a pair is worth: experts, each of which rates the pairs of a layer.

``base`` is what all experts derive from, ``view`` what they see of a layer, and ``builder`` makes
views. ``position`` (the experts aggressive, moderate, conservative), ``selective``, ``semantic``,
``temporal``, ``expected`` and ``learned`` are one expert each, ``scorer`` makes one of any kvpress
scorer; ``kinds`` is what experts ask of a view; ``registry`` names them.

May import ``moekv.routing``, ``moekv.budget``, ``moekv.models`` and ``moekv.ops``.
"""

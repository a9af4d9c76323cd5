"""Experts, each of which scores the pairs of a layer.

``base`` is what all experts derive from, ``view`` the layer that they score, and ``builder`` makes
views. ``position`` (the experts aggressive, moderate, conservative), ``selective``, ``semantic``,
``temporal``, ``expected`` and ``learned`` are one expert each, ``scorer`` makes one of any kvpress
scorer; ``kinds`` is the base of experts with a native score; ``registry`` names them.

May import ``moekv.routing``, ``moekv.budget``, ``moekv.models`` and ``moekv.ops``.
"""

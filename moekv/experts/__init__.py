"""Experts, each of which scores the pairs of a layer.

``base`` is what all experts derive from, ``view`` the layer that they score, and ``builder`` makes
views. ``aggressive``, ``moderate``, ``conservative``, ``selective``, ``semantic``, ``temporal``,
``expected`` and ``learned`` are one expert each, ``scorer`` makes one of any kvpress scorer;
``position`` is the base of the first three, ``kinds`` that of experts with a native score;
``registry`` names them.

May import ``moekv.routing``, ``moekv.budget``, ``moekv.models`` and ``moekv.ops``.
"""

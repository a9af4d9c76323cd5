"""Routes tokens to experts: routers, their losses, and the order that mixes experts' scores.

``base`` is what all routers derive from; ``topk_balanced``, ``adaptive``, ``pikv``, ``eplb`` and
``hierarchical`` are one router each; ``registry`` names them; ``losses`` balance experts in
training; ``evidence`` has the logits of untrained routers; ``mixing`` makes one order of the
pairs from the scores of several experts.

May import ``moekv.ops``.
"""

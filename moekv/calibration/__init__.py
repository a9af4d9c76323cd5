"""Calibration: fits routers to a model.

``config`` and ``needs`` (memory and disk), then in the order of the work ``oracle`` (the attention
of a second reading), ``ridge`` (the expert ``learned``), ``gates``, ``calibrate`` (all of it);
``router`` is the result, ``model_card`` its description.

May import ``moekv.cache``, ``moekv.experts``, ``moekv.files``, ``moekv.units`` and what these may.
"""

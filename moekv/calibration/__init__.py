"""What can be learned: routers that are fitted to a model.

``config`` and ``needs`` (memory and disk), then in the order of the work ``oracle`` (what a second
reading looks at), ``ridge`` (the expert learned), ``gates``, ``calibrate`` (all of it); ``router``
is what comes of it, ``model_card`` what it says of itself.

May import ``moekv.cache``, ``moekv.experts``, ``moekv.files`` and what these may.
"""

"""The command line: ``main`` reads arguments, ``common`` is what commands share.

``info``, ``demo``, ``ask``, ``serve``, ``bench`` and ``calibrate`` are a command each.

May import everything; nothing imports it but ``moekv.__main__``.
"""

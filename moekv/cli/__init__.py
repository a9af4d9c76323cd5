"""The command line: ``main`` reads arguments, ``options`` and ``common`` are what commands share.

``info``, ``demo``, ``ask``, ``serve``, ``bench`` and ``calibrate`` are a command each; ``trial`` is
what the demo measures, ``tables`` what it shows.

May import everything; nothing imports it but ``moekv.__main__``.
"""

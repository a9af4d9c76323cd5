"""moekv inside kvpress: its wrappers take moekv's press, and its presses moekv's storage.

``press``   ``MoERouterPress`` as a ``kvpress.ScorerPress``
``ragged``  head-wise presses of kvpress with the memory freed
``wrappers`` what kvpress's wrappers need of a press

May import everything but ``moekv.contexts`` and ``moekv.cli``. Nothing else may import kvpress,
which is optional; ``moekv`` itself checks whether it is installed.
"""

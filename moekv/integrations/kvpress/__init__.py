"""moekv inside kvpress: its wrappers take moekv's press, and its presses moekv's storage.

``press``   ``MoERouterPress`` as a ``kvpress.ScorerPress``
``prompts`` what folding needs of a prompt that one of its presses compresses
``ragged``  head-wise presses of kvpress with the memory freed, any with quantised pairs
``wrappers`` what kvpress's wrappers need of a press

May import everything but ``moekv.contexts`` and ``moekv.cli``. Nothing else may import kvpress,
which is optional; ``moekv`` itself checks whether it is installed.
"""

"""moekv in kvpress: its presses as ours, ours among its.

``press``   ``MoERouterPress`` as a ``kvpress.ScorerPress``
``ragged``  head-wise presses of kvpress with the memory freed
``wrappers`` what kvpress's wrappers need of a press

May import everything but ``moekv.contexts`` and ``moekv.cli``. The only rooms that may import
kvpress, which need not be installed for anything else; ``moekv`` itself looks whether it is there.
"""

"""What is stored, and how it is attended to.

``layer`` is what compressed layers have in common; ``growing`` (dense), ``ragged`` and ``static``
are the kinds of them; ``pairs`` and ``attention`` hand them to a model; ``caches`` says which ones
can be served, and compresses layers; ``recent`` and ``notes`` are what is remembered beside
the pairs; ``buffers`` grow; ``storage`` saves and loads.

May import ``moekv.budget``, ``moekv.models`` and ``moekv.ops``.
"""

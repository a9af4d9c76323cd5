"""What is stored, and how it is attended to.

``layer`` is what compressed layers have in common; ``growing`` (dense), ``ragged`` and ``static``
are the kinds of them. ``rows`` is how a ragged one stores pairs, ``tail`` how it holds the tokens
since; ``pairs`` and ``attention`` hand them to a model; ``caches`` says which ones can be served,
and compresses layers; ``recent`` and ``notes`` are what is remembered beside the pairs; ``buffers``
grow; ``masks`` keep the meaning of a mask or refuse it; ``storage`` saves and loads, ``parts`` says
what a layer consists of, and ``described`` checks what a file says.

May import ``moekv.routing``, ``moekv.budget``, ``moekv.models``, ``moekv.ops``, ``moekv.files``.
"""

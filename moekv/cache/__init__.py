"""Compressed cache layers: how pairs are stored, attended to, evicted and saved.

``layer`` is the base class of compressed layers; ``growing`` (dense), ``ragged`` and ``static`` are
its kinds. ``rows`` are the stored pairs of a ragged layer, ``tail`` those of later tokens;
``pairs`` and ``attention`` hand both to a model, ``many`` attends of many tokens at once.
``caches`` checks whether a cache can be served, and evicts pairs from it; ``folding`` joins evicted
pairs to stored ones. ``recent`` and ``notes`` hold what is remembered beside the pairs,
``positions`` which positions these stand for, ``buffers`` memory that grows. ``masks`` interprets
attention masks or refuses them, ``graphs`` does so in models that are compiled. ``storage`` saves
and loads, ``parts`` takes a layer apart for that, and ``described`` validates the description in a
file.

May import ``moekv.routing``, ``moekv.budget``, ``moekv.models``, ``moekv.ops``, ``moekv.files``.
"""

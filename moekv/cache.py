"""Which caches can be served, and how pairs leave them."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


def check_cache(cache: Any) -> None:
    """Raise unless pairs can be evicted from a cache.

    Parameters
    ----------
    cache : transformers.Cache

    Raises
    ------
    TypeError
        The cache is not a plain, growing one on the device of its layers (``DynamicCache``).
    """
    if not isinstance(cache, Cache):
        _refuse(type(cache).__name__)
    if getattr(cache, "offloading", False):
        _refuse(f"an offloaded {type(cache).__name__}")
    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    kinds.add(getattr(cache, "layer_class_to_replicate", None) or DynamicLayer)
    for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        _refuse(f"{type(cache).__name__} with layers of type {kind.__name__}")


def _refuse(what: str) -> None:
    raise TypeError(
        f"expected a transformers.DynamicCache, got {what}; "
        "pass past_key_values=DynamicCache(), or none and no cache_implementation"
    )


def gather_pairs(pairs: Tensor, indices: Tensor) -> Tensor:
    """Copy the kept pairs into memory of their own size.

    Parameters
    ----------
    pairs : Tensor [B, H, T, D]
    indices : Tensor [B, H, n], int32
        Positions in each head.

    Returns
    -------
    Tensor [B, H, n, D]
        Contiguous.
    """
    batch, num_heads, num_keys, dim = pairs.shape
    # Whole rows of a flat view: several times faster on a CPU than torch.gather.
    begin = torch.arange(batch * num_heads, device=pairs.device) * num_keys
    rows = indices + begin.view(batch, num_heads, 1)
    kept = pairs.reshape(-1, dim).index_select(0, rows.flatten())
    return kept.view(batch, num_heads, -1, dim)


def cached_pairs(layer: CacheLayerMixin) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, D] of an initialised cache layer."""
    keys, values = layer.keys, layer.values
    assert keys is not None and values is not None
    return keys, values


def evict(layer: CacheLayerMixin, indices: Tensor) -> tuple[int, int]:
    """Leave only the kept pairs in a cache layer, and give the memory of the others back.

    Parameters
    ----------
    layer : DynamicLayer
    indices : Tensor [B, H, n], int32
        Ascending positions.

    Returns
    -------
    before, after : int
        Bytes of the storages of keys and values. Memory is free once nobody else holds the
        layer's old tensors; these stay as they were.
    """
    before = storage_bytes(*cached_pairs(layer))
    layer.keys = gather_pairs(cached_pairs(layer)[0], indices)
    layer.values = gather_pairs(cached_pairs(layer)[1], indices)
    return before, storage_bytes(layer.keys, layer.values)


def storage_bytes(*tensors: Tensor) -> int:
    """Bytes of the storages under tensors, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

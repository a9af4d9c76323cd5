"""Which caches can be served, and how pairs leave them."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from moekv.budget import Kept
from moekv.cache.buffers import size_of, storage_bytes
from moekv.cache.folding import Folding
from moekv.cache.growing import GrowingLayer
from moekv.cache.layer import CompressedLayer
from moekv.cache.ragged import RaggedLayer
from moekv.cache.static import CompactStaticLayer
from moekv.models.hooks import CACHE_NAMES, sliding_layer


def check_cache(
    cache: Any,
    *,
    indices: Collection[int] | None = None,
    grown: bool = False,
    static: str | None = None,
    offloaded: str | None = None,
) -> None:
    """Raise unless pairs can be evicted from a cache.

    Parameters
    ----------
    cache : transformers.Cache
    indices : collection of int, optional
        Of the layers that are to be compressed, by default all; others may be of any kind.
    grown : bool
        Whether its layers may have been compressed before.
    static : str, optional
        What a static cache cannot serve; None where it can.
    offloaded : str, optional
        What an offloaded dynamic cache cannot serve; None where it can.

    Raises
    ------
    TypeError
        The cache is not a plain one on the device of its layers (``DynamicCache``, or
        ``StaticCache`` where that will do).
    """
    if type(cache).__name__ == "PagedAttentionCache":
        _refuse(
            "the pages of transformers' continuous batching, which rows share",
            "generate(...) takes batches of prompts with padding at the left, and `moekv serve` "
            "requests as they come, in vLLM",
        )
    if type(cache).__module__.startswith("transformers.models."):
        _refuse(
            f"{type(cache).__name__}, the model's own in transformers {transformers.__version__}",
            "a later one, in which the model fills a DynamicCache, is served (docs/models.md)",
        )
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        _refuse(type(cache).__name__)
    if cache.offloading and (is_static(cache) or offloaded is not None):
        _refuse(
            f"an offloaded {type(cache).__name__}, whose layers come and go"
            + ("" if offloaded is None else f", for {offloaded}"),
            "fill and compress a plain one, and give its layers to an offloaded DynamicCache",
        )
    layers = [x for i, x in enumerate(cache.layers) if indices is None or i in indices]
    kinds = {type(layer) for layer in layers}
    kinds.add(cache.layer_class_to_replicate or DynamicLayer)
    served = {DynamicLayer, DynamicSlidingWindowLayer}
    if is_static(cache):
        if static is not None:
            raise TypeError(
                f"expected a transformers.DynamicCache for {static}, got a static cache, whose "
                "layers keep one length: every head must keep as many pairs, once, after a "
                "prefill in one forward without padding"
            )
        kinds.discard(DynamicLayer)
        served = {StaticLayer, StaticSlidingWindowLayer, CompactStaticLayer}
    for kind in kinds - served:
        if grown and issubclass(kind, CompressedLayer):
            continue
        _refuse(f"{type(cache).__name__} with layers of type {kind.__name__}")


def is_static(cache: Any) -> bool:
    """Return whether a cache has static layers."""
    return isinstance(cache, Cache) and any(isinstance(x, StaticLayer) for x in cache.layers)


@contextmanager
def present(cache: Cache, index: int) -> Iterator[None]:
    """Have a layer of an offloaded cache on the device that computes, while a block runs.

    Then it is away again, unless it was there before: transformers has fetched the layer that comes
    next, and fetches it no second time.

    Parameters
    ----------
    cache : Cache
        Of one that is not offloaded all layers are present.
    index : int
        Of the layer; the block may replace it.
    """
    if not cache.offloading:
        yield
        return
    layer: Any = cache.layers[index]
    home = layer.begin.device if isinstance(layer, RaggedLayer) else layer.device
    was_away = layer.keys.device != home
    if home.type == "cuda":  # it may be on its way
        torch.cuda.current_stream(home).wait_stream(cache.prefetch_stream)
    layer.prefetch()
    yield
    if was_away:
        layer = cache.layers[index]
        layer.offload()


def num_rows(cache: Cache) -> int:
    """Count the rows of a cache that is not empty."""
    # Layers with states instead of pairs count no tokens.
    counted = (x for x in cache.layers if hasattr(x, "get_seq_length"))
    layer: Any = next(x for x in counted if x.get_seq_length())
    return int(layer.batch_size if isinstance(layer, CompressedLayer) else len(layer.keys))


def repeat_rows(cache: Cache, times: int) -> None:
    """Repeat each row of a cache, so that it can be continued as often.

    Layers of states have no method for that, and reorder their rows instead.

    Raises
    ------
    TypeError
        A layer can do neither; nothing has changed.
    """
    for layer in cache.layers:
        if not hasattr(layer, "batch_repeat_interleave") and not hasattr(layer, "reorder_cache"):
            raise TypeError(
                f"expected a cache whose rows can be repeated, to continue each {times} times, got "
                f"a {type(layer).__name__}, which transformers {transformers.__version__} does not "
                f"repeat; begin with a prompt of {times} rows (num_return_sequences makes them)"
            )
    rows = torch.arange(num_rows(cache), device="cpu").repeat_interleave(times)
    layers: list[Any] = cache.layers
    for each in layers:
        if hasattr(each, "batch_repeat_interleave"):
            each.batch_repeat_interleave(times)
        else:
            each.reorder_cache(rows)


def is_compressed(layer: CacheLayerMixin) -> bool:
    """Return whether a press has compressed a layer, or prepared it for that."""
    if isinstance(layer, CompressedLayer):
        return layer.context_length > 0
    return isinstance(layer, CompactStaticLayer)


_PLAIN = f"pass {CACHE_NAMES[0]}=DynamicCache(), or none and no cache_implementation"


def _refuse(what: str, instead: str = _PLAIN) -> None:
    raise TypeError(f"expected a transformers.DynamicCache or StaticCache, got {what}; {instead}")


def cached_pairs(layer: CacheLayerMixin) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, D] of an initialised cache layer; of a static one, all slots.

    In one dtype, the wider: autocast may leave rotated keys wider than values.
    """
    if isinstance(layer, GrowingLayer):
        return layer.pairs()
    keys, values = layer.keys, layer.values
    assert keys is not None and values is not None
    wide = torch.promote_types(keys.dtype, values.dtype)
    return keys.to(wide), values.to(wide)


def held_bytes(layer: CacheLayerMixin) -> int:
    """Bytes of the storages that hold the pairs of an initialised cache layer, as they are."""
    if isinstance(layer, CompressedLayer):
        return layer.nbytes
    keys, values = layer.keys, layer.values
    assert keys is not None and values is not None
    return storage_bytes(keys, values)


def bytes_by_kind(layers: Iterable[CacheLayerMixin]) -> dict[str, int]:
    """Bytes of the storages of initialised layers: of pairs, scales, biases, tails and notes."""
    kinds = dict.fromkeys(("pairs", "scales", "biases", "tail", "notes"), 0)
    for layer in layers:
        kinds["pairs"] += held_bytes(layer)
        if not isinstance(layer, CompressedLayer):
            continue
        if layer.notes is not None:
            kinds["notes"] += layer.notes.nbytes
        for kind, count in layer.bytes_beside().items():
            kinds[kind] += count
            kinds["pairs"] -= count
    return kinds


def bits_per_number(layers: Iterable[CacheLayerMixin]) -> float | None:
    """Bits that a number of a stored key or value takes, scales counted; None: there is none."""
    num_bytes = numbers = 0
    for layer in layers:
        size = (
            layer.stored_size()
            if isinstance(layer, CompressedLayer)
            else size_of(cached_pairs(layer))
        )
        num_bytes, numbers = num_bytes + size[0], numbers + size[1]
    return 8 * num_bytes / numbers if numbers else None


def compressed(
    keys: Tensor,
    values: Tensor,
    kept: Kept,
    *,
    pairs: str = "16",
    folding: Folding | None = None,
    checked: bool = False,
    backend: str = "auto",
) -> GrowingLayer | RaggedLayer:
    """Copy the chosen pairs of a dense layer, to a dense one if each head keeps as many.

    Quantised or folded pairs are stored in a ragged layer in any case.

    Parameters
    ----------
    keys, values : Tensor
        [B, H, T, D] and [B, H, T, Dv].
    kept : Kept
        What stays of each head.
    pairs : str
        How it is stored: one of ``moekv.ops.PAIRS``.
    folding : Folding, optional
        Has the other pairs join these. None: they are lost.
    checked : bool
        Whether all pairs are known to be storable in such a format; if not, the layer waits for the
        device to see.
    backend : str
        Which implementation of ``ragged_attention`` serves the layer.

    Returns
    -------
    GrowingLayer or RaggedLayer
    """
    if kept.per_head is None or pairs != "16" or folding is not None:
        how: dict[str, Any] = {"pairs": pairs, "folding": folding, "checked": checked}
        return RaggedLayer.compress(keys, values, kept, **how, backend=backend)
    return GrowingLayer.compress(keys, values, kept, backend=backend)


def evict(
    cache: Cache,
    index: int,
    kept: Kept,
    *,
    pairs: str = "16",
    folding: Folding | None = None,
    checked: bool = False,
    backend: str,
) -> tuple[int, int]:
    """Leave only the kept pairs in a layer of a cache, and give the memory of the others back.

    Parameters
    ----------
    cache : Cache
        Its layer is replaced, see :func:`compressed`.
    index : int
        Of the layer.
    kept : Kept
    pairs, folding, checked, backend
        As of :func:`compressed`.

    Returns
    -------
    before, after : int
        Bytes of the storages of keys and values. Memory is free once nobody else holds the
        layer's old tensors; these stay as they were.
    """
    before = cache.layers[index]
    how: dict[str, Any] = {"pairs": pairs, "folding": folding, "checked": checked}
    layer = cache.layers[index] = compressed(*cached_pairs(before), kept, **how, backend=backend)
    return held_bytes(before), layer.nbytes


def growing(cache: Cache, index: int, *, backend: str) -> CompressedLayer:
    """Replace a plain layer, which is present, by one that appends and records recent states."""
    layer = cache.layers[index]
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):  # whose window never fills
        layer = cache.layers[index] = GrowingLayer(*cached_pairs(layer), backend=backend)
    assert isinstance(layer, CompressedLayer)
    return layer


def recompress(
    cache: Cache,
    index: int,
    kept: Kept,
    *,
    pairs: str = "16",
    alone: Sequence[int] | None = None,
    checked: bool = False,
    backend: str,
) -> CompressedLayer:
    """Leave only the kept pairs in a layer that has grown.

    Where all heads keep as many, and did so before, they move to the front of the memory that they
    have; else what stays is copied, and the memory of the others given back.

    Parameters
    ----------
    cache : Cache
    index : int
        Of the layer.
    kept : Kept
    pairs : str
        How they are stored, if they are not quantised already.
    alone : sequence of int, optional
        Rows of the batch whose new pairs are stored where that rounds them. None: all.
    checked : bool
        Whether all are known to be storable: see ``CompressedLayer.all_storable``.
    backend : str

    Returns
    -------
    CompressedLayer
        The cache's layer now.
    """
    layer = cache.layers[index]
    assert isinstance(layer, CompressedLayer)
    if not layer.is_ragged and (kept.per_head is None or pairs != "16"):
        how: dict[str, Any] = {"pairs": pairs, "checked": checked, "backend": backend}
        layer = cache.layers[index] = _to_ragged(layer, kept, how)
    elif isinstance(layer, RaggedLayer) and (pairs, layer.pairs) != ("16", "16"):
        layer.recompress(kept, pairs, alone, checked=checked)
    else:
        layer.recompress(kept, pairs)
    return layer


def _to_ragged(layer: CompressedLayer, kept: Kept, how: dict[str, Any]) -> RaggedLayer:
    keys, values = cached_pairs(layer)
    evicted = layer.get_seq_length() - keys.shape[2]
    ragged = RaggedLayer.compress(keys, values, kept, **how)
    ragged.context_length += evicted
    if evicted:  # places were no positions
        ragged.first, ragged.positions = layer.first, None
    ragged.recent, ragged.counted = layer.recent, layer.counted
    notes = layer.whole_notes()
    if notes is not None and not notes.is_ragged:
        ragged.notes = _to_ragged(notes, kept, {"backend": how["backend"]})
        ragged.reader = layer.reader
    return ragged


def agree_on_padding(layers: Sequence[CacheLayerMixin]) -> None:
    """Have layers say alike before which positions none of them stores anything.

    transformers makes one mask for all layers, and it is checked for the one that it is made for.

    Parameters
    ----------
    layers : sequence
        Of a cache; compressed ones are given the least of their positions, as one tensor.
    """
    held = [x for x in layers if isinstance(x, CompressedLayer) and x.context_length]
    firsts = [layer.first for layer in held]
    if not firsts or all(first is firsts[0] for first in firsts):
        return
    known = [first for first in firsts if first is not None]
    least = None
    if len(known) == len(held):
        least = torch.stack([first.to(known[0].device) for first in known]).amin(0)
    for layer in held:
        layer.first = least


def empty_cache(cache: Cache) -> None:
    """Make a cache as it was before its prefill, layers with sliding windows included.

    Parameters
    ----------
    cache : Cache
        One that :func:`check_cache` has passed.
    """
    if is_static(cache):
        cache.reset()  # type: ignore[no-untyped-call]
        return
    for index, layer in enumerate(cache.layers):
        cache.layers[index] = (
            sliding_layer(layer.sliding_window)
            if isinstance(layer, DynamicSlidingWindowLayer)
            else DynamicLayer()  # type: ignore[no-untyped-call]
        )

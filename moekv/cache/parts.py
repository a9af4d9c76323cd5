"""Conversion of cache layers to tensors and numbers that a file can hold, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from moekv import ops
from moekv.cache.caches import cached_pairs
from moekv.cache.growing import GrowingLayer
from moekv.cache.layer import CompressedLayer
from moekv.cache.positions import unpack
from moekv.cache.ragged import RaggedLayer
from moekv.cache.recent import RecentStates
from moekv.cache.rows import Rows
from moekv.cache.static import CompactStaticLayer
from moekv.models.hooks import sliding_layer

_DENSE = {"keys": "BHND", "values": "BHNV"}
_TAIL = {"begin": "BH", "end": "BH", "tail_keys": "BHND", "tail_values": "BHNV"}
_RAGGED = {"stored_keys": "SD", "stored_values": "SV"} | _TAIL
_QUANTISED = {"key_codes": "SK", "value_codes": "SW", "scales": "SG"} | _TAIL
_BIASED: dict[str, dict[str, str]] = {"": {}, ", biased": {"bias": "S"}}
WAITS = "waits"
"""Tokens of a tail that wait, and how many of them each row lacks, where any do."""
OPTIONAL = {"positions": "BHP"}
"""What layers with tables may have, or not: P bytes of bits."""
TABLES = ("begin", "end")
"""Tensors that say which of the stored pairs are a head's."""
DTYPES = {
    **{"begin": "I32", "end": "I32", "key_codes": "U8", "value_codes": "U8"},
    **{"scales": "F16", "bias": "F16", "positions": "U8"},
}
"""Dtypes, as safetensors calls them, of all but pairs, hidden states and queries."""


@dataclass(frozen=True)
class Kind:
    """A kind of layer in a file.

    Attributes
    ----------
    layer : type
        Layers of exactly this class.
    tensors : mapping
        Names and shapes: B rows, H heads, N pairs or slots of each head, S stored pairs of all, D
        and V the sizes of a key and a value, K and W of their codes, G of scales.
    numbers : tuple of str
        What else it takes, a format of pairs among it.
    length : callable
        The true length, by the numbers and the sizes.
    take : callable
        The tensors, of a layer.
    make : callable
        The layer, of tensors and a description.
    """

    layer: type
    tensors: Mapping[str, str]
    numbers: tuple[str, ...]
    length: Callable[[Mapping[str, Any], Mapping[str, int]], int]
    take: Callable[[Any], dict[str, Tensor]]
    make: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Any]


def take_apart(layer: Any, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take tensors and a description out of a layer.

    Parameters
    ----------
    layer : CacheLayerMixin
    index : int
        Of the layer, for messages.

    Returns
    -------
    tensors : dict
    description : dict
        What JSON can hold.

    Raises
    ------
    TypeError
        The layer is of a kind that files do not support.
    ValueError
        It is empty.
    """
    name = next((name for name, kind in KINDS.items() if type(layer) is kind.layer), None)
    if isinstance(layer, RaggedLayer):
        name = "ragged" if layer.rows.scales is None else "quantised"
        name += ", biased" if layer.rows.bias is not None else ""
    if name is None:
        names = ", ".join(dict.fromkeys(kind.layer.__name__ for kind in KINDS.values()))
        raise TypeError(
            f"expected layers of classes that files know ({names}), layer {index} is a "
            f"{type(layer).__name__}"
        )
    if not layer.is_initialized:
        raise ValueError(f"expected a cache that a model has filled, layer {index} is empty")
    kind = KINDS[name]
    parts = kind.take(layer)
    description: dict[str, Any] = {"kind": name}
    description |= {key: NUMBERS[key](layer) for key in kind.numbers}
    if isinstance(layer, RaggedLayer) and (waiting := layer.tail.waiting):
        description[WAITS] = {"tokens": waiting, "stored": layer.tail.skipped}
    if isinstance(layer, CompressedLayer):
        parts |= _beside(layer, index, description)
    return parts, description


def _seen(layer: Any) -> int:
    """Count the tokens that a layer with a window has got; newer transformers count some twice."""
    counted = getattr(layer, "cumulative_length_int", None)
    return int(getattr(layer, "cumulative_length", 0) if counted is None else counted)


def _evicted(layer: Any) -> int:
    return int(getattr(layer, "evicted", 0))


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "evicted": _evicted,
    "context_length": lambda layer: layer.context_length,
    "seen": _seen,
    "slots": lambda layer: layer.max_cache_len,
    "window": lambda layer: layer.sliding_window,
    "pairs": lambda layer: layer.rows.pairs,
}
"""What a description takes from a layer, by its name."""


def _pairs_of(layer: Any) -> dict[str, Tensor]:
    return dict(zip(_DENSE, cached_pairs(layer), strict=True))


def _filled_slots(layer: StaticLayer) -> dict[str, Tensor]:
    filled = int(layer.get_seq_length()) - _evicted(layer)
    return {part: pairs[:, :, :filled] for part, pairs in _pairs_of(layer).items()}


def _stored(layer: RaggedLayer) -> dict[str, Tensor]:
    rows = layer.rows
    if rows.scales is None:
        parts = {"stored_keys": rows.keys, "stored_values": rows.values}
    else:
        parts = {"key_codes": rows.keys, "value_codes": rows.values, "scales": rows.scales}
    if rows.bias is not None:
        parts["bias"] = rows.bias
    parts |= {part: getattr(layer, part) for part in _TAIL}
    if layer.positions is not None:
        parts["positions"] = layer.positions
    # A file may not hold one memory under two names.
    return parts | {part: parts[part].clone() for part in TABLES}


def _beside(layer: CompressedLayer, index: int, description: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of what a compressed layer has beside its pairs; the rest goes to the description."""
    layer.check_halves()
    description |= {
        "context_length": layer.context_length,
        "run": layer.run,
        "most": layer.most,
        "first": None if layer.first is None else layer.first.tolist(),
        "counted": list(layer.counted),
        "backend": layer.backend,
    }
    parts: dict[str, Tensor] = {}
    if layer.recent is not None and layer.recent.count:
        parts["recent"] = layer.recent.states(layer.recent.count)
        parts["asked"] = layer.recent.queries(layer.recent.count).transpose(1, 2)
        recent = layer.recent
        description["recent"] = {
            "size": recent.size,
            "end": recent.end,
            "counts": recent.counts(),
        }
    notes = layer.notes  # of fewer tokens where the last were fed outside of blocks: for a crop
    if notes is not None and notes.get_seq_length() <= layer.get_seq_length():
        noted, description["notes"] = take_apart(notes, index)
        description["reader"] = layer.reader
        parts |= {f"notes.{name}": part for name, part in noted.items()}
    return parts


def put_together(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> Any:
    """Make a layer of what :func:`take_apart` gave, if ``described.check`` has passed it.

    Raises
    ------
    ValueError
        A table points beyond the pairs.
    """
    layer = KINDS[description["kind"]].make(parts, description)
    if isinstance(layer, CompressedLayer):
        layer.context_length, layer.run = description["context_length"], description["run"]
        layer.most = description["most"]
        if (first := description["first"]) is not None:
            layer.first = torch.tensor(first, device=next(iter(parts.values())).device)
        epoch, count = description["counted"]
        layer.counted = (epoch, count)
        if recent := description.get("recent"):
            layer.recent = RecentStates(recent["size"])
            layer.recent.append(parts["recent"], parts["asked"].transpose(1, 2), recent["end"])
            layer.recent.keep(recent["counts"])
        if "notes" in description:
            layer.notes = notes = put_together(notes_of(parts), description["notes"])
            layer.reader = description.get("reader")  # earlier files do not say
            for name in TABLES:
                if name in parts and not torch.equal(getattr(notes, name), parts[name]):
                    raise ValueError("expected notes of the pairs that are held, got others")
    return layer


def notes_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of a layer's notes, or what is known of them, by their own names."""
    prefix = "notes."
    return {name[len(prefix) :]: part for name, part in parts.items() if name.startswith(prefix)}


def _dense(parts: Mapping[str, Tensor], _: Mapping[str, Any]) -> DynamicLayer:
    layer = DynamicLayer()  # type: ignore[no-untyped-call]
    layer.update(parts["keys"], parts["values"])
    return layer


def _sliding(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> Any:
    layer = sliding_layer(description["window"])
    layer.lazy_initialization(parts["keys"], parts["values"])
    layer.keys, layer.values = parts["keys"], parts["values"]
    layer.cumulative_length = description["seen"]
    return layer


def _growing(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> GrowingLayer:
    backend = backend_of(description)
    layer = GrowingLayer(parts["keys"], parts["values"], backend=backend)
    layer.evicted = description["evicted"]
    return layer


def _ragged(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> RaggedLayer:
    rows = Rows.of(parts["stored_keys"], parts["stored_values"], bias=parts.get("bias"))
    return _with_tail(rows, parts, description)


def _quantised(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> RaggedLayer:
    keys, values, scales = (parts[name] for name in list(_QUANTISED)[:3])
    tail_keys, tail_values = parts["tail_keys"], parts["tail_values"]
    sizes = tail_keys.shape[3], tail_values.shape[3]
    dtype = torch.promote_types(tail_keys.dtype, tail_values.dtype)
    rows = Rows(description["pairs"], keys, values, scales, *sizes, dtype, parts.get("bias"))
    return _with_tail(rows, parts, description)


def _with_tail(
    rows: Rows, parts: Mapping[str, Tensor], description: Mapping[str, Any]
) -> RaggedLayer:
    begin, end, length = parts["begin"], parts["end"], description["context_length"]
    heads = end.long() - begin.long()
    if not (
        bool((begin >= 0).all() and (heads >= 0).all() and (end <= len(rows)).all())
        and bool((heads <= length).all())
    ):
        raise ValueError(
            f"expected tables of heads within {len(rows)} stored pairs of {length} positions, got "
            "others"
        )
    layer = RaggedLayer(rows, begin, end, length=length, backend=backend_of(description))
    if (positions := parts.get("positions")) is not None:
        if not torch.equal(unpack(positions, length).sum(-1), heads):
            raise ValueError("expected as many positions as pairs of each head, got others")
        layer.positions = positions
    if parts["tail_keys"].shape[2]:
        layer.update(parts["tail_keys"], parts["tail_values"])
    if WAITS in description:
        waits = description[WAITS]
        layer.tail.wait(waits["tokens"], torch.tensor(waits["stored"], device=begin.device))
    return layer


def _tail_end(numbers: Mapping[str, Any], size: Mapping[str, int]) -> int:
    """Give the true length of a ragged layer."""
    waiting: int = numbers.get(WAITS, {}).get("tokens", 0)
    return int(numbers["context_length"]) - waiting + size["N"]


def _static(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> StaticLayer:
    return _filled(StaticLayer(description["slots"]), parts, parts["keys"].shape[2])


def _compact_static(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> StaticLayer:
    layer = CompactStaticLayer(description["slots"])
    _filled(layer, parts, parts["keys"].shape[2])
    layer.set_evicted(description["evicted"], description["context_length"])
    return layer


def _static_sliding(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> StaticLayer:
    slots = description["slots"]
    return _filled(StaticSlidingWindowLayer(slots, slots), parts, description["seen"])


def _filled(layer: StaticLayer, parts: Mapping[str, Tensor], seen: int) -> StaticLayer:
    """Write pairs to the first slots of a new layer."""
    layer.lazy_initialization(parts["keys"], parts["values"])
    assert layer.keys is not None and layer.values is not None
    for buffer, pairs in ((layer.keys, parts["keys"]), (layer.values, parts["values"])):
        buffer[:, :, : pairs.shape[2]] = pairs
    counted = getattr(layer, "cumulative_length", None)
    if isinstance(counted, Tensor):  # compiled graphs know it by its address
        counted.fill_(seen)
    elif counted is not None:
        layer.cumulative_length = seen
    if hasattr(layer, "cumulative_length_int"):
        layer.cumulative_length_int = seen
    return layer


def backend_of(description: Mapping[str, Any]) -> str:
    """Name of a backend; that of a machine which has none is not this one's."""
    try:
        ops.check_backend(description["backend"])
    except RuntimeError:
        return "auto"
    return str(description["backend"])


KINDS = {
    "dense": Kind(DynamicLayer, _DENSE, (), lambda _, size: size["N"], _pairs_of, _dense),
    "sliding": Kind(
        DynamicSlidingWindowLayer,
        _DENSE,
        ("seen", "window"),
        lambda n, _: n["seen"],
        _pairs_of,
        _sliding,
    ),
    "growing": Kind(
        GrowingLayer,
        _DENSE,
        ("evicted",),
        lambda numbers, size: numbers["evicted"] + size["N"],
        _pairs_of,
        _growing,
    ),
    **{
        f"ragged{suffix}": Kind(
            RaggedLayer,
            _RAGGED | more,
            (),
            _tail_end,
            _stored,
            _ragged,
        )
        for suffix, more in _BIASED.items()
    },
    **{
        f"quantised{suffix}": Kind(
            RaggedLayer,
            _QUANTISED | more,
            ("pairs",),
            _tail_end,
            _stored,
            _quantised,
        )
        for suffix, more in _BIASED.items()
    },
    "static": Kind(
        StaticLayer, _DENSE, ("slots",), lambda _, size: size["N"], _filled_slots, _static
    ),
    "compact static": Kind(
        CompactStaticLayer,
        _DENSE,
        ("slots", "evicted", "context_length"),
        lambda numbers, size: numbers["evicted"] + size["N"],
        _filled_slots,
        _compact_static,
    ),
    "static sliding": Kind(
        StaticSlidingWindowLayer,
        _DENSE,
        ("slots", "seen"),
        lambda numbers, _: numbers["seen"],
        _pairs_of,
        _static_sliding,
    ),
}

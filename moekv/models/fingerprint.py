"""Identifies models: what was computed with one model must not be used with another.

A fingerprint has two parts. What must be **equal**: the architecture, its sizes and how positions
are rotated. And how **near** the weights are: a sketch of them, some hundred sums, which bf16,
fp16, 8- and 4-bit round trips, sharding and offloading hardly change, and a fine-tune does.

A fine-tune changes a weight by a hundredth of what rounding to 4 bits does, so no projection of
matrices can tell the two apart. But vectors are rounded to 16 bits at most, and noise
cancels in sums over many weights. Hence three groups of sums, each with a scale of its own: the
largest change in any round trip (see `_SCALES`; docs/design.md has the measurements).

``norms``    vectors: norms' weights and biases, as they are and rounded to bf16 and to fp16. Of
             these three the nearest counts: rounding once more changes nothing.
``means``    means over the rows of the embedding: thousands of weights in a number.
``tokens``   rows of the embedding in their order, which is the tokenizer's.
``weights``  rows of matrices in three layers. These two differ between unrelated models.

A sketch is remembered until one of the weights that it reads is another tensor, or has been written
to, or has other bits in places (`_state`); those that a library stores in a form of its own, or
elsewhere, are read at every call.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekv.models.hooks import find_layers, option
from moekv.models.weights import has_weight, language_model, mesh_of, read_weight

TOLERANCE = 2.0
"""Largest distance of weights that count as the same: twice that of any round trip."""

_SCALES = {"norms": 1e-5, "means": 1.1e-2, "tokens": 0.19, "weights": 0.15}
"""Largest change of each group in round trips of SmolLM2's weights, those to 4 bits, where every
piece has a mean square of 1. Norms do not change at all, but sums of floats may."""

_FORMS = ("norms", "norms in bf16", "norms in fp16")
_COUNTS = {**dict.fromkeys(_FORMS, 32), "means": 32, "tokens": 32, "weights": 64}  # sums
_FORM = re.compile(r"(\w{1,32}-[0-9a-f]{16})-([\w-]{4,})", re.ASCII)
_ROWS = 64  # of a matrix
_TOKENS = 8192  # rows of the embedding
_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "layer_types", "sliding_window"),
    *("hidden_act", "hidden_activation", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *("attention_bias", "attn_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier"),
    *("use_qk_norm", "qk_layernorm", "clip_qkv", "no_rope_layers", "attention_chunk_size"),
    *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "num_kv_shared_layers"),
    *("residual_multiplier", "embedding_multiplier"),
)


def fingerprint(model: PreTrainedModel) -> str:
    """Return a name of a model's architecture and weights.

    Parameters
    ----------
    model : PreTrainedModel
        A language model, with or without a head; quantised, offloaded, sharded or wrapped by PEFT
        (an adapter that is active is a part of the weights). Under tensor parallelism every rank
        has to call.

    Returns
    -------
    str
        ``TYPE-EQUAL-SKETCH``: the type of the model, 16 hexadecimal digits, and the sketch. It is
        the same from call to call, and on a device bit for bit. :func:`distance` compares two.

    Raises
    ------
    TypeError
        The model has no decoder layers with attention.
    """
    inner = language_model(model)
    decoder, layers = find_layers(inner)
    numbers = _sketch_of(decoder, layers, mesh_of(inner))
    sketch = base64.urlsafe_b64encode(numbers.astype("<f4").tobytes()).decode().rstrip("=")
    return f"{architecture(inner)}-{sketch}"


def architecture(model: PreTrainedModel) -> str:
    """Return the part of :func:`fingerprint` that must be equal, without reading a weight."""
    inner = language_model(model)
    digest = hashlib.sha256(json.dumps(_what_must_be_equal(inner), sort_keys=True).encode())
    kind = re.sub(r"[^A-Za-z0-9_]", "_", str(inner.config.model_type))[:32]
    return f"{kind}-{digest.hexdigest()[:16]}"


def short(name: str) -> str:
    """Shorten a fingerprint for messages: its type, what must be equal, a digest of the sketch."""
    kind, _, rest = name.partition("-")
    equal, _, sketch = rest.partition("-")
    return f"{kind[:32]}-{equal[:16]}-{hashlib.sha256(sketch.encode()).hexdigest()[:8]}"


def distance(one: str, other: str) -> float:
    """Return how far the weights of two models are apart.

    Parameters
    ----------
    one, other : str
        Fingerprints.

    Returns
    -------
    float
        0: the same. 1: as far as the worst of the round trips by which it was measured. Infinite:
        another architecture or rotation, or no fingerprint of this version of moekv.
    """
    first, second = _parts(one), _parts(other)
    if first is None or second is None or first[0] != second[0]:
        return float("inf")
    changes, begin = {}, 0
    for group, count in _COUNTS.items():
        a, b = (sums[begin : begin + count] for _, sums in (first, second))
        begin += count
        if not (numpy.isnan(a).any() or numpy.isnan(b).any()):  # NaN: it could not be read
            both = numpy.isfinite(a).all() and numpy.isfinite(b).all()
            changes[group] = numpy.square(a - b).mean() ** 0.5 if both else float("inf")
    if not changes:
        return float("inf")
    forms = [changes.pop(form) for form in _FORMS if form in changes]
    if forms:
        changes["norms"] = min(forms)
    return max(float(change / _SCALES[group]) for group, change in changes.items())


def check_same(name: str, model: PreTrainedModel, what: str) -> float:
    """Raise unless a fingerprint is that of a model.

    Parameters
    ----------
    name : str
        The fingerprint.
    model : PreTrainedModel
    what : str
        What was expected, for the message.

    Returns
    -------
    float
        The distance of the weights, at most ``TOLERANCE``.

    Raises
    ------
    ValueError
        It is not; says in what they differ.
    """
    own = fingerprint(model)
    far = distance(name, own)
    if far <= TOLERANCE:
        return far
    raise ValueError(f"expected {what} ({short(own)}), got one of {describe(name, own)}")


def describe(name: str, own: str) -> str:
    """Describe how another model differs."""
    parts, mine = _parts(name), _parts(own)
    if parts is None or mine is None:
        return f"{name[:60]!r}, which is no fingerprint of this version of moekv"
    if parts[0] != mine[0]:
        return f"another architecture, size or rotation ({short(name)})"
    return (
        f"other weights ({short(name)}), {distance(name, own):.1f} from it, where round trips to 4 "
        f"bits stay below {TOLERANCE:.0f}"
    )


def _parts(name: str) -> tuple[str, Any] | None:
    """Split a fingerprint: what must be equal, and the numbers of its sketch."""
    if not isinstance(name, str) or not (found := _FORM.fullmatch(name)):
        return None
    equal, sketch = found.groups()
    raw = base64.urlsafe_b64decode(sketch + "=" * (-len(sketch) % 4))
    if len(raw) != 4 * sum(_COUNTS.values()):
        return None
    return equal, numpy.frombuffer(raw, "<f4").astype(numpy.float64)


# --- What must be equal ---------------------------------------------------------------------------


def _what_must_be_equal(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    equal = {name: value for name in _FIELDS if (value := option(config, name)) is not None}
    equal["head_dim"] = option(config, "head_dim")
    heads, size = equal.get("num_attention_heads"), equal.get("hidden_size")
    if equal["head_dim"] is None and isinstance(heads, int) and isinstance(size, int):
        equal["head_dim"] = size // heads
    rotation = getattr(config, "rope_parameters", None) or {
        "rope_theta": getattr(config, "rope_theta", None),
        "rope_scaling": getattr(config, "rope_scaling", None),
    }
    kinds = str(rotation)
    if "'default'" not in kinds and "rope_type" in kinds:  # others may go by it
        equal["max_position_embeddings"] = getattr(config, "max_position_embeddings", None)
    equal["rotation"] = rotation
    return _normal(equal)  # type: ignore[no-any-return]


def _normal(value: Any) -> Any:
    """Numbers to six digits, as formats of files round them, and nothing that is None."""
    if isinstance(value, dict):
        return {str(key): _normal(x) for key, x in value.items() if x is not None}
    if isinstance(value, list | tuple):
        return [_normal(x) for x in value]
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)


# --- How near the weights are ---------------------------------------------------------------------


class _Sums:
    """The sums of one group: every piece adds to each of them, with signs of its own."""

    def __init__(self, count: int) -> None:
        self.values = torch.zeros(count, dtype=torch.float64, device="cpu")
        self._pieces = self._size = 0

    def add(self, piece: Tensor | None) -> None:
        """Add a vector [N] or rows [R, N]; None could not be read: the sums are unknown (NaN)."""
        self._pieces += 1
        if piece is None:
            self.values.fill_(float("nan"))
            return
        if not bool(piece.isfinite().all()):  # such weights are near to none, their own included
            self.values += float("inf")
            return
        rows = piece.reshape(-1, piece.shape[-1])
        count = len(self.values)
        exact = torch.float64 if len(rows) == 1 else torch.float32  # one row is no work
        rows = rows.to("cpu" if len(rows) == 1 else rows.device, exact)
        summed = rows @ _signs(rows.shape[1], count, 0).to(rows.device, exact)  # [R, count]
        own = _signs(len(rows), count, self._pieces)
        self.values += (summed.to("cpu", torch.float64) * own).sum(0)
        self._size += rows.numel()

    def add_vectors(self, vectors: list[Tensor | None]) -> None:
        """Add vectors [N] of any lengths, as so many pieces: those of a length at once."""
        first, self._pieces = self._pieces + 1, self._pieces + len(vectors)
        own = _signs_of_pieces(first, len(vectors), len(self.values))
        by_length: dict[int, list[int]] = {}
        for index, vector in enumerate(vectors):
            by_length.setdefault(-1 if vector is None else len(vector), []).append(index)
        if -1 in by_length:
            self.values.fill_(float("nan"))
            return
        for length, indices in by_length.items():
            rows = torch.stack([x for i in indices if (x := vectors[i]) is not None])
            if not bool(rows.isfinite().all()):
                self.values += float("inf")
                continue
            self.values += ((rows @ _signs(length, len(self.values), 0)) * own[indices]).sum(0)
            self._size += rows.numel()

    def result(self) -> Tensor:
        """Scaled so that their number does not matter: [count]; NaN where there was nothing."""
        return self.values / max(self._size, 1) ** 0.5 if self._pieces else self.values / 0


@dataclass(frozen=True)
class _Weight:
    """A weight that the sketch reads."""

    leaf: nn.Module
    name: str
    group: str  # "embedding", "vectors" or "weights"

    def read(self, mesh: Any) -> Tensor | None:
        return read_weight(self.leaf, self.name, mesh=mesh)


def _weights(decoder: nn.Module, attention: Sequence[nn.Module]) -> list[_Weight]:
    """List what the sketch reads, in order."""
    embedding: Any = decoder.get_input_embeddings()  # type: ignore[operator]
    found, layers = [_Weight(embedding, "weight", "embedding")], _blocks(decoder, attention)
    chosen = {0, len(layers) // 2, len(layers) - 1}
    for index, layer in enumerate(layers):
        for leaf in _leaves(layer):
            weight: Any = getattr(leaf, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                found.append(_Weight(leaf, "weight", "vectors"))
            elif index in chosen:
                found.append(_Weight(leaf, "weight", "weights"))
            if _has_bias(leaf):
                found.append(_Weight(leaf, "bias", "vectors"))
    return found


_PLACES = 512
"""Numbers of a matrix whose bits are looked at, from all over it; of a vector they all are."""

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)

_remembered: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _state(weights: Sequence[_Weight]) -> Any:
    """Return what changes when weights do, for a small part of a sketch's cost; None: not known.

    PyTorch counts what writes to a tensor, but not to its ``data``: a fine-tune that does so is
    found by the bits.
    """
    bits: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    tensors = []
    for weight in weights:
        stored = getattr(weight.leaf, "_parameters", {}).get(weight.name)
        if type(stored) is not nn.Parameter or stored.is_meta or stored.is_inference():
            return None
        if hasattr(weight.leaf, "base_layer") or hasattr(weight.leaf, "_hf_hook"):
            return None
        if stored.dtype not in _PLAIN or not stored.is_contiguous():
            return None
        tensors.append((id(stored), stored.data_ptr(), stored._version, stored.shape))
        numbers = stored.detach().view(-1)
        # An odd step, so that places are in all columns.
        step = 1 if stored.dim() == 1 else max(len(numbers) // _PLACES, 1) | 1
        bits.setdefault((stored.dtype, stored.device), []).append(numbers[::step])
    digests = []
    for (dtype, device), parts in bits.items():
        whole = torch.cat(parts).view(torch.int16 if dtype.itemsize == 2 else torch.int32).long()
        factors = torch.arange(1, 2 * len(whole), 2, device=device)  # so that order counts
        digests.append(int((whole * factors).sum()))
    return tensors, digests


@torch.no_grad()
def _sketch_of(decoder: nn.Module, attention: Sequence[nn.Module], mesh: Any) -> Any:
    """Return the sketch, from memory where the weights are as they were."""
    weights = _weights(decoder, attention)
    state = None if mesh is not None else _state(weights)
    known = _remembered.get(decoder)
    if state is not None and known is not None and known[0] == state:
        return known[1]
    numbers = _sketch(weights, mesh)
    if state is not None:
        _remembered[decoder] = state, numbers
    return numbers


def _sketch(weights: Sequence[_Weight], mesh: Any) -> Any:
    sums = {group: _Sums(count) for group, count in _COUNTS.items()}
    embedding = weights[0].read(mesh)
    if embedding is not None:
        if len(embedding) >= _TOKENS:  # noise of fewer does not cancel
            mean = _evened(_spread(embedding, _TOKENS)).mean(0)
            sums["means"].add(mean - mean.mean())
        sums["tokens"].add(_evened(_spread(embedding, _ROWS)))
    vectors = [weight.read(mesh) for weight in weights if weight.group == "vectors"]
    for weight in weights:
        if weight.group != "weights":
            continue
        rows = weight.read(mesh)
        if rows is None or rows.dim() == 2:
            sums["weights"].add(None if rows is None else _evened(_spread(rows, _ROWS)))
    for form, dtype in zip(_FORMS, (torch.float32, torch.bfloat16, torch.float16), strict=True):
        sums[form].add_vectors([None if x is None else _evened(x.to(dtype)) for x in vectors])
    return torch.cat([sums[group].result() for group in _COUNTS]).numpy()


def _blocks(decoder: nn.Module, attention: Sequence[nn.Module]) -> nn.ModuleList:
    """Find the list of a decoder's blocks, by whatever name."""
    lists = (x for x in decoder.modules() if isinstance(x, nn.ModuleList))
    found = (x for x in lists if set(attention) <= set(x.modules()))
    return next(found, nn.ModuleList([decoder]))


def _spread(rows: Tensor, count: int) -> Tensor:
    """As many rows of a matrix, evenly spread."""
    return rows[:: max(len(rows) // count, 1)][:count]


def _evened(piece: Tensor) -> Tensor:
    """Scale to a mean square of 1, so that all pieces count alike."""
    piece = piece.float() if piece.dim() > 1 else piece.to("cpu", torch.float64)
    return piece / piece.square().mean().sqrt().clamp(min=1e-30)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Modules with a weight, as they were before anything was wrapped around them, by name."""
    if has_weight(module):
        yield module
        return
    for _, inner in sorted(module.named_children()):
        yield from _leaves(inner)


def _has_bias(leaf: Any) -> bool:
    bias = getattr(leaf, "bias", None)
    return (bias() if callable(bias) and not isinstance(bias, Tensor) else bias) is not None


@lru_cache(maxsize=64)
def _signs(length: int, count: int, seed: int) -> Tensor:
    """Signs [length, count] that depend on their places alone, the same on every machine."""
    place = numpy.arange(length * count, dtype=numpy.uint64) + numpy.uint64(seed << 40)
    return _signs_at(place).view(length, count)


@lru_cache(maxsize=64)
def _signs_of_pieces(first: int, number: int, count: int) -> Tensor:
    """Signs [number, count]: ``_signs(1, count, seed)`` of the seeds from `first` on."""
    seeds = numpy.arange(first, first + number, dtype=numpy.uint64) << numpy.uint64(40)
    return _signs_at(seeds[:, None] + numpy.arange(count, dtype=numpy.uint64))


def _signs_at(place: Any) -> Tensor:
    mixed = place
    with numpy.errstate(over="ignore"):  # the finaliser of SplitMix64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> numpy.uint64(shift))) * numpy.uint64(factor)
    return torch.from_numpy((mixed >> numpy.uint64(63)).astype(numpy.float64) * 2 - 1)

"""Compression of a cache that goes on growing: during decoding, and between chunks of a prefill.

A growing cache is compressed again and again. Every time its layers are rated as after a prefill,
with two differences. Only the last tokens' hidden states are known (:class:`RecentStates`): they
give the window of queries and, on average, the gate weights of all pairs. And what is left of a
sequence has gaps: **places are not positions**. An expert sees the pairs of a head in their order,
as if nothing had ever stood between them, and may not take the place of a pair for its position in
the text; keys carry the rotation of their true positions, and so do the window's queries. What
that means for the experts of moekv:

- ``aggressive``, ``moderate``, ``conservative`` keep shares of what is left, so that with every
  compression the text's beginning weighs more.
- ``temporal`` takes the number of pairs behind one for its age, which is a lower bound, and
  partitions of pairs that are left for partitions of the text.
- ``selective`` averages over neighbours that are left.
- ``learned``, of calibrated routers, alone knows true positions: what it needs of a token is noted
  beside its pair when it comes (:func:`take_notes`).
- Sinks stay the text's own: they never leave. So do the last ``recent`` ones, and with the
  tokens since they make up the run of pairs without gaps, in which causality is known: no query
  older than that run is asked.
- A kvpress scorer gets what ``kvpress.DecodingPress`` would give it: all pairs, and the hidden
  states of the last tokens alone. Where heads hold different numbers, theirs stand at the right,
  behind zeros, whose scores are ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from moekv import ops
from moekv.budget import Kept, split_layers, without_padding
from moekv.cache import cached_pairs
from moekv.layers import GrowingLayer, RaggedLayer, compressed, notes_of
from moekv.ops import ScoreKind
from moekv.queries import recent_queries
from moekv.recent import RecentStates
from moekv.view import LayerView


@dataclass(frozen=True)
class DecodingConfig:
    """Compress during decoding.

    Tokens are added until a head holds ``target + interval`` pairs; then pairs leave until it holds
    ``target``. With a budget over the heads of a layer or of the model these are averages over
    them, and exact as such. So decoding token by token never holds more than ``target +
    interval``, however long it goes on. A prefill, too, leaves at most ``target``.

    Parameters
    ----------
    target : int
        Pairs of a head after each compression; at least 1.
    interval : int
        Tokens between two compressions; at least 1. The more, the less a token pays for them, and
        the more queries (at most the press's ``window``) have a say.

    Raises
    ------
    ValueError
        If one is no integer or less than 1.
    """

    target: int = 2048
    interval: int = 512

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("target", "interval"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"expected {name} an integer >= 1, got {value!r}")


Grown = GrowingLayer | RaggedLayer


def growing(cache: Cache, index: int, *, backend: str) -> Grown:
    """Make sure that a layer appends in place and remembers; a plain one is replaced."""
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:
        layer = cache.layers[index] = GrowingLayer(*cached_pairs(layer), backend=backend)
    assert isinstance(layer, Grown)
    return layer


def remember(layer: Grown, hidden_states: Tensor, window: int) -> None:
    """Keep the last inputs of an attention layer beside its cache.

    Parameters
    ----------
    layer : GrowingLayer or RaggedLayer
        Already with the pairs of these tokens.
    hidden_states : Tensor [B, Q, hidden]
    window : int
        Tokens to remember.
    """
    if layer.recent is None or layer.recent.size != window:
        layer.recent = RecentStates(window)
    layer.recent.append(hidden_states, layer.get_seq_length())


def take_notes(read: Tensor, kept: Kept | None, *, backend: str) -> Grown:
    """Note what a calibrated router reads of the pairs of a prefill, for the next compression.

    Its ``learned`` expert needs hidden states, which are gone by then, and true positions. So both
    are kept beside the pairs, 8 bytes for each, as a cache layer of its own: with head_dim 1, what
    was read as keys and places as values. It is appended to, cropped, reordered and compressed with
    the layer whose ``notes`` it is.

    Parameters
    ----------
    read : Tensor [B, H, T], float32
        See ``CalibratedRouter.read``.
    kept : Kept or None
        The pairs that stay; None: all.
    backend : str

    Returns
    -------
    GrowingLayer or RaggedLayer
        Places are those in the padded row.
    """
    read = read[..., None].contiguous()
    place = torch.empty_like(read).copy_(_places(0, read))
    if kept is None:
        return GrowingLayer(read, place, backend=backend)
    return compressed(read, place, kept, backend=backend)


def note(layer: Grown, read: Tensor) -> None:
    """Note what is read of new tokens; forget all notes if tokens before them came unread.

    Parameters
    ----------
    layer : GrowingLayer or RaggedLayer
        Already with the pairs of these tokens.
    read : Tensor [B, H, Q], float32
    """
    held = layer.get_seq_length() - read.shape[2]
    if layer.notes is None or layer.notes.get_seq_length() < held:
        layer.notes = None
        return
    layer.notes.crop(held)  # shorter where somebody has cut the keys themselves
    read = read[..., None]
    layer.notes.update(read, _places(held + getattr(layer, "evicted", 0), read).expand_as(read))


def _places(first: int, read: Tensor) -> Tensor:
    count = read.shape[2]
    return torch.arange(first, first + count, dtype=torch.float32, device=read.device)[:, None]


def run_without_gaps(
    keep: Sequence[int], lengths: Sequence[int], *, sinks: int, recent: int, window: int
) -> int:
    """Count the last tokens that no head lacks once each row keeps so many of its pairs a head.

    Parameters
    ----------
    keep, lengths : sequence of B ints
        Pairs of a head, on average: those that stay, and those that there were.
    sinks, recent, window : int
        Of the press.
    """
    runs = [min(recent, k - min(sinks, k)) for k, n in zip(keep, lengths, strict=True) if k < n]
    return min([window, *runs])


def count_pairs(layer: Grown, fed: int, padding: Sequence[int]) -> list[int]:
    """Real pairs of each row, all heads together, once ``fed`` further tokens are there.

    Parameters
    ----------
    layer : GrowingLayer or RaggedLayer
    fed : int
        Tokens that the layer still has to get.
    padding : sequence of B ints
        Padding at the left of each row, in positions of the mask.
    """
    if isinstance(layer, RaggedLayer):
        num_heads, tail = layer.begin.shape[1], layer.tail_length + fed
        return [
            stored + num_heads * (tail - max(p - layer.context_length, 0))
            for stored, p in zip(layer.stored_pairs, padding, strict=True)
        ]
    keys, _ = cached_pairs(layer)
    return [keys.shape[1] * (keys.shape[2] + fed - p) for p in padding]


def exceeds(
    counts: Sequence[Sequence[int]], num_heads: int, limit: Sequence[int], *, over_model: bool
) -> bool:
    """Say whether a row of any layer, or of all together, holds more than its limit.

    Parameters
    ----------
    counts : sequence of L sequences of B ints
        Pairs of each layer's rows, all heads together.
    num_heads : int
        KV heads of a layer.
    limit : sequence of B ints
        Pairs of a head.
    over_model : bool
        Whether the layers share their budget.
    """
    if over_model:
        num_heads *= len(counts)
        counts = [[sum(row) for row in zip(*counts, strict=True)]]
    return any(
        count > num_heads * most for rows in counts for count, most in zip(rows, limit, strict=True)
    )


@dataclass
class Held:
    """What a layer holds, as dense tensors that are padded at the left.

    Attributes
    ----------
    keys, values : Tensor [B, H, L, D]
    start : Tensor [B, H], int32, or None
        Padding of each head; None: no padding.
    lengths : list of B lists of H ints
        Real pairs of each head.
    folded : bool
        Whether heads of one row differ.
    notes : tuple of two Tensor [B, H, L], or None
        Of a calibrated router, see ``LayerView``.
    """

    keys: Tensor
    values: Tensor
    start: Tensor | None
    lengths: list[list[int]]
    folded: bool
    notes: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, layer: Grown, padding: Sequence[int]) -> "Held":
        """Look at a layer.

        Parameters
        ----------
        layer : GrowingLayer or RaggedLayer
            A ragged one is copied, and the device waited for.
        padding : sequence of B ints
            Padding at the left of each row, in positions of the mask.
        """
        held = cls._of(layer, padding)
        if (notes := notes_of(layer)) is not None:
            noted = cls._of(notes, padding)
            before = torch.tensor(padding, device=held.keys.device)[:, None, None]
            held.notes = noted.keys[..., 0], (noted.values[..., 0] - before).clamp(min=0)
        return held

    @classmethod
    def _of(cls, layer: Grown, padding: Sequence[int]) -> "Held":
        if isinstance(layer, RaggedLayer):
            keys, values, counts = layer.to_dense()
            behind = [max(p - layer.context_length, 0) for p in padding]
            if any(behind):
                counts = counts - torch.tensor(behind, device=counts.device)[:, None]
            lengths: list[list[int]] = counts.tolist()
            longest = keys.shape[2]
            if all(n == longest for row in lengths for n in row):
                return cls(keys, values, None, lengths, False)
            return cls(keys, values, (longest - counts).int(), lengths, True)
        keys, values = cached_pairs(layer)
        num_heads, length = keys.shape[1:3]
        start = None
        if any(padding):
            start = torch.tensor(padding, dtype=torch.int32, device=keys.device)
            start = start[:, None].expand(-1, num_heads)
        return cls(keys, values, start, [[length - p] * num_heads for p in padding], False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, H, L)."""
        batch, num_heads, longest, _ = self.keys.shape
        return batch, num_heads, longest

    def view(
        self,
        module: nn.Module,
        states: Tensor,
        attentions: Tensor | None,
        kwargs: Mapping[str, Any],
        *,
        kinds: Sequence[ScoreKind],
        backend: str,
    ) -> LayerView:
        """Show the layer to experts; where heads differ, each is a row of its own.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        states : Tensor [B, N, hidden]
            Its last inputs.
        attentions, kwargs
            As a forward hook gets them.
        kinds, backend
            As in ``moekv.view.ViewBuilder``.
        """
        _, num_heads, longest = self.shape
        states = states[:, -longest:]
        queries = recent_queries(module, states, kwargs).to(self.keys.dtype)
        keys, values, start = self.keys, self.values, self.start
        lengths, notes = [row[0] for row in self.lengths], self.notes
        if self.folded:
            assert start is not None
            keys, values = keys.flatten(0, 1)[:, None], values.flatten(0, 1)[:, None]
            queries = queries.reshape(len(keys), -1, *queries.shape[2:])
            start = start.flatten()
            lengths = [n for row in self.lengths for n in row]
            if notes is not None:
                read, position = (x.flatten(0, 1)[:, None] for x in notes)
                notes = read, position
        elif start is not None:
            start = start[:, 0].contiguous()
        return LayerView(
            module=module,
            hidden_states=states,
            keys=keys,
            values=values,
            queries=queries,
            start=start,
            lengths=tuple(lengths),
            begins=True,
            ends=True,
            attentions=attentions,
            kwargs=kwargs,
            kinds=kinds,
            backend=backend,
            notes=notes,
        )

    def alone(self, keep: Sequence[int]) -> list[int]:
        """Pairs that an expert alone would keep in each row of the view: all heads lose alike."""
        alone = []
        for k, row in zip(keep, self.lengths, strict=True):
            before = max(sum(row), 1)
            after = min(before, k * len(row))
            alone += [max(n * after // before, 1) for n in (row if self.folded else row[:1])]
        return alone


@dataclass
class Regrown:
    """A rated layer of a cache that has grown: its scores, and what it takes to act on them."""

    index: int
    layer: Grown
    scores: Tensor  # [B, H, L] fp32
    start: Tensor | None  # [B, H]
    lengths: list[list[int]]


def choose(
    regrown: Sequence[Regrown],
    keep: Sequence[int],
    *,
    budget: str,
    sinks: int,
    recent: int,
    backend: str,
) -> list[Kept]:
    """Choose the pairs that stay in layers that have grown.

    Parameters
    ----------
    regrown : sequence of L Regrown
    keep : sequence of B ints
        Pairs of a head in each row, on average over the heads that share a budget.
    budget : str
        ``"uniform"``: no head keeps more. ``"head"``: the heads of a layer share; ``"model"``:
        those of all layers.
    sinks, recent : int
        First and last pairs that every head keeps, as far as its share allows.
    backend : str

    Returns
    -------
    list of L Kept
        In each row as many as `keep` says, or all that there are. A budget over the model waits
        for the device, once.
    """

    def select(scores: Tensor, start: Tensor | None, totals: list[int]) -> ops.SelectKept:
        rows = scores.shape[1]
        totals = [max(total, rows) for total in totals]
        return ops.select_kept(
            scores, start, total=totals, sinks=sinks, window=recent, backend=backend
        )

    if budget == "model":
        return _choose_over_layers(regrown, keep, select)
    chosen = []
    for each in regrown:
        batch, num_heads, longest = each.scores.shape
        if budget == "head":
            totals = [
                min(sum(row), k * len(row)) for row, k in zip(each.lengths, keep, strict=True)
            ]
            kept = Kept(*select(each.scores, each.start, totals), (batch, num_heads, longest))
        else:
            totals = [min(n, k) for row, k in zip(each.lengths, keep, strict=True) for n in row]
            start = None if each.start is None else each.start.reshape(-1, 1)
            per_head = totals[0] if start is None and len(set(totals)) == 1 else None
            scores = each.scores.reshape(-1, 1, longest)
            kept = Kept(*select(scores, start, totals), (batch, num_heads, longest), per_head)
        chosen.append(without_padding(kept, each.start, chain.from_iterable(each.lengths)))
    return chosen


def _choose_over_layers(regrown: Sequence[Regrown], keep: Sequence[int], select: Any) -> list[Kept]:
    """One threshold over the heads of all layers, which are brought to one length."""
    device = regrown[0].scores.device
    longest = max(each.scores.shape[2] for each in regrown)
    scores, starts = [], []
    batch, num_heads, _ = regrown[0].scores.shape
    for each in regrown:
        shift = longest - each.scores.shape[2]
        start = each.start
        if start is None:
            start = each.scores.new_zeros((batch, num_heads), dtype=torch.int32)
        scores.append(functional.pad(each.scores, (shift, 0)).to(device))
        starts.append((start + shift).to(device))
    rows = [[n for each in regrown for n in each.lengths[b]] for b in range(len(keep))]
    totals = [min(sum(row), k * len(row)) for row, k in zip(rows, keep, strict=True)]
    selected = select(torch.cat(scores, 1), torch.cat(starts, 1), totals)
    chosen = []
    layers = split_layers(selected, batch, num_heads)
    for each, (indices, offsets) in zip(regrown, layers, strict=True):
        length, device = each.scores.shape[2], each.scores.device
        indices = (indices - (longest - length)).to(device)
        kept = Kept(indices, offsets.to(device), (batch, num_heads, length))
        chosen.append(without_padding(kept, each.start, chain.from_iterable(each.lengths)))
    return chosen


def recompress(cache: Cache, each: Regrown, kept: Kept, *, backend: str) -> Grown:
    """Leave only the kept pairs in a layer that has grown.

    Where all heads keep as many, and did so before, they move to the front of the memory that they
    have; else what stays is copied, and the memory of the others given back.

    Parameters
    ----------
    cache : Cache
    each : Regrown
    kept : Kept
    backend : str

    Returns
    -------
    GrowingLayer or RaggedLayer
        The cache's layer now.
    """
    layer = each.layer
    if isinstance(layer, RaggedLayer) or kept.per_head is not None:
        layer.recompress(kept)
    else:
        cache.layers[each.index] = layer = _to_ragged(layer, kept, backend=backend)
    return layer


def _to_ragged(layer: GrowingLayer, kept: Kept, *, backend: str) -> RaggedLayer:
    ragged = RaggedLayer.compress(*cached_pairs(layer), kept, backend=backend)
    ragged.context_length += layer.evicted
    ragged.recent, ragged.counted = layer.recent, layer.counted
    notes = notes_of(layer)
    if isinstance(notes, GrowingLayer):
        ragged.notes = _to_ragged(notes, kept, backend=backend)
    return ragged

"""How many pairs stay, and which."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from moekv import ops

Budget = Literal["auto", "uniform", "layer", "head", "model"]
BUDGETS = get_args(Budget)
"""``"uniform"``: every head keeps the same number. ``"layer"``: pairs move between layers, each of
which keeps as many in all its heads. ``"head"``: pairs move between the heads of a layer.
``"model"``: between those of all layers. ``"auto"``: one of these, see ``MoERouterPress``.
"""
OVER_MODEL = ("layer", "model")  # those that let pairs move between layers
DENSE = ("uniform", "layer")  # those under which the heads of a layer keep as many


def kept_pairs(length: int, compression_ratio: float, gain: Fraction | int = 1) -> int:
    """Count the pairs of a head that stay: ``max(1, int(length * (1 - compression_ratio)))``.

    Parameters
    ----------
    length : int
        Real pairs, >= 0.
    compression_ratio : float
        Share of their bytes to remove, in [0, 1).
    gain : Fraction
        Pairs that can be stored in the bytes of one: more than 1 where they are quantised.

    Returns
    -------
    int
        At least 1, so that no cache is ever emptied; with `gain` 1 what kvpress keeps. At most
        all: where quantising makes the room, nothing has to leave.
    """
    return max(1, min(length, int(length * (1 - compression_ratio) * gain)))


def check_ratio(compression_ratio: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a compression ratio is a number in [0, 1)."""
    if not isinstance(compression_ratio, Real):
        raise TypeError(
            f"expected compression_ratio a number, got {type(compression_ratio).__name__} "
            f"{compression_ratio!r}"
        )
    if not 0 <= compression_ratio < 1:
        raise ValueError(
            f"expected compression_ratio in [0, 1), the share of bytes to remove, "
            f"got {compression_ratio}"
        )


def finite_range(scores: Tensor, real: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Find the lowest and highest finite score of real pairs; 0 where there is none."""
    counted = scores.isfinite() & real
    low = scores.masked_fill(~counted, torch.inf).amin(dim, keepdim=True)
    high = scores.masked_fill(~counted, -torch.inf).amax(dim, keepdim=True)
    return low.masked_fill(low.isinf(), 0.0), high.masked_fill(high.isinf(), 0.0)


def protect(scores: Tensor, start: Tensor | None, *, sinks: int, recent: int) -> Tensor:
    """Make scores fit for any top-k: finite, sinks and recent positions first, padding last.

    Parameters
    ----------
    scores : Tensor [B, H, T], float32
        NaN ranks below every number. The heads of a row share a scale, rows do not.
    start : Tensor [B], int32, or None
        Padding at the left of each row.
    sinks, recent : int
        First and last real positions of each row that come before all others: sinks from the first
        on, then recent ones from the last back.

    Returns
    -------
    Tensor [B, H, T], float32
        New memory.
    """
    num_keys = scores.shape[2]
    position = torch.arange(num_keys, device=scores.device)
    place = (position if start is None else position - start[:, None]).reshape(-1, 1, num_keys)
    back = num_keys - 1 - position
    low, high = finite_range(scores, place >= 0, (1, 2))
    step = (high - low).clamp(min=1)
    scores = torch.where(scores.isfinite(), scores, low - step)
    # Each protected position has a score of its own: no top-k may choose among equals.
    scores = torch.where(back < recent, high + step * (2 - back / max(recent, 1)), scores)
    scores = torch.where(place < sinks, high + step * (4 - place / max(sinks, 1)), scores)
    return torch.where(place >= 0, scores, low - 2 * step)


@dataclass(frozen=True)
class Kept:
    """Positions that the heads of a layer keep.

    Attributes
    ----------
    indices : Tensor [n], int32
        Ascending within each head, heads in order.
    offsets : Tensor [B * H + 1], int32
        Where each head begins in `indices`.
    shape : tuple of int
        (B, H, T).
    per_head : int or None
        Pairs of each head, where all heads keep as many of rows without padding.
    """

    indices: Tensor
    offsets: Tensor
    shape: tuple[int, int, int]
    per_head: int | None = None

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Kept":
        """Keep what is True in a mask [B, H, T]. Waits for the device."""
        batch, num_heads, num_keys = mask.shape
        indices = mask.nonzero()[:, 2].int()
        offsets = functional.pad(mask.sum(-1).flatten().cumsum(0), (1, 0)).int()
        return cls(indices, offsets, (batch, num_heads, num_keys))

    @classmethod
    def everything(cls, shape: tuple[int, int, int], real: Tensor | None, device: Any) -> "Kept":
        """Keep all pairs that are real [B, H or 1, T]; None: all. Waits for the device if any."""
        batch, num_heads, num_keys = shape
        if real is not None:
            return cls.from_mask(real.expand(shape))
        heads = batch * num_heads
        indices = torch.arange(num_keys, dtype=torch.int32, device=device).repeat(heads)
        offsets = torch.arange(heads + 1, dtype=torch.int32, device=device) * num_keys
        return cls(indices, offsets, shape)

    def rows(self) -> Tensor:
        """Return the kept pairs' numbers in the flat layer [B * H * T]: int64 [n]."""
        batch, num_heads, num_keys = self.shape
        begin = torch.arange(batch * num_heads, device=self.indices.device) * num_keys
        if self.per_head is not None:
            return (self.indices.view(-1, self.per_head) + begin[:, None]).flatten()
        # The size is known, so that nothing has to wait for the device.
        return self.indices + begin.repeat_interleave(
            self.offsets.diff(), output_size=len(self.indices)
        )

    def mask(self) -> Tensor:
        """Mark the kept positions: [B, H, T] bool."""
        batch, num_heads, num_keys = self.shape
        mask = self.indices.new_zeros(batch * num_heads * num_keys, dtype=torch.bool)
        mask[self.rows()] = True
        return mask.view(self.shape)

    def counts(self) -> Tensor:
        """Count the pairs of each head: [B, H]."""
        return self.offsets.diff().view(self.shape[:2])

    def share(self) -> Tensor:
        """Share of each row's heads that keep a position: [B, T] float32."""
        batch, num_heads, num_keys = self.shape
        place = self.indices
        if batch > 1:
            place = place + self.rows() // (num_heads * num_keys) * num_keys
        counts = torch.zeros(batch * num_keys, dtype=torch.float32, device=place.device)
        counts.index_add_(0, place, counts.new_ones(()).expand(len(place)))
        return counts.view(batch, num_keys).div_(num_heads)


def select(
    scores: Sequence[Tensor],
    start: Tensor | None,
    totals: Sequence[int],
    *,
    budget: str = "uniform",
    sinks: int,
    recent: int,
    backend: str,
) -> list[Kept]:
    """Choose the pairs that the heads of some layers keep.

    Parameters
    ----------
    scores : sequence of L Tensor [B, H, T], float32
        On one scale, as far as the budget compares heads.
    start : Tensor [B], int32, or None
        Padding at the left of each row.
    totals : sequence of B ints
        Pairs that a head of each row keeps, on average over the heads that share a budget.
    budget : str
        ``"uniform"``, ``"head"`` or ``"model"``.
    sinks, recent : int
        First and last real positions that every head keeps, as far as the total allows.
    backend : str

    Returns
    -------
    list of L Kept
        Exactly ``H * totals[b]`` pairs of row b in every layer, or with a ``"model"`` budget
        ``L * H * totals[b]`` in all. That one waits for the device, once.
    """
    batch, num_heads, num_keys = scores[0].shape
    shape = (batch, num_heads, num_keys)

    def choose(groups: Tensor, heads: int) -> ops.SelectKept:
        """Select in groups of rows that share a budget; `heads` belong to each batch row."""
        starts = None
        if start is not None:
            starts = start.to(groups.device)[:, None].expand(batch, heads)
            starts = starts.reshape(groups.shape[:2])
        shared = groups.shape[1]
        total = [n * shared for n in totals for _ in range(heads // shared)]
        return ops.select_kept(
            groups, starts, total=total, sinks=sinks, window=recent, backend=backend
        )

    if budget == "model":
        shared = len(scores) * num_heads
        return select_over_layers(
            scores,
            start,
            [n * shared for n in totals],
            sinks=sinks,
            recent=recent,
            backend=backend,
        )
    if budget == "head":
        return [Kept(*choose(layer, num_heads), shape) for layer in scores]
    per_head = totals[0] if start is None and len(set(totals)) == 1 else None
    return [
        Kept(*choose(layer.reshape(-1, 1, num_keys), num_heads), shape, per_head)
        for layer in scores
    ]


def select_over_layers(
    scores: Sequence[Tensor],
    start: Tensor | None,
    totals: Sequence[int],
    *,
    sinks: int,
    recent: int,
    backend: str,
) -> list[Kept]:
    """Choose the best pairs over all heads of some layers. Waits for the device, once.

    Parameters
    ----------
    scores : sequence of L Tensor [B, H, T], float32
        On one scale.
    start : Tensor [B], int32, or None
        Padding at the left of each row.
    totals : sequence of B ints
        Pairs that each row keeps in all, at least one for each of its heads.
    sinks, recent : int
        First and last real positions that every head keeps, as far as the total allows.
    backend : str

    Returns
    -------
    list of L Kept
    """
    batch, num_heads, num_keys = scores[0].shape
    device = scores[0].device
    stacked = torch.stack([layer.to(device) for layer in scores], dim=1).flatten(1, 2)
    starts = None
    if start is not None:
        starts = start.to(device)[:, None].expand(batch, stacked.shape[1]).contiguous()
    selected = ops.select_kept(
        stacked, starts, total=totals, sinks=sinks, window=recent, backend=backend
    )
    layers = split_layers(selected, batch, num_heads)
    return [
        Kept(indices.to(x.device), offsets.to(x.device), (batch, num_heads, num_keys))
        for x, (indices, offsets) in zip(scores, layers, strict=True)
    ]


def split_layers(
    selected: ops.SelectKept, batch: int, num_heads: int
) -> list[tuple[Tensor, Tensor]]:
    """Split what was selected over the heads of all layers. Waits for the device, once.

    Parameters
    ----------
    selected : SelectKept
        Of rows [B, L * H, T], layer after layer.
    batch, num_heads : int
        B and H.

    Returns
    -------
    list of L tuples
        Indices and offsets of each layer, as ``Kept`` has them.
    """
    indices, offsets = selected
    counts = offsets.diff().view(batch, -1, num_heads)
    num_layers = counts.shape[1]
    bounds = offsets[::num_heads].tolist()  # of the layers in each row
    layers = []
    for layer in range(num_layers):
        rows = range(layer, batch * num_layers, num_layers)
        ends = counts[:, layer].flatten().cumsum(0, dtype=torch.int32)
        layers.append(
            (
                torch.cat([indices[bounds[i] : bounds[i + 1]] for i in rows]),
                functional.pad(ends, (1, 0)),
            )
        )
    return layers


def choose(
    under: Callable[[str, slice, Sequence[int]], list[Kept]],
    budget: str,
    totals: Sequence[int],
    lengths: Sequence[Sequence[int]],
    *,
    alike: bool,
) -> list[Kept]:
    """Choose pairs under any budget.

    Parameters
    ----------
    under : callable
        Chooses under a budget other than ``"layer"``, of a slice of the layers, so many pairs of a
        head in each row, as :func:`select` does.
    budget : str
        One of ``BUDGETS`` but ``"auto"``.
    totals : sequence of B ints
        Pairs that a head of each row keeps, on average over the heads that share a budget.
    lengths : sequence of L sequences of B ints
        Pairs that a head of each row has.
    alike : bool
        Whether the rows of a layer have to keep as many.

    Returns
    -------
    list of L Kept
    """
    if budget != "layer":
        return under(budget, slice(None), totals)
    each = _layer_totals(under("model", slice(None), totals), lengths, alike=alike)
    return [kept for i, own in enumerate(each) for kept in under("uniform", slice(i, i + 1), own)]


def _layer_totals(
    kept: Sequence[Kept], lengths: Sequence[Sequence[int]], *, alike: bool
) -> list[list[int]]:
    """Give each layer what its heads hold on average, rounded so that the sum stays.

    Parameters
    ----------
    kept : sequence of L Kept
        Chosen over all heads of all layers.
    lengths : sequence of L sequences of B ints
        Pairs that a head of each row has, at most as many as it may get.
    alike : bool
        Whether the rows of a layer are to keep as many; they have as many in all.

    Returns
    -------
    list of L lists of B ints
        Pairs of a head. A row keeps ``floor(its pairs / H)`` of them over all layers, and one in
        each layer at least. Waits for the device, once.
    """
    num_heads = kept[0].shape[1]
    device = kept[0].indices.device
    counts = torch.stack([each.counts().to(device) for each in kept]).sum(-1)  # [L, B]
    rows = counts.double().mean(1, keepdim=True) if alike else counts.double()
    columns = [
        _rounded([n / num_heads for n in column], [most[b] for most in lengths])
        for b, column in enumerate(rows.T.tolist())
    ]
    if alike:
        columns *= counts.shape[1]
    return [list(layer) for layer in zip(*columns, strict=True)]


def _rounded(wanted: Sequence[float], most: Sequence[int]) -> list[int]:
    """Round to whole numbers of at least 1 and the same sum, the largest fractions up."""
    floors = [max(int(n), 1) for n in wanted]
    left = int(sum(wanted) + 1e-6) - sum(floors)
    order = sorted(range(len(wanted)), key=lambda i: floors[i] - wanted[i])
    for i in order:
        if left > 0 and floors[i] < most[i]:
            floors[i] += 1
            left -= 1
    for i in reversed(order):  # where some had to be raised to 1
        if left < 0 and floors[i] > 1:
            down = min(-left, floors[i] - 1)
            floors[i] -= down
            left += down
    return floors


def without_padding(kept: Kept, start: Tensor | None, lengths: Iterable[int]) -> Kept:
    """Take padding out, which only heads of nothing else keep. Waits for the device if any do.

    Parameters
    ----------
    kept : Kept
    start : Tensor [B] or [B, H], int32, or None
        Padding at the left of each row or head.
    lengths : iterable of int
        Real pairs of each row or head.

    Returns
    -------
    Kept
    """
    if start is None or all(lengths):
        return kept
    device = kept.indices.device
    start = start.to(device).view(len(start), -1, 1)
    return Kept.from_mask(kept.mask() & (torch.arange(kept.shape[2], device=device) >= start))


@dataclass(frozen=True)
class Grown:
    """The scores of a layer whose heads, or rows, may hold different numbers of pairs.

    Attributes
    ----------
    scores : Tensor [B, H, L], float32
        Those of a shorter head stand at the right.
    start : Tensor [B, H], int32, or None
        Where each head begins; None: all are as long.
    lengths : list of B lists of H ints
        Pairs of each head.
    """

    scores: Tensor
    start: Tensor | None
    lengths: list[list[int]]


def select_grown(
    layers: Sequence[Grown],
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
    layers : sequence of L Grown
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

    def choose(scores: Tensor, start: Tensor | None, totals: list[int]) -> ops.SelectKept:
        rows = scores.shape[1]
        totals = [max(total, rows) for total in totals]
        return ops.select_kept(
            scores, start, total=totals, sinks=sinks, window=recent, backend=backend
        )

    if budget == "model":
        return _select_over_grown(layers, keep, choose)
    chosen = []
    for each in layers:
        batch, num_heads, longest = each.scores.shape
        if budget == "head":
            totals = [
                min(sum(row), k * len(row)) for row, k in zip(each.lengths, keep, strict=True)
            ]
            kept = Kept(*choose(each.scores, each.start, totals), (batch, num_heads, longest))
        else:
            totals = [min(n, k) for row, k in zip(each.lengths, keep, strict=True) for n in row]
            start = None if each.start is None else each.start.reshape(-1, 1)
            per_head = totals[0] if start is None and len(set(totals)) == 1 else None
            scores = each.scores.reshape(-1, 1, longest)
            kept = Kept(*choose(scores, start, totals), (batch, num_heads, longest), per_head)
        chosen.append(without_padding(kept, each.start, chain.from_iterable(each.lengths)))
    return chosen


def _select_over_grown(
    layers: Sequence[Grown], keep: Sequence[int], choose: Callable[..., ops.SelectKept]
) -> list[Kept]:
    """One threshold over the heads of all layers, which are brought to one length."""
    device = layers[0].scores.device
    longest = max(each.scores.shape[2] for each in layers)
    scores, starts = [], []
    batch, num_heads, _ = layers[0].scores.shape
    for each in layers:
        shift = longest - each.scores.shape[2]
        start = each.start
        if start is None:
            start = each.scores.new_zeros((batch, num_heads), dtype=torch.int32)
        scores.append(functional.pad(each.scores, (shift, 0)).to(device))
        starts.append((start + shift).to(device))
    rows = [[n for each in layers for n in each.lengths[b]] for b in range(len(keep))]
    totals = [min(sum(row), k * len(row)) for row, k in zip(rows, keep, strict=True)]
    selected = choose(torch.cat(scores, 1), torch.cat(starts, 1), totals)
    chosen = []
    split = split_layers(selected, batch, num_heads)
    for each, (indices, offsets) in zip(layers, split, strict=True):
        length, device = each.scores.shape[2], each.scores.device
        indices = (indices - (longest - length)).to(device)
        kept = Kept(indices, offsets.to(device), (batch, num_heads, length))
        chosen.append(without_padding(kept, each.start, chain.from_iterable(each.lengths)))
    return chosen

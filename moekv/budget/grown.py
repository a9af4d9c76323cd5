"""Selection in layers whose heads hold different numbers of pairs, as while decoding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from moekv import ops
from moekv.budget.kept import Kept, without_padding
from moekv.budget.selection import split_layers


@dataclass(frozen=True)
class Grown:
    """The scores of a layer whose heads, or rows, may hold different numbers of pairs.

    Attributes
    ----------
    scores : Tensor [B, H, L], float32
        Those of a shorter head are at the right.
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
    """Select the pairs to retain in layers that have grown.

    Parameters
    ----------
    layers : sequence of L Grown
    keep : sequence of B ints
        Pairs of a head in each row, on average over the heads that share a budget.
    budget : str
        ``"uniform"``: every head retains as many. ``"head"``: the heads of a layer share;
        ``"model"``: those of all layers.
    sinks, recent : int
        First and last pairs that every head retains, as far as its share allows.
    backend : str

    Returns
    -------
    list of L Kept
        In each row as many as `keep`, or all if there are fewer. A budget over the model waits
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

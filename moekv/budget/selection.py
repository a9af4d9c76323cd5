"""Selection in layers whose heads hold as many pairs, as after a prefill."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moekv import ops
from moekv.budget.kept import Kept


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
    """Select the pairs that the heads of some layers retain.

    Parameters
    ----------
    scores : sequence of L Tensor [B, H, T], float32
        On one scale, as far as the budget compares heads.
    start : Tensor [B], int32, or None
        Padding at the left of each row.
    totals : sequence of B ints
        Pairs that a head of each row retains, on average over the heads that share a budget.
    budget : str
        ``"uniform"``, ``"head"`` or ``"model"``.
    sinks, recent : int
        First and last real positions that every head retains, as far as the total allows.
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
    """Select the best pairs over all heads of some layers. Waits for the device, once.

    Parameters
    ----------
    scores : sequence of L Tensor [B, H, T], float32
        On one scale.
    start : Tensor [B], int32, or None
        Padding at the left of each row.
    totals : sequence of B ints
        Pairs that each row retains in all, at least one for each of its heads.
    sinks, recent : int
        First and last real positions that every head retains, as far as the total allows.
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

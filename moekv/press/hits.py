"""Cache hit rates: the share of observed attention on what each expert alone would retain."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from moekv.budget import Kept, kept_pairs, select
from moekv.experts.base import Expert
from moekv.experts.view import LayerView
from moekv.press.checks import check_count
from moekv.press.options import Options


def kept_alone(
    expert: Expert, lengths: Sequence[int], options: Options, gain: Fraction
) -> list[int]:
    """Count the pairs that an expert alone would retain in each row; `gain` are stored for one."""
    ratio = options.compression_ratio
    if options.policy == "mixture":
        return [kept_pairs(n, ratio, gain) for n in lengths]
    return [min(max(int(_own_count(expert, n, ratio) * gain), 1), max(n, 1)) for n in lengths]


def _own_count(expert: Expert, length: int, ratio: float) -> int:
    """Count the pairs of a head that an expert would retain of so many.

    Raises
    ------
    ValueError
        It does not give a number of pairs.
    """
    if not length:  # all of a row is padding
        return 1
    count = expert.kept(length, ratio)
    check_count(f"kept() of expert {expert.name!r}", count, 1)
    return count


def hit_rates(
    views: Sequence[LayerView],
    scores: Tensor,
    mass: Tensor,
    totals: Sequence[Sequence[int]],
    *,
    sinks: int,
    recent: int,
    backend: str,
) -> tuple[Tensor, Kept]:
    """Share of the observed attention on what each expert alone would retain.

    Parameters
    ----------
    views : sequence of L LayerView
        Of layers of equal sizes.
    scores : Tensor [E, L * B, H, T], float32
    mass : Tensor [L * B, H, T], float32
        The observed attention.
    totals : sequence of E sequences of B ints
        Pairs that each expert alone would retain in each row.
    sinks, recent : int
        Positions that are always retained.
    backend : str

    Returns
    -------
    rates : Tensor [E, L, B], float32, in [0, 1]
    kept : Kept
        What each expert alone would retain, in rows [E * L * B].
    """
    first, num_layers = views[0], len(views)
    num_experts, batch = len(scores), len(first.keys)
    num_heads, num_keys = scores.shape[2:]
    (kept,) = select(  # all experts of all layers at once, as further rows of the batch
        [scores.flatten(0, 1)],
        None if first.start is None else first.start.repeat(num_experts * num_layers),
        [total for rows in totals for total in num_layers * list(rows)],
        sinks=sinks,
        recent=recent,
        backend=backend,
    )
    mass = mass.flatten()  # for all experts
    if kept.per_head is not None:
        rows_of_all = num_layers * batch * num_heads
        begin = torch.arange(
            0, rows_of_all * num_keys, num_keys, dtype=torch.int32, device=mass.device
        )
        rows = kept.indices.view(num_experts, -1, kept.per_head) + begin[:, None]
        hits = mass.index_select(0, rows.flatten())
        hits = hits.view(num_experts, num_layers, batch, -1).sum(-1)
    else:
        sizes = [num_heads * total for rows in totals for _ in views for total in rows]
        parts = torch.split(mass.index_select(0, kept.rows() % len(mass)), sizes)
        hits = torch.stack([part.sum() for part in parts]).view(num_experts, num_layers, batch)
    return (hits / num_heads).clamp(max=1), kept

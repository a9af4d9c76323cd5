"""Reference of ``select_kept``."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from moekv.ops import checks
from moekv.ops.reference.common import widened
from moekv.ops.reference.precision import exact


@exact
def select_kept(
    scores: Tensor,
    start: Tensor | None = None,
    *,
    total: Sequence[int],
    sinks: int = 0,
    window: int = 0,
    floor: int = 1,
) -> tuple[Tensor, Tensor]:
    """Ascending positions of the pairs that each group of rows keeps, and where each row begins."""
    checks.select_kept(scores, start, total, sinks, window, floor)
    rows = scores.shape[1]
    if start is None:
        start = torch.zeros(scores.shape[:2], dtype=torch.int32, device=scores.device)
    indices = [scores.new_empty(0, dtype=torch.int32)]
    ends = [scores.new_zeros(1, dtype=torch.int32)]
    group = kept = 0
    for count, run in itertools.groupby(total):  # groups with equal totals at once
        groups = slice(group, group := group + len(list(run)))
        share = count // rows
        sink_share = min(sinks, share)
        kept_flat = _kept_of_groups(
            widened(scores[groups]),
            start[groups].long(),
            count,
            sink_share,
            min(window, share - sink_share),
            min(floor, share),
        )
        indices.append((kept_flat % scores.shape[2]).flatten().int())
        bounds = torch.arange(1, rows + 1, device=scores.device) * scores.shape[2]
        end = torch.searchsorted(kept_flat, bounds.expand(len(kept_flat), rows).contiguous())
        base = kept + count * torch.arange(len(kept_flat), device=scores.device)[:, None]
        ends.append((base + end).flatten().int())
        kept += count * len(kept_flat)
    return torch.cat(indices), torch.cat(ends)


def _kept_of_groups(
    scores: Tensor, start: Tensor, total: int, sinks: int, window: int, floor: int
) -> Tensor:
    """Ascending flat positions [groups, total] in the group's R * T."""
    num_keys = scores.shape[2]
    position = torch.arange(num_keys, device=scores.device)
    first = start.clamp(0, num_keys)[..., None]
    real = position >= first
    number = ~scores.isnan()
    value = torch.where(real & number & (scores != 0), scores, 0.0)  # -0 is +0
    tier = real * (1 + number.long())  # padding, NaN, number; above them: kept in any case

    always = real & ((position < first + sinks) | (position >= num_keys - window))
    in_row = _descending(torch.where(always, 3, tier), value)
    best = torch.zeros_like(always).scatter(-1, in_row[..., :floor], True)
    in_group = _descending(torch.where(always | best, 3, tier).flatten(1), value.flatten(1))
    return in_group[:, :total].sort(dim=-1).values


def _descending(tier: Tensor, value: Tensor) -> Tensor:
    """Order of the last dimension: higher tier, then higher value, then lower position."""
    by_value = value.sort(dim=-1, descending=True, stable=True).indices
    by_tier = tier.gather(-1, by_value).sort(dim=-1, descending=True, stable=True).indices
    return by_value.gather(-1, by_tier)

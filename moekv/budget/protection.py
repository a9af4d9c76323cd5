"""Prepares scores for the top-k of other code: finite, with protected positions first."""

import torch
from torch import Tensor


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

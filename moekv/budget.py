"""How many pairs stay, and which."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moekv import ops

BUDGETS = ("auto", "uniform", "head", "model")


def resolve_budget(name: str) -> str:
    """Say what a budget's name stands for.

    Parameters
    ----------
    name : str
        ``"uniform"``: every head keeps the same number; ``"auto"``: ``"uniform"``.

    Returns
    -------
    str
        ``"uniform"``

    Raises
    ------
    ValueError
        If the name is unknown.
    NotImplementedError
        For ``"head"`` and ``"model"``, which leave heads of different lengths.
    """
    if name not in BUDGETS:
        raise ValueError(f"expected budget among {', '.join(BUDGETS)}, got {name!r}")
    if name in ("head", "model"):
        raise NotImplementedError(
            f"budget={name!r} moves pairs between heads, which needs caches whose heads differ in "
            'length; this version has none yet: use budget="uniform"'
        )
    return "uniform"


def kept_pairs(length: int, compression_ratio: float) -> int:
    """Count the pairs of a head that stay: ``max(1, int(length * (1 - compression_ratio)))``.

    Parameters
    ----------
    length : int
        Real pairs, >= 0.
    compression_ratio : float
        Share to remove, in [0, 1).

    Returns
    -------
    int
        At least 1, so that no cache is ever emptied; what kvpress keeps.
    """
    return max(1, int(length * (1 - compression_ratio)))


def check_ratio(compression_ratio: float) -> None:
    """Raise ``ValueError`` unless a compression ratio is in [0, 1)."""
    if not 0 <= compression_ratio < 1:
        raise ValueError(
            f"expected compression_ratio in [0, 1), the share of pairs to remove, "
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


def select(
    scores: Tensor,
    start: Tensor | None,
    totals: Sequence[int],
    *,
    sinks: int,
    recent: int,
    backend: str,
) -> Tensor:
    """Choose the pairs that every head of a layer keeps.

    Parameters
    ----------
    scores : Tensor [B, H, T], float32
    start : Tensor [B], int32, or None
    totals : sequence of B ints
        Pairs that each head of a row keeps.
    sinks, recent : int
        First and last real positions that stay in any case, as far as the total allows.
    backend : str

    Returns
    -------
    Tensor [B, H, n], int32
        Ascending positions; flat, rows in order, where the rows' totals differ.
    """
    batch, num_heads, num_keys = scores.shape
    starts = None if start is None else start.repeat_interleave(num_heads)[:, None]
    indices = ops.select_kept(
        scores.reshape(-1, 1, num_keys),
        starts,
        total=[total for total in totals for _ in range(num_heads)],
        sinks=sinks,
        window=recent,
        backend=backend,
    ).indices
    return indices.view(batch, num_heads, -1) if len(set(totals)) == 1 else indices


def kept_mask(indices: Tensor, totals: Sequence[int], like: Tensor) -> Tensor:
    """Mark the kept positions in [B, H, T] bool; `totals` are those of the B rows."""
    batch, num_heads, num_keys = like.shape
    begin = torch.arange(batch * num_heads, device=like.device).view(batch, num_heads) * num_keys
    if indices.dim() == 3:
        positions = indices + begin[..., None]
    else:
        parts = [heads[:, None].expand(-1, n) for heads, n in zip(begin, totals, strict=True)]
        positions = indices + torch.cat([part.flatten() for part in parts])
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[positions.flatten()] = True
    return mask.view(like.shape)

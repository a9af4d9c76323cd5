"""The op ``select_kept``."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moekv.ops import checks
from moekv.ops.backends import implementation
from moekv.ops.registration import exportable, register


class SelectKept(NamedTuple):
    """Result of :func:`select_kept`."""

    indices: Tensor
    offsets: Tensor


exportable(SelectKept)


def select_kept(
    scores: Tensor,
    start: Tensor | None = None,
    *,
    total: int | Sequence[int],
    sinks: int = 0,
    window: int = 0,
    floor: int = 1,
    backend: str = "auto",
) -> SelectKept:
    """Choose the pairs to keep: exactly ``total`` of each group of rows that share a budget.

    Every row keeps its first ``sinks`` and last ``window`` real positions, then its best others
    until it has ``floor``; the rest of the total are the highest scores over all rows of the
    group. With ``c = total // R`` pairs per row, ``sinks`` is cut to ``c``, ``window`` to
    ``c - sinks`` and ``floor`` to ``c``. Ties go to the lower row, then the lower position; NaN is
    below every number, padding below NaN.

    Parameters
    ----------
    scores : Tensor [G, R, T], float32, float16 or bfloat16
        G groups of R rows: ``[B * H, 1, T]`` gives every head the same number, ``[B, H, T]`` one
        threshold over the heads of a layer, ``[B, L * H, T]`` over the heads of a model.
    start : Tensor [G, R], int32, optional
        Padding positions at the left of each row. None: no padding.
    total : int or sequence of G ints
        Pairs that each group keeps, R to R * T. One int holds for every group.
    sinks, window, floor : int
        See above.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``scores``.

    Returns
    -------
    SelectKept
        ``indices [sum(total)]`` int32: positions, ascending in each row, rows in order;
        ``offsets [G * R + 1]`` int32: where each row begins in ``indices``.

    Raises
    ------
    TypeError
        ``total`` is a float.
    ValueError
        ``backend`` is unknown, or ``scores`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.
    """
    op = implementation("select_kept", scores, backend)
    if isinstance(total, float):
        raise TypeError(f"moekv::select_kept: expected total as an int or ints, got {total!r}")
    totals = [total] * scores.shape[0] if isinstance(total, int) else list(total)
    return SelectKept(*op(scores, start, total=totals, sinks=sinks, window=window, floor=floor))


def _fake(
    scores: Tensor,
    start: Tensor | None = None,
    *,
    total: Sequence[int],
    sinks: int = 0,
    window: int = 0,
    floor: int = 1,
) -> tuple[Tensor, Tensor]:
    checks.native("select_kept", "scores", scores)
    checks.select_kept(scores, start, total, sinks, window, floor)
    groups, rows, _ = scores.shape
    return (
        scores.new_empty(sum(total), dtype=torch.int32),
        scores.new_empty(groups * rows + 1, dtype=torch.int32),
    )


register("select_kept", _fake)

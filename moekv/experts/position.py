"""Both ends of a row: what ``aggressive``, ``moderate`` and ``conservative`` have in common."""

from typing import Any

import torch
from torch import Tensor

from moekv.experts.base import Expert
from moekv.experts.view import LayerView


class PositionExpert(Expert):
    """Retains the beginning and the end.

    Alone, it retains exactly the first ``int(T * first)`` and the last ``int(T * last)`` positions
    (the first one where both are 0), whatever the compression ratio. In a mixture a position scores
    minus its distance from the nearer end, in units of the region's size: 0 at both ends, -1 at the
    regions' borders. So smaller budgets retain both ends in the same proportion.

    Parameters
    ----------
    name : str
    first, last : float
        Shares of the row, in [0, 1], at most 1 together.

    Raises
    ------
    ValueError
        If the shares are out of range.
    """

    finite = True
    waits = True

    def __init__(self, name: str, first: float, last: float) -> None:
        if not (first >= 0 and last >= 0 and first + last <= 1):
            raise ValueError(
                f"expected shares first, last >= 0 and at most 1 together, got {first} and {last}"
            )
        self.name, self.first, self.last = name, first, last
        self._rows: tuple[Any, Tensor] = (None, torch.empty(0))

    def regions(self, length: int) -> tuple[int, int]:
        """Sizes of the two regions of a row with `length` real pairs."""
        first, last = int(length * self.first), int(length * self.last)
        return (first, last) if first + last else (1, 0)

    def scores(self, view: LayerView) -> Tensor:
        """Score by the distance from the ends, see the class."""
        # Usually the same in every layer of a forward.
        key = view.lengths, view.keys.shape[2], view.keys.device
        known, rows = self._rows
        if known != key:
            rows = torch.stack([self._row(view, length) for length in view.lengths])
            self._rows = key, rows
        return rows[:, None].expand(view.keys.shape[:3])

    def _row(self, view: LayerView, length: int) -> Tensor:
        """Scores [T] of a row of `length` real pairs; from host numbers, so that nothing waits."""
        first, last = self.regions(length)
        num_keys = view.keys.shape[2]
        positions = torch.arange(length - num_keys, length, device=view.keys.device).float()
        # An empty region counts for no position.
        from_start = positions / first if first else torch.full_like(positions, torch.inf)
        from_end = (
            (length - 1 - positions) / last if last else torch.full_like(positions, torch.inf)
        )
        return -torch.minimum(from_start, from_end)

    def kept(self, length: int, compression_ratio: float) -> int:
        """Count the pairs of the two regions; the compression ratio does not matter."""
        return sum(self.regions(length))

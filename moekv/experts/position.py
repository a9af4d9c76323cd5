"""The experts ``aggressive``, ``moderate`` and ``conservative``: by position alone."""

from typing import Any

import torch
from torch import Tensor

from moekv.experts.base import Expert
from moekv.experts.view import LayerView


class PositionExpert(Expert):
    """Keeps the beginning and the end.

    Alone, it keeps exactly the first ``int(T * first)`` and the last ``int(T * last)`` positions
    (the first one where both are 0), whatever the compression ratio. In a mixture they score 0,
    and others minus their distance from the nearer of the two regions, as a share of T.

    Parameters
    ----------
    name : str
    first, last : float
        Shares of the row, in [0, 1], at most 1 together.
    prior : float

    Raises
    ------
    ValueError
        If the shares are out of range.
    """

    finite = True
    waits = True

    def __init__(self, name: str, first: float, last: float, prior: float = 1.0) -> None:
        if not (first >= 0 and last >= 0 and first + last <= 1):
            raise ValueError(
                f"expected shares first, last >= 0 and at most 1 together, got {first} and {last}"
            )
        self.name, self.first, self.last, self.prior = name, first, last, prior
        self._rows: tuple[Any, Tensor] = (None, torch.empty(0))

    def regions(self, length: int) -> tuple[int, int]:
        """Sizes of the two regions of a row with `length` real pairs."""
        first, last = int(length * self.first), int(length * self.last)
        return (first, last) if first + last else (1, 0)

    def scores(self, view: LayerView) -> Tensor:
        """Rate by the distance from the regions, see the class."""
        # The same in every layer of a forward, most likely.
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
        positions = torch.arange(length - num_keys, length, device=view.keys.device)
        nowhere = torch.full_like(positions, length)  # a region of no size attracts nothing
        after = (positions - first + 1).clamp(min=0) if first else nowhere
        before = (length - last - positions).clamp(min=0) if last else nowhere
        distance = torch.minimum(after, before)
        return -distance.float() / max(length, 1)

    def kept(self, length: int, compression_ratio: float) -> int:
        """Count the pairs of the two regions; the compression ratio has no say."""
        return sum(self.regions(length))

"""The router `topk_balanced`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moekv.routing.base import BaseMoERouter
from moekv.routing.losses import BALANCE_LOSSES


class TopKBalancedRouter(BaseMoERouter):
    """Top-k gating whose auxiliary loss sees the mean probabilities alone.

    Parameters
    ----------
    balance_mode : str
        `"entropy"`: `log E - H(P)`; `"variance"`: squared coefficient of variation of P; `"gini"`:
        Gini coefficient of P. Each is 0 where the experts are used alike.
    *args, **options
        As in `BaseMoERouter`.

    Raises
    ------
    ValueError
        If the balance mode is unknown.
    """

    def __init__(self, *args: Any, balance_mode: str = "entropy", **options: Any) -> None:
        super().__init__(*args, **options)
        if balance_mode not in BALANCE_LOSSES:
            raise ValueError(
                f"expected balance_mode among {', '.join(BALANCE_LOSSES)}, got {balance_mode!r}"
            )
        self.balance_mode = balance_mode

    def _balance_loss(self, mean_probs: Tensor, load: Tensor) -> Tensor:
        return BALANCE_LOSSES[self.balance_mode](mean_probs)

"""The router `topk_balanced`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moekv.routing.base import BaseMoERouter, Gate, probabilities
from moekv.routing.losses import BALANCE_LOSSES


class TopKBalancedRouter(BaseMoERouter):
    """Top-k gating biased towards experts that would be chosen least.

    The auxiliary loss is a measure of imbalance of the mean probabilities P alone. One step down
    that loss, `balance_weight * (mean_e dL/dP_e - dL/dP_e)` for each row, is the experts' selection
    bias: it moves the choice, not the weights (as in auxiliary-loss-free balancing). So the
    balancing acts without training.

    Parameters
    ----------
    balance_mode : str
        `"entropy"`: `log E - H(P)`; `"variance"`: squared coefficient of variation of P; `"gini"`:
        Gini coefficient of P. Each is 0 where the experts are used alike.
    balance_weight : float
        Probability per unit of the loss's gradient; >= 0.
    *args, **options
        As in `BaseMoERouter`.

    Raises
    ------
    ValueError
        If the balance mode is unknown, or the weight out of range.

    References
    ----------
    Wang et al., Auxiliary-Loss-Free Load Balancing, 2024 (selection bias).
    """

    def __init__(
        self,
        *args: Any,
        balance_mode: str = "entropy",
        balance_weight: float = 0.25,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if balance_mode not in BALANCE_LOSSES:
            raise ValueError(
                f"expected balance_mode among {', '.join(BALANCE_LOSSES)}, got {balance_mode!r}"
            )
        if not (balance_weight >= 0 and math.isfinite(balance_weight)):
            raise ValueError(f"expected a finite balance_weight >= 0, got {balance_weight}")
        self.balance_mode = balance_mode
        self.balance_weight = balance_weight

    def _choose(
        self, logits: Tensor, mask: Tensor | None, importance: Tensor | None, bias: Tensor | None
    ) -> Gate:
        probs = probabilities(logits, self.temperature, mask).detach()
        num_real = probs.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
        down = self._down(probs.sum(1) / num_real)
        return super()._choose(logits, mask, importance, down if bias is None else down + bias)

    def _down(self, mean_probs: Tensor) -> Tensor:
        """Take a step down the loss of each row [B, E]: a selection bias."""
        with torch.enable_grad():
            at = mean_probs.requires_grad_()
            loss = torch.stack([self._balance_loss(row, row) for row in at.unbind()]).sum()
            (gradient,) = torch.autograd.grad(loss, at)
        return self.balance_weight * (gradient.mean(-1, keepdim=True) - gradient)

    def _balance_loss(self, mean_probs: Tensor, load: Tensor) -> Tensor:
        return BALANCE_LOSSES[self.balance_mode](mean_probs)

"""The router `adaptive`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekv import ops
from moekv.routing.base import BaseMoERouter, ZeroLinear


class AdaptiveRouter(BaseMoERouter):
    """Top-k gating where important tokens are routed to more experts.

    A token of importance `i` is routed to `n = max(1, i * k)` experts; n is a real number, and slot
    `j` counts with `clamp(n - j, 0, 1)` before the weights are renormalised. The weights are
    continuous in the importance, and gradients reach it. `load` counts slots with a weight.

    The importance is `sigmoid(z + h v + c)`, where v and c (`importance_head`) start at zero and
    `z` is how much the token stands out: its cosine distance from the mean direction of the row's
    real tokens, standardised over the row. `z` needs no training, and scaling the hidden states
    does not change it. A lone token has importance 0.5.

    Parameters
    ----------
    *args, **options
        As in `BaseMoERouter`; `top_k` is the most experts of a token.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.importance_head = ZeroLinear(self.width, 1)

    def _rate(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # One op for the gate's projection, that of the importance, and what stands out.
        head, dtype = self.importance_head, hidden_states.dtype
        weight = torch.cat([self.gate.weight, head.weight]).to(dtype)
        projected, standout = ops.project_tokens(hidden_states, weight, mask, backend=self.backend)
        logits = projected[..., :-1] + (self.gate.bias + self.prior)
        importance = standout + (projected[..., -1] + head.bias)
        importance = importance.nan_to_num(nan=0.0).sigmoid()
        return logits, importance if mask is None else importance.masked_fill(~mask, 0.0)

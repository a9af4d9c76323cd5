"""An expert that every token consults, beside the routed ones."""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from moekv.routing.base import BaseMoERouter, RouterOutput, probabilities


class SharedExpertRouter(BaseMoERouter):
    """Gating with an expert that every token consults, and others that are routed as usual.

    The shared expert comes first and has half of the weight; the routed ones share the other half
    between them as in `BaseMoERouter`, whose loss is theirs alone.

    Parameters
    ----------
    hidden_size : int
        Size of the hidden states.
    num_experts : int
        E, the routed experts.
    top_k : int
        Routed experts per token.
    **options
        As in `BaseMoERouter`.

    References
    ----------
    Dai et al., DeepSeekMoE, ACL 2024 (shared expert isolation).
    """

    def _route(self, hidden_states: Tensor, mask: Tensor | None) -> RouterOutput:
        # The outputs count 1 + E experts and 1 + k slots.
        routed = super()._route(hidden_states, mask)
        shape = routed.weights.shape[:2]
        say = routed.weights.new_full((*shape, 1), 0.5)
        num_tokens = routed.load.new_full((1,), shape[0] * shape[1])
        if mask is not None:
            say = say * mask[..., None]
            num_tokens = mask.sum().view(1)
        return _SharedOutput(
            logits=routed.logits,
            weights=torch.cat([say, routed.weights / 2], -1),
            experts=F.pad(routed.experts + 1, (1, 0)),
            aux_loss=routed.aux_loss,
            load=torch.cat([num_tokens, routed.load]),
            # Of two halves, and of p in one of them: that of halves, and half of that of p.
            entropy=num_tokens[0] * math.log(2) + routed.entropy / 2,
            importance=routed.importance,
            mask=mask,
            temperature=self.temperature,
        )


class _SharedOutput(RouterOutput):
    """Of a `SharedExpertRouter`, whose logits are those of the routed experts."""

    @cached_property
    def probs(self) -> Tensor:
        routed = probabilities(self.logits, self.temperature, self.mask) / 2
        return torch.cat([routed.sum(-1, keepdim=True), routed], -1)

"""The router `hierarchical`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moekv.routing.base import BaseMoERouter, Gate, mean_over_tokens, probabilities
from moekv.routing.losses import switch_loss


def count_used(experts: Tensor, used: Tensor, num_experts: int) -> Tensor:
    """Count the used slots `[B, T, k]` of each expert; `[E]` int64."""
    load = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    return load.scatter_add_(0, experts.flatten().long(), used.flatten().long())


class HierarchicalRouter(BaseMoERouter):
    """Groups of experts first, then experts inside the chosen groups.

    A group's probability is the sum of its experts'. The `top_groups` best groups are kept, and the
    k best experts inside them are renormalised, ties to the lower group and expert. The
    auxiliary loss is the Switch loss of the groups plus that of the experts.

    Parameters
    ----------
    num_groups : int, optional
        Number of equal groups of neighbouring experts; divides `num_experts`. Default: the largest
        divisor that is not above its square root.
    top_groups : int, optional
        Groups per token. Default: as few as hold `top_k` experts.
    *args, **options
        As in `BaseMoERouter`.

    Raises
    ------
    ValueError
        If `num_groups` does not divide `num_experts`, or `top_groups` groups cannot hold `top_k`
        experts.

    References
    ----------
    DeepSeek-AI, DeepSeek-V2, 2024 (device-limited routing).
    """

    def __init__(
        self,
        *args: Any,
        num_groups: int | None = None,
        top_groups: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if num_groups is None:
            divisors = range(1, math.isqrt(self.num_experts) + 1)
            num_groups = max(n for n in divisors if self.num_experts % n == 0)
        if num_groups < 1 or self.num_experts % num_groups:
            raise ValueError(
                f"expected num_groups to divide num_experts = {self.num_experts}, got {num_groups}"
            )
        group_size = self.num_experts // num_groups
        fewest = -(-self.top_k // group_size)
        if top_groups is None:
            top_groups = fewest
        if not fewest <= top_groups <= num_groups:
            raise ValueError(
                f"expected top_groups between {fewest} and {num_groups} for {num_groups} groups of "
                f"{group_size} experts and top_k = {self.top_k}, got {top_groups}"
            )
        self.num_groups = num_groups
        self.top_groups = top_groups

    def _choose(
        self, logits: Tensor, mask: Tensor | None, importance: Tensor | None, bias: Tensor | None
    ) -> Gate:
        grouped = logits.float().view(*logits.shape[:2], self.num_groups, -1)
        # gating_topk divides by the temperature again, so that groups get the sum of probabilities.
        group_logits = self.temperature * (grouped / self.temperature).logsumexp(-1)
        _, groups, group_prob_sum, group_load, _ = self._gate(group_logits, mask, self.top_groups)
        groups = groups.long().sort(-1).values  # ascending, so that ties go to the lower expert
        group_size = self.num_experts // self.num_groups
        members = groups[..., None] * group_size + torch.arange(group_size, device=groups.device)
        members = members.flatten(-2)  # [B, T, top_groups * group_size]
        weights, slots, *_ = self._gate(logits.gather(-1, members), mask, self.top_k)
        experts = members.gather(-1, slots.long())
        used = torch.ones_like(experts) if mask is None else mask[..., None].expand_as(experts)
        load = count_used(experts, used, self.num_experts)
        probs = probabilities(logits, self.temperature, mask)
        balance_loss = switch_loss(
            mean_over_tokens(group_prob_sum, mask, logits), group_load
        ) + switch_loss(mean_over_tokens(probs.sum((0, 1)), mask, logits), load)
        entropy = torch.special.entr(probs.detach()).sum()
        return Gate(weights, experts.int(), load, entropy, balance_loss)

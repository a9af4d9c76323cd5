"""The router `eplb`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekv.routing.base import BaseMoERouter, Gate, mean_over_tokens, probabilities


class EPLBRouter(BaseMoERouter):
    """Gating with exactly balanced loads.

    Guarantee: within each row the loads of any two experts differ by at most 1, whatever the hidden
    states; the experts with the highest total probability (ties to the lower) take the remainder.
    Balance is per row because a row's routing must not depend on its batch.

    Algorithm: balanced top-k is an assignment problem, maximise the total probability of the chosen
    experts with k experts per token and a fixed load per expert. Its dual variables are one
    selection bias per expert. `balance_rounds` sweeps of coordinate descent set each expert's bias
    to where the wanted number of tokens would choose it. A final sweep assigns: expert after expert
    takes exactly its load of tokens, those first that have no other expert left, then those whose
    biased probability exceeds their best alternative by most. Where the biases have converged that
    is the optimum; where they have not, and where tokens are equal, the balance still holds. Equal
    tokens are taken in the order of the golden-ratio sequence of their position, so every expert
    gets tokens from all over the row.

    The bias moves the choice, not the weights. The auxiliary loss is the Switch loss of the choice
    without balancing: the imbalance that balancing had to correct.

    Parameters
    ----------
    balance_rounds : int
        Sweeps of the dual descent, >= 0. More sweeps cost time and gain total probability.
    *args, **options
        As in `BaseMoERouter`.

    Raises
    ------
    ValueError
        If `balance_rounds` is negative.

    References
    ----------
    Lewis et al., BASE Layers, ICML 2021 (balanced assignment); Wang et al., Auxiliary-Loss-Free
    Load Balancing, 2024 (selection bias).
    """

    def __init__(self, *args: Any, balance_rounds: int = 4, **options: Any) -> None:
        super().__init__(*args, **options)
        if balance_rounds < 0:
            raise ValueError(f"expected balance_rounds >= 0, got {balance_rounds}")
        self.balance_rounds = balance_rounds

    def _choose(
        self, logits: Tensor, mask: Tensor | None, importance: Tensor | None, bias: Tensor | None
    ) -> Gate:
        free = self._gate(logits, mask, self.top_k)
        balance_loss = self._balance_loss(mean_over_tokens(free.prob_sum, mask, logits), free.load)
        probs = probabilities(logits, self.temperature, mask)
        real = torch.ones_like(probs[..., 0], dtype=torch.bool) if mask is None else mask
        chosen = self._assign(probs.detach(), real)
        # Most probable first, ties to the lower expert; padding gets experts 0 ... k-1.
        ranked = probs.detach().masked_fill(~chosen, -1)
        experts = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        weights = probs.gather(-1, experts)
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total.where(total > 0, 1), 1 / self.top_k)
        weights = weights * real[..., None]
        load = chosen.sum((0, 1))
        return Gate(weights, experts.int(), load, free.entropy, balance_loss)

    def _assign(self, probs: Tensor, real: Tensor) -> Tensor:
        """Choose k experts for every real token with balanced loads; `[B, T, E]` bool."""
        if self.top_k == self.num_experts:
            return real[..., None].expand_as(probs)
        # In golden-ratio order every prefix of a row is spread over it, so stable sorts break ties
        # evenly: Weyl's sequence in exact integer arithmetic.
        position = real.long().cumsum(1) - 1
        order = (position * 2654435769 % 2**32).argsort(1)[..., None].expand_as(probs)
        probs = probs.gather(1, order)
        real = real.gather(1, order[..., 0])

        num_real = real.sum(1, keepdim=True)
        num_slots = num_real * self.top_k
        demand = probs.sum(1).argsort(dim=-1, descending=True, stable=True)
        takes_remainder = demand.argsort(-1) < num_slots % self.num_experts
        load = num_slots // self.num_experts + takes_remainder  # [B, E]

        bias = torch.zeros_like(probs[:, 0])
        for _ in range(self.balance_rounds):
            for e in range(self.num_experts):
                margin = self._margin(probs + bias[:, None], e).masked_fill(~real, -torch.inf)
                margin = margin.sort(dim=1, descending=True).values
                wanted = load[:, e : e + 1]
                last_in = margin.gather(1, (wanted - 1).clamp(min=0))
                first_out = margin.gather(1, torch.minimum(wanted, num_real - 1).clamp(min=0))
                bias[:, e : e + 1] -= (last_in + first_out) / 2

        biased = probs + bias[:, None]
        missing = self.top_k * real.long()
        rank = torch.arange(real.shape[1], device=real.device)
        chosen = torch.zeros_like(biased, dtype=torch.bool)
        for e in range(self.num_experts):
            # Loads that differ by at most 1 leave room for all tokens without an alternative, and
            # enough tokens that still miss an expert, so the balance cannot fail.
            margin = self._margin(biased, e)
            margin = margin.masked_fill(missing == self.num_experts - e, torch.inf)
            margin = margin.masked_fill(missing == 0, -torch.inf)
            first = margin.argsort(dim=1, descending=True, stable=True)
            takes = torch.zeros_like(real).scatter(1, first, rank < load[:, e : e + 1])
            chosen[..., e] = takes
            missing = missing - takes.long()
        return torch.zeros_like(chosen).scatter(1, order, chosen)

    def _margin(self, biased: Tensor, expert: int) -> Tensor:
        """How far the expert is above (or below) each token's k-th best other expert, `[B, T]`."""
        best = biased.topk(self.top_k + 1, dim=-1).values
        inside, outside = best[..., -2], best[..., -1]
        own = biased[..., expert]
        return own - torch.where(own >= inside, outside, inside)

"""Measurements: summed on the device, read when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HIT_RATE_DECAY = 0.9
"""Share of the old average that a call leaves in the moving average of the hit rates."""


@dataclass
class Observation:
    """What one rating of a layer measured. E experts, B rows, T cached pairs.

    Attributes
    ----------
    num_tokens : int
        Real tokens that were routed.
    load : Tensor [E], int64
        How often each expert was chosen.
    entropy : Tensor, scalar
        Sum over the real tokens of the entropy of the router's probabilities, in nats.
    aux_loss : Tensor, scalar
    shares : Tensor [B, T, E], float32
        How much of each position's score came from each expert: gate weights, 0 at padding.
    hit_rates : Tensor [E], float32
        Share of the window queries' attention that falls on what each expert alone would keep.
    """

    num_tokens: int
    load: Tensor
    entropy: Tensor
    aux_loss: Tensor
    shares: Tensor
    hit_rates: Tensor


class LayerStats:
    """Sums of one layer's observations.

    Parameters
    ----------
    num_experts : int
    device : torch.device
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.num_calls = 0
        self.num_tokens = 0

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.load = zeros(num_experts, dtype=torch.int64)
        self.entropy = zeros()
        self.aux_loss = zeros()
        self.share = zeros(num_experts)
        self.hit_rates = zeros(num_experts)
        self.ruled = zeros(num_experts)
        self.removed = zeros(num_experts)

    def observe(self, seen: Observation) -> None:
        """Add an observation."""
        self.load += seen.load
        self.entropy += seen.entropy
        self.aux_loss += seen.aux_loss
        self.share += seen.shares.sum((0, 1))
        decay = HIT_RATE_DECAY if self.num_calls else 0.0
        self.hit_rates = seen.hit_rates.lerp(self.hit_rates, decay)
        self.num_calls += 1
        self.num_tokens += seen.num_tokens

    def evict(self, shares: Tensor, kept: Tensor) -> None:
        """Add which pairs left.

        Parameters
        ----------
        shares : Tensor [B, T, E]
            Of the observation.
        kept : Tensor [B, T], float32
            Share of the heads which keep each position.
        """
        self.ruled += shares.sum((0, 1))
        self.removed += (shares * (1 - kept)[..., None]).sum((0, 1))

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """Read the sums: the one place where the device is waited for.

        Parameters
        ----------
        names : sequence of E str

        Returns
        -------
        dict
            ``router_stats`` and ``expert_compression_stats``, see ``MoERouterPress.get_stats``.
        """

        def per_expert(numbers: Tensor) -> dict[str, Any]:
            return dict(zip(names, numbers.tolist(), strict=True))

        return {
            "router_stats": {
                "expert_usage_ratios": per_expert(self.load / self.load.sum().clamp(min=1)),
                "expert_usage_count": per_expert(self.load),
                "total_tokens": self.num_tokens,
                "routing_decisions": int(self.load.sum()),
                "router_entropy": float(self.entropy) / max(self.num_tokens, 1),
            },
            "expert_compression_stats": {
                "expert_usage": per_expert(self.share / self.share.sum().clamp(min=1)),
                "compression_ratios": per_expert(self.removed / self.ruled),
                "cache_hit_rates": per_expert(self.hit_rates),
            },
        }

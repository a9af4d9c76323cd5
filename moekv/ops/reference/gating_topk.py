"""Reference of ``gating_topk``."""

import torch
from torch import Tensor

from moekv.ops import checks
from moekv.ops.reference.common import widened
from moekv.ops.reference.precision import exact

_FLOAT_MAX = torch.finfo(torch.float32).max


def gate_probs(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities [..., E] of the experts."""
    z = widened(logits)
    z = torch.where(z.isnan(), -torch.inf, z).clamp(max=_FLOAT_MAX)
    highest = z.detach().amax(-1, keepdim=True)
    z = torch.where(highest == -torch.inf, 0.0, (z - highest) / temperature)
    return z.softmax(-1)


def slot_counts(importance: Tensor, k: int) -> Tensor:
    """How much each of k slots counts [N, k]: the first one, and others as far as k i reaches."""
    slots = torch.arange(k, device=importance.device)
    counts = (k * importance.nan_to_num(nan=0.0)[:, None] - slots).clamp(0, 1)
    return counts.masked_fill(slots == 0, 1.0)


@exact
def gating_topk(
    logits: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    k: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Softmax, biased top-k and load statistics of a router; differentiable in ``logits``."""
    checks.gating_topk(logits, bias, mask, importance, k, temperature)
    num_tokens, num_experts = logits.shape
    probs = gate_probs(logits, temperature)
    rating = probs.detach()
    if bias is not None:
        rating = rating + torch.where(bias.isnan(), -torch.inf, bias)
    experts = rating.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    counts = torch.ones_like(probs[:, :k]) if importance is None else slot_counts(importance, k)
    chosen = probs.gather(-1, experts) * counts
    total = chosen.sum(-1, keepdim=True)
    even = counts / counts.sum(-1, keepdim=True)
    weights = torch.where(total > 0, chosen / torch.where(total > 0, total, 1.0), even)
    used = counts > 0
    if mask is not None:
        real = mask[:, None]
        weights = weights.masked_fill(~real, 0.0)
        experts = torch.where(real, experts, torch.arange(k, device=logits.device))
        probs = probs.masked_fill(~real, 0.0)
        used = used & real
    load = torch.zeros(num_experts, dtype=torch.int64, device=logits.device)
    load.scatter_add_(0, experts.flatten(), used.flatten().long())
    entropy = torch.special.entr(probs.detach()).sum()
    return weights, experts.int(), probs.sum(0), load, entropy

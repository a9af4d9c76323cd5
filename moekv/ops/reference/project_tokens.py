"""Reference of ``project_tokens``."""

import torch
from torch import Tensor
from torch.nn import functional

from moekv.ops import checks
from moekv.ops.reference.common import LEAST_NORM, widened
from moekv.ops.reference.precision import exact

_LEAST_SPREAD = 1e-4


@exact
def project_tokens(
    hidden_states: Tensor, weight: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Projections [B, T, P] of the hidden states, and how much each token stands out [B, T]."""
    checks.project_tokens(hidden_states, weight, mask)
    wide = widened(hidden_states)
    if mask is None:
        mask = torch.ones(wide.shape[:2], dtype=torch.bool, device=wide.device)
    wide = wide.masked_fill(~mask[..., None], 0.0)
    projected = wide @ widened(weight).T
    wide = wide.detach()
    directions = functional.normalize(wide, dim=-1, eps=LEAST_NORM)
    mean_direction = functional.normalize(directions.sum(1), dim=-1, eps=LEAST_NORM)
    distance = 1 - (directions @ mean_direction[..., None])[..., 0]
    num_real = mask.sum(1, keepdim=True).clamp(min=1)
    mean = distance.where(mask, 0.0).sum(1, keepdim=True) / num_real
    deviation = (distance - mean).where(mask, 0.0)
    std = (deviation.square().sum(1, keepdim=True) / num_real).sqrt()
    return projected, (deviation / (std + _LEAST_SPREAD)).where(mask, 0.0)

"""Reference of ``mix_scores``."""

import torch
from torch import Tensor

from moekv.ops import checks
from moekv.ops.reference.common import assert_on_cpu, widened
from moekv.ops.reference.precision import exact


@exact
def mix_scores(
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Sum [B, H, T] of the chosen experts' scores, each mapped to the common scale and weighted."""
    checks.mix_scores(scores, weights, experts, gain, offset)
    scores = widened(scores)
    shape = scores.shape[1:]
    if weights.dim() == 3:
        weights, experts = weights[:, None], experts[:, None]
    assert_on_cpu(
        ((experts >= 0) & (experts < len(scores))).all(),
        f"moekv::mix_scores: expected experts between 0 and {len(scores) - 1}",
    )
    mixed = scores.new_zeros(shape)
    for j in range(weights.shape[-1]):
        weight = weights[..., j]
        expert = experts[..., j].long().expand(shape)
        term = scores.gather(0, expert[None])[0]
        if gain is not None:
            term = term * gain.permute(1, 2, 0).gather(-1, expert)
        if offset is not None:
            term = term + offset.permute(1, 2, 0).gather(-1, expert)
        mixed = mixed + torch.where(weight == 0, 0.0, weight * term)
    return mixed

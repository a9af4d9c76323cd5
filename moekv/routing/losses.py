"""Auxiliary losses, which balance experts while gates are trained."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def switch_loss(mean_probs: Tensor, load: Tensor) -> Tensor:
    """Load-balancing loss of the Switch Transformer, `E * sum_e f_e P_e`; 1 at perfect balance.

    Parameters
    ----------
    mean_probs : Tensor
        `[E]`, P: the mean router probability of each expert.
    load : Tensor
        `[E]`, how often each expert was chosen; f is its share of the choices.

    References
    ----------
    Fedus et al., Switch Transformers, JMLR 2022, equation 4.
    """
    share = load / load.sum().clamp(min=1)
    return load.numel() * (share * mean_probs).sum()


def entropy_loss(mean_probs: Tensor) -> Tensor:
    """`log E` minus the entropy of the mean probabilities `[E]`: 0 at balance, at most `log E`."""
    entropy = -(mean_probs * mean_probs.clamp(min=torch.finfo(torch.float32).tiny).log()).sum()
    return math.log(mean_probs.numel()) - entropy


def variance_loss(mean_probs: Tensor) -> Tensor:
    """Squared coefficient of variation of the mean probabilities `[E]`: 0 at balance, below E.

    References
    ----------
    Shazeer et al., Outrageously Large Neural Networks, ICLR 2017, the importance loss.
    """
    num_experts = mean_probs.numel()
    return num_experts * (mean_probs - 1 / num_experts).square().sum()


def gini_loss(mean_probs: Tensor) -> Tensor:
    """Gini coefficient of the mean probabilities `[E]`: 0 at balance, at most `1 - 1 / E`."""
    differences = (mean_probs[:, None] - mean_probs[None, :]).abs()
    return differences.sum() / (2 * mean_probs.numel())


BALANCE_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": entropy_loss,
    "variance": variance_loss,
    "gini": gini_loss,
}

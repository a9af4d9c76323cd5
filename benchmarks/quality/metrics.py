"""How far an answer moved, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LEAST_KL = 1e-3
"""Nats per token; ratios of less would compare rounding."""


@dataclass
class Quality:
    """Quality of one answer.

    `kl` is the mean over answer tokens of KL(full cache || this cache), `nll` the mean negative
    log-likelihood of the reference answer, both in nats. `exact`: greedy decoding gives the
    reference answer, which is the case where every token is the most likely one behind the
    reference tokens before it.
    """

    kl: float
    nll: float
    exact: bool


def compare(logits: Tensor, full_logits: Tensor, answer: Tensor) -> Quality:
    """Compare logits `[A, vocabulary]` with those of the full cache, on answer tokens `[A]`."""
    log_probs, full = logits.log_softmax(-1), full_logits.log_softmax(-1)
    kl = (full.exp() * (full - log_probs)).sum(-1)
    nll = -log_probs.gather(-1, answer[:, None])
    exact = bool((logits.argmax(-1) == answer).all())
    return Quality(kl=kl.mean().item(), nll=nll.mean().item(), exact=exact)


@lru_cache(maxsize=32)
def draws(count: int, resamples: int, seed: int = 0) -> Tensor:
    """Draw samples with replacement: indices [resamples, count], the same for all callers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (resamples, count), generator=generator)


def bootstrap(
    values: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `values` over resamples of them."""
    if len(values) == 1:
        return values[0], values[0]
    data = torch.tensor(values, dtype=torch.float64)
    return middle(data[draws(len(data), resamples, seed)].mean(1))


def middle(values: Tensor) -> tuple[float, float]:
    """Give the 95 % percentile interval of `values`."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high

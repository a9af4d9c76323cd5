"""Evidence: logits of an untrained router, from the scores and hit rates of the experts.

An untrained router has no weights to choose by. It uses the experts themselves: how high each
scores a token compared with its other tokens (``wants``), and how much of the observed attention
falls on the pairs that each would retain (``trust``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 0.01
"""Lower bound of the missed share of attention; below it differences are noise."""


def standardise(scores: Tensor, real: Tensor | None) -> Tensor:
    """Bring every head's scores to mean 0 and standard deviation 1.

    Parameters
    ----------
    scores : Tensor [E, R, H, T], float32
        Finite or NaN, which does not count.
    real : Tensor [R, T], bool, or None
        Which pairs are real; None: all.

    Returns
    -------
    Tensor [E, R, H, T], float32
        -inf at padding and NaN, and wherever all scores of a head are equal.
    """
    counting = scores.nan_to_num(0.0, 0.0, 0.0)
    counted = counting == scores
    if real is not None:
        counted &= real[:, None]
        counting = counting.where(counted, 0.0)
    number = counted.sum(-1, keepdim=True).clamp_(min=1)
    deviation = (counting - counting.sum(-1, keepdim=True) / number).where(counted, 0.0)
    std = (deviation.square().sum(-1, keepdim=True) / number).sqrt_()
    # Equal numbers differ from their rounded mean by less than this.
    noise = 1e-6 * counting.abs().amax(-1, keepdim=True)
    return (deviation / std).where(counted & (std > noise), -torch.inf)


def is_silent(standardised: Tensor) -> Tensor:
    """Return the experts of which no score counts, in any row and head: [E], bool."""
    return (standardised == -torch.inf).flatten(1).all(1)


def wants(standardised: Tensor) -> Tensor:
    """Mean of each expert's standardised scores of a token over the heads.

    Parameters
    ----------
    standardised : Tensor [E, R, H, T], float32
        See :func:`standardise`.

    Returns
    -------
    Tensor [R, T, E], float32
        Heads whose scores do not count have 0.
    """
    return (
        standardised.clamp(min=-8.0).where(standardised > -torch.inf, 0.0).mean(2).permute(1, 2, 0)
    )


def trust(hit_rates: Tensor, kept: Sequence[float]) -> Tensor:
    """Minus the log of the attention that each expert misses, relative to chance.

    Parameters
    ----------
    hit_rates : Tensor [..., E], float32
        Share of the observed attention on what the expert would retain, in [0, 1].
    kept : sequence of E float
        Share of the pairs that each would retain, in [0, 1].

    Returns
    -------
    Tensor [..., E], float32
        With mean 0.
    """
    by_chance = [math.log(1 - share + FLOOR) for share in kept]
    logs = [
        chance - x
        for x, chance in zip((1 + FLOOR - hit_rates).log().unbind(-1), by_chance, strict=True)
    ]
    stacked = torch.stack(logs, -1)
    return stacked - stacked.mean(-1, keepdim=True)


def together(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate the rows of several batches; one batch is not copied."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))

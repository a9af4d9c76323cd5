"""What speaks for an expert at a token, beside the token's hidden state.

A router that nobody trained has no weights to choose by. What it has is what the experts themselves
say: how much each wants a token kept, more than its other tokens; and how far it has been right, by
the attention that queries were seen to pay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 0.01
"""Share of the attention that counts as missed in any case: below, differences are noise."""


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
        -inf at padding and NaN, and wherever all scores of a head are the same, which say nothing.
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
    """Return the experts of which nothing counts, in no row and no head: [E], bool."""
    return (standardised == -torch.inf).flatten(1).all(1)


def wants(standardised: Tensor) -> Tensor:
    """How much each expert wants each token kept: mean of its heads' standardised scores.

    Parameters
    ----------
    standardised : Tensor [E, R, H, T], float32
        See :func:`standardise`.

    Returns
    -------
    Tensor [R, T, E], float32
        Heads that say nothing count 0.
    """
    return (
        standardised.clamp(min=-8.0).where(standardised > -torch.inf, 0.0).mean(2).permute(1, 2, 0)
    )


def trust(hit_rates: Tensor, kept: Sequence[float]) -> Tensor:
    """How far each expert has been right: minus the log of what it misses, beside chance.

    Parameters
    ----------
    hit_rates : Tensor [..., E], float32
        Share of the observed attention on what the expert would keep, in [0, 1].
    kept : sequence of E float
        Share of the pairs that each would keep, in [0, 1].

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
    """Put the rows of several batches below each other; those of one stay where they are."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))

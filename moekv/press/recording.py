"""The record of a prefill: which pairs were retained, and which expert picked each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekv.budget import Kept
from moekv.press.commit import protected_in
from moekv.press.forward import Plan
from moekv.press.rater import Rater
from moekv.press.rating import Rating
from moekv.report.recording import LayerRecord, Recording
from moekv.routing.mixing import speakers


def recording_of(
    ratings: Sequence[Rating],
    kept: Sequence[Kept | None],
    num_bytes: Sequence[tuple[int, int]],
    plan: Plan,
) -> Recording:
    """Make the record of a prefill.

    Parameters
    ----------
    ratings : sequence of L Rating
        Of its layers.
    kept : sequence of L Kept or None
        The retained pairs; None: all.
    num_bytes : sequence of L tuple of int
        Before and after.
    plan : Plan
    """
    first = ratings[0]
    num_tokens = first.votes.shape[2]
    sinks, recent = protected_in(first, plan)
    voters = speakers([r.votes for r in ratings], plan.budget, [r.real for r in ratings])
    layers = [
        _layer(rating, chosen, voter, weights, plan.rater)
        for rating, chosen, voter, weights in zip(
            ratings, kept, voters, _weights(ratings), strict=True
        )
    ]
    return Recording(
        experts=tuple(plan.rater.names),
        budget=plan.budget,
        starts=[num_tokens - n for n in first.lengths],
        num_tokens=num_tokens,
        sinks=sinks,
        recent=recent,
        bytes_before=sum(before for before, _ in num_bytes),
        bytes_after=sum(after for _, after in num_bytes),
        layers=layers,
    )


def _weights(ratings: Sequence[Rating]) -> list[Tensor]:
    """Return the experts' weights [B, T, E] of each layer; some layers were rated together."""
    found: list[Tensor] = []
    while len(found) < len(ratings):
        found += ratings[len(found)].seen.shares.unbind()
    return found


def _layer(
    rating: Rating, kept: Kept | None, voter: Tensor, weights: Tensor, rater: Rater
) -> LayerRecord:
    mask = torch.ones_like(voter, dtype=torch.bool) if kept is None else kept.mask()
    if rating.real is not None:
        mask = mask & rating.real
    total = weights.sum(1)
    return LayerRecord(
        index=rating.index,
        kept=mask,
        speakers=_experts(voter, len(rating.votes.comparable), weights, rater),
        weights=total / total.sum(-1, keepdim=True).clamp(min=1e-9),
    )


def _experts(voter: Tensor, num_voters: int, weights: Tensor, rater: Rater) -> Tensor:
    """Return the expert of each pair's voter [B, H, T].

    A voter may be several experts: those of a calibrated router, or a dominant policy. Then it is
    the one with the highest weight [B, T, E] at the token.
    """
    num_together = len(rater.experts) - len(rater.routed)
    if num_voters == 1:
        together = weights
    elif num_voters == len(rater.routed):
        return voter + num_together
    else:
        together = weights[..., :num_together]
    leading = together.argmax(-1).to(torch.uint8)[:, None]
    return torch.where(voter == 0, leading, voter + (num_together - 1))

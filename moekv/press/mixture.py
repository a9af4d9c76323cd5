"""From experts' scores to votes: of the shared expert, of the routed ones, and of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moekv import ops
from moekv.calibration.router import CalibratedGate, CalibratedRouter
from moekv.experts.base import Expert
from moekv.experts.view import LayerView
from moekv.models.hooks import index_of
from moekv.press.routing import check_able
from moekv.routing.base import BaseMoERouter, RouterOutput
from moekv.routing.evidence import together, trust, wants

ROUTED_SHARE = 0.1
"""Share of the budget of the routed experts, beside a shared one.

Pairs that both pick count once, so a small share acts. A larger one was measured to lose on texts
that are hard for the routed experts (docs/results.md).
"""


@dataclass
class Part:
    """Scores and shares of E experts in L layers of equal sizes. V voters, R = L * B rows.

    Attributes
    ----------
    scores : Tensor [V, R, H, T], float32
        Of the voters. A voter is an expert, or several whose scores are mixed on one scale.
    shares : Tensor [V, R], float32
        Of the voters, which sum to 1.
    comparable : tuple of V bool
        See ``Votes``.
    weights : Tensor [R, T, E], float32
        Weight of each expert at each position; they sum to 1, and to 0 at padding.
    load : Tensor [L, E], int64
        How often each expert was chosen.
    entropy, aux_loss : Tensor [L], float32
        Of the gates, see ``RouterOutput``.
    has_shared : bool
        See ``Votes``.
    """

    scores: Tensor
    shares: Tensor
    comparable: tuple[bool, ...]
    weights: Tensor
    load: Tensor
    entropy: Tensor
    aux_loss: Tensor
    has_shared: bool = False


def beside(shared: Part, routed: Part) -> Part:
    """Join the shared part and the routed one."""
    share = ROUTED_SHARE
    num_tokens = shared.weights.sum((1, 2)).view(len(shared.load), -1).sum(-1)
    own = torch.special.entr(torch.tensor([share, 1 - share], device="cpu")).sum().item()
    return Part(
        scores=torch.cat([shared.scores, routed.scores]),
        shares=torch.cat([(1 - share) * shared.shares, share * routed.shares]),
        comparable=shared.comparable + routed.comparable,
        weights=torch.cat([(1 - share) * shared.weights, share * routed.weights], -1),
        load=torch.cat([shared.load, routed.load], -1),
        entropy=own * num_tokens + (1 - share) * shared.entropy + share * routed.entropy,
        aux_loss=shared.aux_loss + routed.aux_loss,
        has_shared=True,
    )


def after_silent(num_shared: int, routed: Part) -> Part:
    """Give shared experts that cannot score, as where a cache is compressed again, no share."""
    none = routed.load.new_zeros(len(routed.load), num_shared)
    routed.load = torch.cat([none, routed.load], -1)
    routed.weights = functional.pad(routed.weights, (num_shared, 0))
    return routed


def one_for_all(views: Sequence[LayerView], expert: Expert, scores: Tensor) -> Part:
    """Make the part of a shared expert, from its scores [1, R, H, T]."""
    view, num_layers = views[0], len(views)
    weights = view.real[..., None].float().repeat(num_layers, 1, 1)
    num_tokens = view.real.sum()
    nothing = scores.new_zeros(num_layers)
    return Part(
        scores=scores,
        shares=scores.new_ones(1, scores.shape[1]),
        comparable=(expert.comparable,),
        weights=weights,
        load=num_tokens.expand(num_layers, 1),
        entropy=nothing,
        aux_loss=nothing,
    )


def calibrated(
    views: Sequence[LayerView],
    router: CalibratedRouter,
    gates: Sequence[CalibratedGate],
    scores: Tensor,
    backend: str,
) -> Part:
    """Mix the scores [E, R, H, T] of a calibrated router's experts, which are on one scale."""
    view = views[0]
    given = [
        gate.decide(gate.logits(read), mask=each.token_mask)
        for gate, each in zip(gates, views, strict=True)
        if (read := each.read) is not None
    ]
    weights, chosen, shares = zip(
        *(_weights_of_pairs(view, router.experts, each) for each in given), strict=True
    )
    gain, offset = _scale(views, router, scores.device)
    mixed = ops.mix_scores(
        scores, together(weights), together(chosen), gain, offset, backend=backend
    )
    return Part(
        scores=mixed[None],
        shares=scores.new_ones(1, scores.shape[1]),
        comparable=(True,),
        weights=together(shares),
        load=torch.stack([each.load for each in given]),
        entropy=torch.stack([each.entropy for each in given]),
        aux_loss=torch.stack([each.aux_loss for each in given]),
    )


def routed(
    experts: Sequence[Expert],
    given: Sequence[RouterOutput],
    scores: Tensor,
    standardised: Tensor,
) -> Part:
    """Make voters of routed experts [E, R, H, T]: each ranks the pairs routed to it."""
    weights = together([each.shares for each in given])  # [R, T, E]
    mean = weights.sum(1) / weights.sum((1, 2)).clamp(min=1)[:, None]
    comparable = tuple(expert.comparable for expert in experts)
    own = [
        torch.where(each > -torch.inf, raw, each) if alike else each
        for raw, each, alike in zip(scores, standardised, comparable, strict=True)
    ]
    # Relative to the expert's mean weight, so that even gates change nothing.
    favour = (weights / mean[:, None]).log().nan_to_num(-torch.inf, None, -torch.inf)
    return Part(
        scores=torch.stack(own) + favour.permute(2, 0, 1)[:, :, None],
        shares=mean.mT.contiguous(),
        comparable=comparable,
        weights=weights,
        load=torch.stack([each.load for each in given]),
        entropy=torch.stack([each.entropy for each in given]),
        aux_loss=torch.stack([each.aux_loss for each in given]),
    )


def route(
    views: Sequence[LayerView],
    experts: Sequence[Expert],
    routers: Sequence[BaseMoERouter],
    rated: Sequence[tuple[Tensor, Tensor | None]],
    standardised: Tensor,
    hit_rates: Tensor,
    kept_shares: Sequence[float],
    *,
    goes_on: bool,
) -> list[RouterOutput]:
    """Route the tokens of each layer, by hidden states and by evidence.

    Parameters
    ----------
    views : sequence of L LayerView
    experts : sequence of E Expert
    routers : sequence of L BaseMoERouter
    rated : sequence of L tuples
        See ``BaseMoERouter.rate``.
    standardised : Tensor [E, R, H, T], float32
    hit_rates : Tensor [E, L, B], float32
    kept_shares : sequence of E float
        Share of the pairs that each expert alone would retain.
    goes_on : bool
        Whether the texts have been routed before, as in a growing cache.
    """
    view, num_layers = views[0], len(views)
    able = [expert.can_rate(view) for expert in experts]
    check_able(experts, any(able))
    rates = hit_rates.permute(1, 2, 0)  # [L, B, E]
    right = trust(rates, kept_shares)[:, :, None]
    wanted = wants(standardised)
    evidence = wanted.view(num_layers, -1, *wanted.shape[1:]) + right
    # No token is routed to an expert whose scores of a row are constant, or that cannot score.
    silent = (standardised == -torch.inf).flatten(2).all(-1)  # [E, R]
    evidence.masked_fill_(silent.mT.reshape(num_layers, -1, 1, len(experts)), -torch.inf)
    mask = None if view.start is None else view.real
    return [
        router.decide(*_of_pairs(each, *pair), mask, said, right, goes_on=goes_on)
        for router, each, pair, said, right in zip(
            routers, views, rated, evidence, rates, strict=True
        )
    ]


def _of_pairs(
    view: LayerView, logits: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Give pairs the logits and importance of their tokens; unknown ones get the known's mean."""
    if view.aligned:
        return logits, importance
    mask = view.token_mask
    num_keys = view.keys.shape[2]
    logits = _mean(logits.float(), mask).repeat_interleave(view.folded, 0)
    logits = logits[:, None].expand(-1, num_keys, -1)
    if importance is not None:
        importance = _mean(importance[..., None], mask).repeat_interleave(view.folded, 0)
        importance = importance.expand(-1, num_keys).contiguous()
    return logits, importance


def _mean(numbers: Tensor, mask: Tensor | None) -> Tensor:
    """Mean [B, E] over the real of N tokens [B, N, E]."""
    if mask is None:
        return numbers.mean(1)
    real = mask[..., None]
    return numbers.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)


def _weights_of_pairs(
    view: LayerView, experts: Sequence[Expert], given: RouterOutput
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate weights and experts [B, T, k] of the pairs, and each expert's share [B, T, E]."""
    if view.aligned:
        return given.weights, given.experts, given.shares
    # Not every pair's token is known: all get the mean weights of the known ones.
    able = [expert.can_rate(view) for expert in experts]
    check_able(experts, any(able))
    total = given.shares.sum(1, keepdim=True).repeat_interleave(view.folded, 0)
    # A little for all experts that can score, in case that no token chose one of them.
    total = total + 1e-6
    for index, can in enumerate(able):
        if not can:
            total[..., index].zero_()
    shares = (total / total.sum(-1, keepdim=True)) * view.real[..., None]
    chosen = torch.arange(len(able), dtype=torch.int32, device=total.device)
    return shares.contiguous(), chosen.expand(shares.shape).contiguous(), shares


def _scale(
    views: Sequence[LayerView], router: CalibratedRouter, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Affine maps [E, R, H] of a calibrated router's experts to its scale: gain, offset."""
    view = views[0]
    gain, offset = router.scale([index_of(each.module) for each in views], device)  # [E, L, H]
    if view.folded > 1:
        return gain[:, 0, view.heads], offset[:, 0, view.heads]
    batch = len(view.keys)
    if batch > 1:
        gain, offset = gain.repeat_interleave(batch, 1), offset.repeat_interleave(batch, 1)
    return gain, offset

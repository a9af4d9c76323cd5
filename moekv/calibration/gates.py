"""Training of the gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekv import ops
from moekv.calibration.config import CalibrationConfig
from moekv.calibration.oracle import Reading
from moekv.calibration.ridge import Fit, Sample, fit_of
from moekv.calibration.router import CalibratedRouter
from moekv.routing.losses import entropy_loss

_PATIENCE = 4  # epochs without a better loss, after which training stops

_SOFT = 0.4  # temperature of the choice in training, in units of log-attention

SHARES = (0.5, 0.25, 0.1)
"""Shares of the pairs to retain, at which a ranking is evaluated."""

COMPARABLE_WEIGHT = 0.5
"""Weight of comparable experts' scores in the target of the gates, beside the oracle's."""


@dataclass
class Estimates:
    """Training data of the gates: some tokens of one text. E experts, ``learned`` first."""

    hidden: Tensor  # [L, N, width], see `Reading`
    scores: Tensor  # [L, E, H, N], on the common scale
    target: Tensor  # [L, H, N], see estimate()


def estimate(router: CalibratedRouter, reading: Reading, fit: Fit | None = None) -> Estimates:
    """Compute the estimates of a router's experts for a reading.

    Parameters
    ----------
    router : CalibratedRouter
    reading : Reading
    fit : Fit, optional
        Instead of the router's.

    Returns
    -------
    Estimates
        Their target is the oracle's, and ``COMPARABLE_WEIGHT`` times the scores of comparable
        experts: the oracle reads the text in order, and later questions may attend otherwise.
    """
    weight, place, novelty, bias = fit or fit_of(router)
    learned = weight @ reading.hidden.float().mT + place @ reading.where.t()
    learned += novelty[..., None] * reading.novelty + bias[..., None]
    scores = torch.cat([learned[:, None], reading.scores], dim=1)
    scores = router.gain[..., None] * scores + router.offset[..., None]
    target = reading.target.clone()
    for number, expert in enumerate(router.experts[1:], 1):
        if expert.comparable:
            target += COMPARABLE_WEIGHT * scores[:, number]
    return Estimates(reading.hidden, scores, target)


class Mixture(nn.Module):
    """The gates of all layers, differentiable: computes what the press does.

    Inside, hidden states have mean square 1 in every channel, so that one learning rate fits all.

    Parameters
    ----------
    router : CalibratedRouter
        Initial values.
    spread : Tensor [L, hidden]
        Of the hidden states.
    """

    def __init__(self, router: CalibratedRouter, spread: Tensor) -> None:
        super().__init__()
        self.top_k, self.spread = router.top_k, spread
        self.weight = nn.Parameter(router.gate_weight * spread[:, None])
        self.bias = nn.Parameter(router.gate_bias.clone())

    def forward(self, given: Estimates) -> tuple[Tensor, Tensor]:
        """Mix the scores of N tokens.

        Parameters
        ----------
        given : Estimates

        Returns
        -------
        mixed : Tensor [L, H, N]
        balance_loss : Tensor, scalar
            Mean over layers.
        """
        logits = (given.hidden.float() / self.spread[:, None]) @ self.weight.mT
        logits = logits + self.bias[:, None]
        routed = ops.gating_topk(logits.flatten(0, 1), k=self.top_k)
        gates = torch.zeros_like(logits.flatten(0, 1))
        gates = gates.scatter(-1, routed.experts.long(), routed.weights).view_as(logits)
        mixed = torch.einsum("lne,lehn->lhn", gates, given.scores)
        balance = torch.stack([entropy_loss(p) for p in logits.softmax(-1).mean(1)]).mean()
        return mixed, balance

    @torch.no_grad()
    def hand_over(self, router: CalibratedRouter) -> None:
        """Copy the trained weights into a router."""
        router.gate_weight.copy_(self.weight / self.spread[:, None])
        router.gate_bias.copy_(self.bias)


def choice_loss(mixed: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the pairs that a budget retains: the training loss.

    Parameters
    ----------
    mixed, target : Tensor
        Of one shape.

    Returns
    -------
    Tensor, scalar
        Mean over the pairs, and over the shares of :func:`ranking_loss`: how well a threshold for
        that share separates the pairs that the target would retain.
    """
    mixed, target = mixed.flatten(), target.flatten()
    losses = []
    for share in SHARES:
        rank = max(int(len(target) * (1 - share)), 1)
        wanted = (target > target.kthvalue(rank).values).float()
        margin = (mixed - mixed.detach().kthvalue(rank).values) / _SOFT
        losses.append(nn.functional.binary_cross_entropy_with_logits(margin, wanted))
    return torch.stack(losses).mean()


def ranking_loss(predicted: Tensor, target: Tensor) -> float:
    """Share of the target's choice that a prediction misses, under one threshold over all heads.

    Parameters
    ----------
    predicted, target : Tensor
        Of one shape.

    Returns
    -------
    float
        Mean over the ``SHARES``; in [0, 1].
    """
    predicted, target = predicted.flatten(), target.flatten()
    missed = []
    for share in SHARES:
        count = max(int(len(target) * share), 1)
        wanted = torch.zeros_like(target, dtype=torch.bool)
        wanted[target.topk(count).indices] = True
        missed.append(1 - wanted[predicted.topk(count).indices].float().mean())
    return float(torch.stack(missed).mean())


def train_gates(
    sample: Sample,
    fits: Sequence[Fit],
    router: CalibratedRouter,
    config: CalibrationConfig,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> list[dict[str, float]]:
    """Train the gates, from what :func:`set_experts` set, and keep the best epoch's.

    Parameters
    ----------
    sample : Sample
    fits : sequence of Fit
        ``learned`` without each domain, see :class:`Solved`.
    router : CalibratedRouter
        Changed in place.
    config : CalibrationConfig
    report : callable, optional
        Gets each epoch and its held-out ranking loss.

    Returns
    -------
    list of dict
        For each epoch, from 0 (before training): ``ranking_loss`` of the held-out texts, and
        ``choice_loss``, the training loss, on the sample. Both depend on the targets of
        :func:`estimate`, and so on the experts.
    """
    given = [
        estimate(router, reading, fits[domain])
        for reading, domain in zip(sample.readings, sample.domains, strict=True)
    ]
    judged = [estimate(router, reading) for reading in sample.held_out or sample.readings]
    square = sum(x.hidden.float().square().sum(1) for x in given)
    count = sum(x.hidden.shape[1] for x in given)
    mixture = Mixture(router, (square / count).sqrt().clamp(min=1e-6))  # type: ignore[union-attr]
    optimiser = torch.optim.AdamW(mixture.parameters(), lr=config.learning_rate, weight_decay=0.01)
    steps = math.ceil(len(given) / config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(config.epochs * steps, 1))
    generator = torch.Generator().manual_seed(config.seed)

    @torch.no_grad()
    def judge() -> float:
        losses = [ranking_loss(mixture(x)[0], x.target) for x in judged]
        return sum(losses) / len(losses)

    with torch.no_grad():
        start = sum(float(choice_loss(mixture(x)[0], x.target)) for x in given) / len(given)
    curve = [{"epoch": 0.0, "ranking_loss": judge(), "choice_loss": start}]
    best, since = curve[0]["ranking_loss"], 0
    report(0, best)
    for epoch in range(1, config.epochs + 1):
        order = torch.randperm(len(given), generator=generator).tolist()
        total = 0.0
        for step in range(steps):
            batch = order[step * config.batch : (step + 1) * config.batch]
            optimiser.zero_grad()
            for number in batch:
                mixed, balance = mixture(given[number])
                missed = choice_loss(mixed, given[number].target)
                ((missed + config.aux_loss_weight * balance) / len(batch)).backward()
                total += float(missed.detach()) / len(given)
            optimiser.step()
            schedule.step()
        curve.append({"epoch": float(epoch), "ranking_loss": judge(), "choice_loss": total})
        report(epoch, curve[-1]["ranking_loss"])
        if curve[-1]["ranking_loss"] < best:
            best, since = curve[-1]["ranking_loss"], 0
            mixture.hand_over(router)
        else:
            since += 1
            if since == _PATIENCE:
                break
    return curve

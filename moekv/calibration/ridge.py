"""The regression that makes the expert ``learned``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moekv.calibration.oracle import Reading
from moekv.calibration.router import CalibratedRouter

PLACES = 3
"""Numbers of ``places``."""


def num_features(router: CalibratedRouter) -> int:
    """Return the width F of :func:`features`."""
    return router.width + PLACES + len(router.experts) * router.num_kv_heads + 1


def features(reading: Reading, layer: int) -> Tensor:
    """Regression's features [T, F] of a layer: hidden state, place, then novelty and scores, 1.

    The latter of all heads.
    """
    hidden = reading.hidden[layer].float()
    heads = torch.cat([reading.novelty[layer], *reading.scores[layer]]).t()
    return torch.cat([hidden, reading.where, heads, hidden.new_ones(len(hidden), 1)], dim=1)


@dataclass
class Sample:
    """Readings of some tokens of each text, to train and evaluate the gates."""

    readings: list[Reading] = field(default_factory=list)
    domains: list[int] = field(default_factory=list)  # of each reading
    held_out: list[Reading] = field(default_factory=list)

    @classmethod
    def join(cls, parts: Sequence[Sample]) -> Sample:
        """Join the samples of groups of layers, and free these."""
        joined = cls(domains=parts[0].domains)
        for name in ("readings", "held_out"):
            for _ in range(len(getattr(parts[0], name))):
                group = [getattr(part, name).pop(0) for part in parts]
                getattr(joined, name).append(Reading.join(group))
        return joined


@dataclass
class Sums:
    """Normal equations of L layers for each of D domains, and a sample of the tokens."""

    gram: Tensor  # [D, L, F, F] float32
    moment: Tensor  # [D, L, F, H] float32
    num_texts: int = 0
    sample: Sample = field(default_factory=Sample)

    @classmethod
    def empty(cls, router: CalibratedRouter, num_layers: int, num_domains: int) -> Sums:
        """Make sums of no texts."""
        width, num_heads = num_features(router), router.num_kv_heads
        gram = torch.zeros(num_domains, num_layers, width, width)
        return cls(gram, torch.zeros(num_domains, num_layers, width, num_heads))

    def add(self, reading: Reading, domain: int) -> None:
        """Add a reading to the normal equations of its domain."""
        for row in range(self.gram.shape[1]):
            x = features(reading, row)
            self.gram[domain, row] += x.t() @ x
            self.moment[domain, row] += x.t() @ reading.target[row].t()

    def total(self, row: int, without: int | None = None) -> tuple[Tensor, Tensor]:
        """Sum a layer's equations over all domains but one: gram [F, F], moment [F, H], float64.

        Over all of them if there is only one.
        """
        kept = [i for i in range(len(self.gram)) if i != without and self.gram[i, row, -1, -1] > 0]
        if not kept:
            return self.total(row)
        gram, moment = (x[kept[0], row].double() for x in (self.gram, self.moment))
        for domain in kept[1:]:
            gram += self.gram[domain, row]
            moment += self.moment[domain, row]
        return gram, moment


Fit = tuple[Tensor, Tensor, Tensor, Tensor]
"""Parameters of ``learned``: weight [L, H, hidden], place [L, H, 3], novelty and bias [L, H]."""


def solve_ridge(gram: Tensor, moment: Tensor, width: int, strength: float) -> Fit:
    """Fit ``learned`` in one layer: ridge regression of the targets, head by head.

    Parameters
    ----------
    gram, moment : Tensor
        See :meth:`Sums.total`.
    width : int
        Of what is read of a token, see ``CalibratedRouter.width``.
    strength : float

    Returns
    -------
    Fit
        In float32, without the dimension of layers.
    """
    end = width + PLACES
    rows = []
    for head in range(moment.shape[1]):
        index = torch.tensor([*range(end), end + head, len(gram) - 1])
        own = gram[index][:, index]
        penalty = strength * own.diagonal()
        penalty[own.diagonal() == 0] = 1  # as of experts that no token was sent to: no weight
        penalty[width:-1] *= 1e-3  # a few numbers, known well; rotations do not mix them
        penalty[-1] = 0
        own.diagonal().add_(penalty)
        rows.append(torch.linalg.solve(own, moment[index, head]))
    solved = torch.stack(rows).float()
    return solved[:, :width], solved[:, width:end], solved[:, -2], solved[:, -1]


@dataclass
class Solved:
    """Solutions of the normal equations of L layers. H heads, E experts."""

    fit: Fit
    without: list[Fit]  # one for each domain, fitted to all others
    gain: Tensor  # [L, E - 1, H], of the experts beside ``learned``: least squares of each head
    offset: Tensor  # [L, E - 1, H]
    gap: Tensor  # [L, E - 1, H], how far the mean target is above the mean score

    @classmethod
    def join(cls, parts: Sequence[Solved]) -> Solved:
        """Join layers, or groups of them."""
        return cls(
            _join_fits([part.fit for part in parts]),
            [_join_fits(fits) for fits in zip(*(part.without for part in parts), strict=True)],
            *(torch.cat([getattr(x, name) for x in parts]) for name in ("gain", "offset", "gap")),
        )


def _join_fits(fits: Sequence[Fit]) -> Fit:
    weight, place, novelty, bias = (torch.cat(parts) for parts in zip(*fits, strict=True))
    return weight, place, novelty, bias


def solve(sums: Sums, router: CalibratedRouter, strength: float) -> Solved:
    """Solve the normal equations, a layer at a time, as float64 copies take memory.

    Parameters
    ----------
    sums : Sums
        Of some of the router's layers.
    router : CalibratedRouter
        Its sizes and experts are those of the sums.
    strength : float
        Of the ridge.

    Returns
    -------
    Solved
    """

    def fit(gram: Tensor, moment: Tensor) -> Fit:
        weight, place, novelty, bias = solve_ridge(gram, moment, router.width, strength)
        return weight[None], place[None], novelty[None], bias[None]

    def of_layer(row: int) -> Solved:
        gram, moment = sums.total(row)
        heads, others = router.num_kv_heads, len(router.experts) - 1
        count, wanted = gram[-1, -1], moment[-1] / gram[-1, -1]  # [H], means
        gain, offset, gap = torch.zeros(3, 1, others, heads, dtype=gram.dtype)
        for number in range(others):
            own = router.width + PLACES + (number + 1) * heads + torch.arange(heads)
            mean = gram[own, -1] / count
            square = gram[own, own] / count - mean.square()
            product = moment[own, torch.arange(heads)] / count - mean * wanted
            gain[0, number] = product / square.clamp(min=1e-12)
            offset[0, number] = wanted - gain[0, number] * mean
            gap[0, number] = wanted - mean
        return Solved(
            fit(gram, moment),
            [fit(*sums.total(row, domain)) for domain in range(len(sums.gram))],
            *(gain, offset, gap),
        )

    return Solved.join([of_layer(row) for row in range(sums.gram.shape[1])])


def fit_of(router: CalibratedRouter) -> Fit:
    """Return a router's own values for :func:`solve_ridge`."""
    return (
        router.surrogate_weight,
        router.surrogate_place,
        router.surrogate_novelty,
        router.surrogate_bias,
    )


def set_experts(router: CalibratedRouter, solved: Solved) -> None:
    """Set the experts of a router: ``learned``, and the maps of the others to its scale.

    Comparable scores are moved by one number for the whole model. Of others each head's are brought
    to the scale by least squares.
    """
    for parameter, found in zip(fit_of(router), solved.fit, strict=True):
        parameter.copy_(found)
    for number, expert in enumerate(router.experts[1:]):
        gain, offset = solved.gain[:, number], solved.offset[:, number]
        if expert.comparable:
            gap = solved.gap[:, number]
            gain, offset = torch.ones_like(gap), gap.mean().expand_as(gap)
        router.gain[:, number + 1] = gain.float()
        router.offset[:, number + 1] = offset.float()

"""The regression that makes the expert ``learned``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moekv.calibration.oracle import Reading
from moekv.calibration.router import CalibratedRouter

PLACES = 3
"""Numbers of ``places``."""


def features(reading: Reading, layer: int) -> Tensor:
    """Regression's features [T, F] of a layer: hidden state, place, then novelty and scores, 1.

    The latter of all heads.
    """
    hidden = reading.hidden[layer].float()
    heads = torch.cat([reading.novelty[layer], *reading.scores[layer]]).t()
    return torch.cat([hidden, reading.where, heads, hidden.new_ones(len(hidden), 1)], dim=1)


@dataclass
class Sums:
    """Normal equations of all layers, and a sample of the tokens: all that outlives a text.

    The equations are those of each of D domains. ``domains`` says of which each sample is.
    """

    gram: Tensor  # [D, L, F, F] float32
    moment: Tensor  # [D, L, F, H] float32
    num_texts: int = 0
    sample: list[Reading] = field(default_factory=list)
    domains: list[int] = field(default_factory=list)
    held_out: list[Reading] = field(default_factory=list)

    @classmethod
    def empty(cls, router: CalibratedRouter, num_domains: int) -> Sums:
        """Begin with nothing."""
        num_layers, num_heads = len(router.layers), router.num_kv_heads
        width = router.hidden_size + PLACES + len(router.experts) * num_heads + 1
        gram = torch.zeros(num_domains, num_layers, width, width)
        return cls(gram, torch.zeros(num_domains, num_layers, width, num_heads))

    def add(self, reading: Reading, domain: int) -> None:
        """Add a reading to the normal equations of its domain."""
        for row in range(self.gram.shape[1]):
            x = features(reading, row)
            self.gram[domain, row] += x.t() @ x
            self.moment[domain, row] += x.t() @ reading.target[row].t()

    def total(self, without: int | None = None) -> tuple[Tensor, Tensor]:
        """Sum the equations of all domains but one, in float64: gram [L, F, F], moment [L, F, H].

        All of them where there is no other.
        """
        kept = [i for i in range(len(self.gram)) if i != without and self.gram[i, 0, -1, -1] > 0]
        if not kept:
            return self.total()
        return self.gram[kept].double().sum(0), self.moment[kept].double().sum(0)


Fit = tuple[Tensor, Tensor, Tensor, Tensor]
"""What ``learned`` is: weight [L, H, hidden], place [L, H, 3], novelty and bias [L, H]."""


def solve_ridge(gram: Tensor, moment: Tensor, hidden_size: int, strength: float) -> Fit:
    """Fit ``learned``: ridge regression of the targets, head by head.

    Parameters
    ----------
    gram, moment : Tensor
        See :meth:`Sums.total`.
    hidden_size : int
    strength : float

    Returns
    -------
    Fit
        In float32.
    """
    end = hidden_size + PLACES
    rows = []
    for head in range(moment.shape[2]):
        index = torch.tensor([*range(end), end + head, gram.shape[1] - 1])
        own = gram[:, index][:, :, index]
        penalty = strength * own.diagonal(dim1=1, dim2=2)
        penalty[:, hidden_size:-1] *= 1e-3  # a few numbers, known well; rotations do not mix them
        penalty[:, -1] = 0
        wanted = moment[:, index, head : head + 1]
        rows.append(torch.linalg.solve(own + torch.diag_embed(penalty), wanted)[..., 0])
    solved = torch.stack(rows, dim=1).float()
    return solved[..., :hidden_size], solved[..., hidden_size:end], solved[..., -2], solved[..., -1]


def fit_of(router: CalibratedRouter) -> Fit:
    """Give what a router has of :func:`solve_ridge`."""
    return (
        router.surrogate_weight,
        router.surrogate_place,
        router.surrogate_novelty,
        router.surrogate_bias,
    )


def fit_ridge(sums: Sums, router: CalibratedRouter, strength: float) -> None:
    """Set the experts: ``learned`` by ridge regression, and the maps of the others to its scale.

    Comparable scores are moved by one number for the whole model. Of others each head's are brought
    to the scale by least squares.
    """
    gram, moment = sums.total()
    fit = solve_ridge(gram, moment, router.hidden_size, strength)
    for parameter, found in zip(fit_of(router), fit, strict=True):
        parameter.copy_(found)
    count, heads = gram[0, -1, -1], router.num_kv_heads
    wanted = moment[:, -1] / count  # [L, H], means
    for number, expert in enumerate(router.experts[1:], 1):
        own = router.hidden_size + PLACES + number * heads + torch.arange(heads)
        mean = gram[:, own, -1] / count
        if expert.comparable:
            gain, offset = torch.ones_like(mean), (wanted - mean).mean().expand_as(mean)
        else:
            square = gram[:, own, own] / count - mean.square()
            product = moment[:, own, torch.arange(heads)] / count - mean * wanted
            gain = product / square.clamp(min=1e-12)
            offset = wanted - gain * mean
        router.gain[:, number] = gain.float()
        router.offset[:, number] = offset.float()

"""A layer that is to be rated, and what was said of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from moekv.experts.view import LayerView
from moekv.press.options import Options
from moekv.press.stats import Observation
from moekv.routing.base import BaseMoERouter
from moekv.routing.mixing import Votes, order


@dataclass
class Look:
    """A layer that is still to be rated, without the tensors that are too large to hold."""

    view: LayerView
    router: BaseMoERouter  # of the routed experts, or the gate of a calibrated router
    rated: tuple[Tensor, Tensor | None] | None  # what the router has read of hidden states
    scores: list[Tensor | None]  # [B, H, T] fp32 each, of the experts that do not wait

    @property
    def alike(self) -> tuple[Any, ...]:
        """What layers that are rated together have in common."""
        view = self.view
        keys = view.keys.shape, view.keys.device
        return *keys, view.lengths, view.begins, view.ends, view.hidden_states.shape[:2]


def real_pairs(start: Tensor | None, num_keys: int) -> Tensor | None:
    """Say which pairs are real, by the first of each row [B]: [B, 1, T], bool; None: all."""
    if start is None:
        return None
    return torch.arange(num_keys, device=start.device) >= start.view(-1, 1, 1)


@dataclass
class Rating:
    """What is said of one layer's pairs, and what it takes to act on it."""

    index: int  # of the layer
    votes: Votes
    ruling: Tensor | None  # scalar, the dominant expert, whose scores alone the votes are
    start: Tensor | None
    lengths: tuple[int, ...]
    begins: bool
    ends: bool
    seen: Observation  # of all layers that were rated with it
    gain: Fraction  # pairs that are stored in the bytes of one
    wanted: Tensor | None = None  # [B, H, T], which experts want a pair, see `later.packed`

    def for_heads(self, num_heads: int, *, mixes: bool) -> Rating:
        """Give the rating for so many heads of a cache; all alike where their layer mixes them."""
        if not mixes:
            return self
        together = self.votes.scores.mean(2, keepdim=True)
        scores = together.expand(-1, -1, num_heads, -1).contiguous()
        return replace(self, votes=replace(self.votes, scores=scores), wanted=None)

    @property
    def real(self) -> Tensor | None:
        """Which pairs are real: [B, 1, T], bool; None: all."""
        return real_pairs(self.start, self.votes.shape[2])

    def order(self) -> Tensor:
        """Scores [B, H, T] of the layer by itself, in which each head has a budget of its own."""
        return order([self.votes], "uniform", [self.real])[0]


def protected(view: LayerView | Rating, options: Options) -> tuple[int, int]:
    """Sinks and recent positions that stay in any case; in a chunk those that it really has."""
    if options.policy == "dominant":
        return 0, 0
    return options.sinks if view.begins else 0, options.recent if view.ends else 0

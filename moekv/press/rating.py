"""The rating of a layer: the votes for its pairs. And a layer before its rating."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from moekv.experts.view import LayerView
from moekv.models.ranks import ALONE, Ranks
from moekv.press.options import Options
from moekv.press.stats import Observation
from moekv.routing.base import BaseMoERouter
from moekv.routing.mixing import Votes, order


@dataclass
class Unrated:
    """A layer that is not rated yet, without the large tensors of its forward."""

    view: LayerView
    router: BaseMoERouter | None  # of the routed experts, if these act
    rated: tuple[Tensor, Tensor | None] | None  # logits and importance of the router
    scores: list[Tensor | None]  # [B, H, T] fp32 each; None: the expert scores later

    @property
    def remembers(self) -> bool:
        """Whether the router follows its history."""
        return self.router is not None and self.router.history is not None

    @property
    def alike(self) -> tuple[Any, ...]:
        """Sizes that layers which are rated together have in common."""
        view = self.view
        keys = view.keys.shape, view.keys.device
        return *keys, view.lengths, view.begins, view.ends, view.hidden_states.shape[:2]


def real_pairs(start: Tensor | None, num_keys: int) -> Tensor | None:
    """Return which pairs are real [B, 1, T], bool, by the first of each row [B]; None: all."""
    if start is None:
        return None
    return torch.arange(num_keys, device=start.device) >= start.view(-1, 1, 1)


@dataclass
class Rating:
    """The votes for the pairs of one layer, and what the compression needs beside them."""

    index: int  # of the layer
    votes: Votes
    dominant: Tensor | None  # scalar, number of the dominant expert, if one decides alone
    start: Tensor | None
    lengths: tuple[int, ...]
    begins: bool
    ends: bool
    seen: Observation  # of all layers that were rated with it
    gain: Fraction  # pairs that are stored in the bytes of one
    storable: Tensor | None  # bool, a scalar: whether all own pairs are, if that was to be seen
    wanted: Tensor | None = None  # [B, H, T], which experts would retain a pair, see `later.packed`
    ranks: Ranks = ALONE  # the heads are those of all of these processes

    def for_heads(self, num_heads: int, *, mixes: bool) -> Rating:
        """Return the rating for the heads of a cache: one order for all if the layer mixes them."""
        if not mixes:
            return self
        ranks = self.ranks
        if num_heads * ranks.size != self.votes.shape[1]:  # latents, which every process holds
            ranks = ALONE
        together = self.votes.scores.mean(2, keepdim=True)
        scores = together.expand(-1, -1, num_heads * ranks.size, -1).contiguous()
        votes = replace(self.votes, scores=scores)
        return replace(self, votes=votes, wanted=None, ranks=ranks)

    @property
    def own_heads(self) -> slice:
        """Which of the heads this process has."""
        return self.ranks.own(self.votes.shape[1] // self.ranks.size)

    @property
    def real(self) -> Tensor | None:
        """Which pairs are real: [B, 1, T], bool; None: all."""
        return real_pairs(self.start, self.votes.shape[2])

    def order(self) -> Tensor:
        """Scores [B, H, T] of the layer by itself, where each head has its own budget."""
        return order([self.votes], "uniform", [self.real])[0]


def protected(view: LayerView | Rating, options: Options) -> tuple[int, int]:
    """Sinks and recent positions, always retained; in a chunk only those that it contains."""
    if options.policy == "dominant":
        return 0, 0
    return options.sinks if view.begins else 0, options.recent if view.ends else 0

"""One forward of the decoder: what it is of, what its layers hand over, and what happens then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from moekv.budget import kept_pairs
from moekv.experts.builder import ViewBuilder
from moekv.models.hooks import index_of
from moekv.models.watching import Asked
from moekv.press.later import Later
from moekv.press.options import Options
from moekv.press.rater import Rater
from moekv.press.stats import Statistics
from moekv.report.recording import Recording


@dataclass(frozen=True)
class Plan:
    """What a forward goes by: nothing of it changes while the forward runs.

    Attributes
    ----------
    options : Options
        As they were when the forward began.
    rater : Rater
    statistics : Statistics
    layers : sequence of nn.Module
        The attention layers whose pairs may leave, in order.
    budget : str
        ``"uniform"``, ``"head"`` or ``"model"``: what ``"auto"`` stands for in this forward.
    context_length : int or None
        Length of a prompt in chunks, padding included.
    recent : int
        Last positions that stay in any case.
    note : callable or None
        Takes the record of a prefill, where one is asked for.
    later : Later
        What experts wanted of the block's caches.
    """

    options: Options
    rater: Rater
    statistics: Statistics
    layers: Sequence[nn.Module]
    budget: str
    context_length: int | None
    recent: int
    note: Callable[[Recording], None] | None = None
    later: Later = field(default_factory=Later)

    @property
    def goes_on(self) -> bool:
        """Whether a cache may be compressed more than once."""
        return self.options.decoding is not None or self.context_length is not None

    @property
    def evicts(self) -> bool:
        """Whether pairs may leave at all."""
        return self.options.evicts

    @property
    def acts(self) -> bool:
        """Whether the cache is changed at all."""
        return self.options.acts

    @property
    def most(self) -> int | None:
        """Pairs of a head, on average, that a cache may come to hold; None: nothing bounds it."""
        decoding = self.options.decoding
        return None if decoding is None else decoding.target + decoding.interval

    def keep(self, lengths: Sequence[int], num_tokens: int, gain: Fraction) -> list[int]:
        """Pairs of a head in each row that stay of a prompt, of which so many tokens are seen.

        `gain` pairs are stored in the bytes of one.
        """
        options = self.options
        ahead = 0 if self.context_length is None else self.context_length - num_tokens
        keep = [kept_pairs(n + ahead, options.compression_ratio, gain) for n in lengths]
        if options.decoding is not None:
            keep = [min(n, options.decoding.target) for n in keep]
        return [min(k, max(n, 1)) for k, n in zip(keep, lengths, strict=True)]

    def run_without_gaps(self, keep: Sequence[int], lengths: Sequence[int]) -> int | None:
        """Count the last tokens that no head lacks once each row keeps so many of its pairs a head.

        Parameters
        ----------
        keep, lengths : sequence of B ints
            Pairs of a head, on average: those that stay, and those that there were.

        Returns
        -------
        int or None
            None: all of them.
        """
        sinks, recent = self.options.sinks, self.recent
        if self.options.policy == "dominant":
            sinks = recent = 0
        runs = [min(recent, k - min(sinks, k)) for k, n in zip(keep, lengths, strict=True) if k < n]
        return min(runs, default=None)


@dataclass
class Call:
    """What an attention layer has just done.

    Attributes
    ----------
    module : nn.Module
    hidden_states : Tensor [B, Q, hidden]
        Its input.
    cache : Cache
    kwargs : dict
        Of its forward.
    attentions : Tensor or None
        Attention weights, where the implementation returns them.
    asked : Asked or None
        What it asked, where that was seen.
    """

    module: nn.Module
    hidden_states: Tensor
    cache: Cache
    kwargs: dict[str, Any]
    attentions: Tensor | None
    asked: Asked | None

    @property
    def index(self) -> int:
        """Of the layer."""
        return index_of(self.module)


class Strategy(ABC):
    """What a press does while a forward runs: a prefill, one that streams, a cache that grows.

    Parameters
    ----------
    plan : Plan
    view : ViewBuilder
        Of this forward.
    """

    def __init__(self, plan: Plan, view: ViewBuilder) -> None:
        self.plan = plan
        self.view = view
        self.num_taken = 0

    @abstractmethod
    def take(self, call: Call) -> None:
        """Take what a layer has done, and act on it or remember it."""

    @property
    def is_done(self) -> bool:
        """Whether it has seen all that it was to see: as many layers as there are."""
        return self.num_taken == len(self.plan.layers)

    def abort(self) -> None:  # noqa: B027  # most have nothing to undo
        """Leave no half-compressed cache behind: the forward did not come to its end."""


@dataclass
class Forward:
    """State of a running forward, which ends with it.

    Attributes
    ----------
    strategy : Strategy or None
        None: nothing is to be done, as in a decode step over what was compressed.
    asked : dict
        What each layer asked, until it hands that over.
    handle : RemovableHandle
        Of the hook that ends it.
    """

    strategy: Strategy | None
    asked: dict[nn.Module, Asked] = field(default_factory=dict)
    handle: Any = None

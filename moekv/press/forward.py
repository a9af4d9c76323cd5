"""One forward of the decoder: its plan, the calls of its layers, and its strategy."""

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
from moekv.press.options import OFTEN, Options
from moekv.press.rater import Rater
from moekv.press.stats import Statistics
from moekv.report.recording import Recording


@dataclass(frozen=True)
class Plan:
    """The settings of a forward, which do not change while it runs.

    Attributes
    ----------
    options : Options
        As they were when the forward began.
    rater : Rater
    statistics : Statistics
    layers : sequence of nn.Module
        The attention layers whose pairs may be evicted, in order.
    budget : str
        ``"uniform"``, ``"head"`` or ``"model"``: what ``"auto"`` stands for in this forward.
    context_length : int or None
        Length of a prompt in chunks, padding included.
    recent : int
        Last positions that are always retained.
    note : callable or None
        Takes the record of a prefill, with ``record=True``.
    later : Later
        Later hit rates of the block's caches.
    unfolded : str or None
        Why pairs that leave join no others; None: they do.
    shares : bool
        Whether further layers attend to the pairs of these. They come later in a forward, at whose
        end caches are compressed then.
    origin : int
        Position of a text's first token.
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
    unfolded: str | None = OFTEN
    shares: bool = False
    origin: int = 0

    @property
    def goes_on(self) -> bool:
        """Whether a cache may be compressed more than once."""
        return self.options.decoding is not None or self.context_length is not None

    @property
    def evicts(self) -> bool:
        """Whether pairs may be evicted."""
        return self.options.evicts

    @property
    def acts(self) -> bool:
        """Whether the cache is changed."""
        return self.options.acts

    @property
    def most(self) -> int | None:
        """The most pairs that a head may hold, on average; None: not bounded."""
        decoding = self.options.decoding
        return None if decoding is None else decoding.target + decoding.interval

    def name_used(self) -> None:
        """Note in the statistics what the options that are chosen automatically stand for."""
        statistics = self.statistics
        statistics.budget, statistics.stored = self.budget, self.options.pairs
        statistics.unfolded = self.unfolded

    def keep(self, lengths: Sequence[int], num_tokens: int, gain: Fraction) -> list[int]:
        """Count the pairs of a head in each row to retain of a prompt, after so many of its tokens.

        `gain` pairs are stored in the bytes of one.
        """
        options = self.options
        ahead = 0 if self.context_length is None else self.context_length - num_tokens
        keep = [kept_pairs(n + ahead, options.compression_ratio, gain) for n in lengths]
        if options.decoding is not None:
            keep = [min(n, options.decoding.target) for n in keep]
        return [min(k, max(n, 1)) for k, n in zip(keep, lengths, strict=True)]

    def run_without_gaps(self, keep: Sequence[int], lengths: Sequence[int]) -> int | None:
        """Count the last tokens that every head still holds after a compression.

        Parameters
        ----------
        keep, lengths : sequence of B ints
            Pairs of a head, on average: those retained, and those before.

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
    """One call of an attention layer, after it has run.

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
        Its queries, where they were observed.
    choice : Any
        What the model's own router returned last, where an expert reads it.
    """

    module: nn.Module
    hidden_states: Tensor
    cache: Cache
    kwargs: dict[str, Any]
    attentions: Tensor | None
    asked: Asked | None
    choice: Any = None

    @property
    def index(self) -> int:
        """Of the layer."""
        return index_of(self.module)


class Strategy(ABC):
    """What a press does during a forward: a prefill, a streaming one, a cache that grows.

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
        """Handle the call of a layer, or keep it until more layers have run."""

    @property
    def is_done(self) -> bool:
        """Whether all layers have been handled."""
        return self.num_taken == len(self.plan.layers)

    def finish(self) -> Cache | None:
        """Do what was put off until the forward's end; return the cache, None: nothing was."""
        return None

    def abort(self) -> None:  # noqa: B027  # most have nothing to undo
        """Clean up after a forward that failed: no cache stays half compressed."""


@dataclass
class Forward:
    """State of a running forward, which ends with it.

    Attributes
    ----------
    strategy : Strategy or None
        None: there is nothing to do, as in a decoding step.
    asked : dict
        Queries of each layer, until its hook takes them.
    choice : Any
        What the model's own router returned last, where an expert reads it.
    """

    strategy: Strategy | None
    asked: dict[nn.Module, Asked] = field(default_factory=dict)
    choice: Any = None

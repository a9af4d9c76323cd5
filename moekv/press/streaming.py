"""A prefill whose layers are compressed as they run.

Where layers do not share a budget, each is compressed when it has run. A budget of K pairs over the
model works as well. When a layer has run, the best K pairs of all layers so far are selected, and
the others are evicted: a pair with K better ones cannot be among the best K later. After the last
layer exactly those pairs are left that one selection over all layers would have retained, and the
cache never held more than the budget, a slack, and one whole layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from moekv.budget import Kept, select, select_over_layers, without_padding
from moekv.cache.caches import empty_cache, evict, held_bytes, present, recompress
from moekv.cache.layer import CompressedLayer
from moekv.devices import send
from moekv.experts.builder import ViewBuilder
from moekv.press.adoption import adopt
from moekv.press.forward import Plan
from moekv.press.prefill import Prefill, Rated
from moekv.press.rating import Rating, real_pairs
from moekv.routing.mixing import Votes, order

SLACK = 1 / 8
"""Share of the budget by which pairs may exceed it before older layers are copied again."""


@dataclass
class Trimmed:
    """A layer of the stream.

    Attributes
    ----------
    index : int
        In the cache.
    layer : CacheLayerMixin
        Holds its pairs now.
    before : int
        Bytes of its storages before compression.
    kept : Kept or None
        The pairs it holds; None: all.
    size : int
        Pairs that it holds.
    """

    index: int
    layer: CacheLayerMixin
    before: int
    kept: Kept | None
    size: int

    @property
    def after(self) -> int:
        """Bytes of the storages that hold its pairs now."""
        return held_bytes(self.layer)


class StreamingBudget:
    """Trims the layers of one prefill to their budget, as they run.

    Parameters
    ----------
    cache : Cache
        Of the prefill. Its layers are replaced.
    budget : str
        ``"uniform"``, ``"head"`` or ``"model"``, see ``moekv.budget``.
    num_layers : int
        Layers of the prefill, L.
    totals, lengths : sequence of B ints
        Pairs to retain in a head of each row, on average, and its real pairs.
    start : Tensor [B], int32, or None
        Padding at the left of each row.
    sinks, recent : int
        First and last real positions that every head retains, as far as the total allows.
    pairs : str
        Storage format: one of ``moekv.ops.PAIRS``.
    own_heads : slice
        Which of the heads that are voted on the cache has.
    backend : str
        Of the ops.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        budget: str,
        num_layers: int,
        totals: Sequence[int],
        lengths: Sequence[int],
        start: Tensor | None,
        sinks: int,
        recent: int,
        pairs: str = "16",
        own_heads: slice = slice(None),
        backend: str,
    ) -> None:
        self.layers: list[Trimmed] = []
        self._cache = cache
        self._budget = budget
        self._num_layers = num_layers
        self._totals = totals
        self._lengths = lengths
        self._start = start
        self._protected = {"sinks": sinks, "recent": recent}
        self._pairs = pairs
        self._own_heads = own_heads
        self._backend = backend
        self._votes: list[Votes] = []

    def add(self, index: int, votes: Votes) -> None:
        """Add the next layer, and evict what can no longer be retained.

        A budget over the model waits for the device.

        Parameters
        ----------
        index : int
            Of the layer in the cache; its keys and values are as the prefill left them.
        votes : Votes
            For its pairs, of the same voters as in the other layers.

        Raises
        ------
        RuntimeError
            Other code has replaced a layer of the cache.
        """
        layer = self._cache.layers[index]
        before = held_bytes(layer)
        self.layers.append(Trimmed(index, layer, before, None, votes.scores[0].numel()))
        if self._budget == "model":
            self._votes.append(votes)
            self._trim_all()
            return
        (kept,) = select(
            order([votes], self._budget, [real_pairs(self._start, votes.shape[2])]),
            self._start,
            self._totals,
            budget=self._budget,
            backend=self._backend,
            **self._protected,
        )
        self._trim(self.layers[-1], without_padding(kept, self._start, self._lengths))

    def _trim_all(self) -> None:
        """Trim all layers so far to the pairs that the model's budget can still retain."""
        heads = self._votes[0].shape[1]
        budget = [self._num_layers * heads * n for n in self._totals]
        real = [len(self.layers) * heads * max(n, 1) for n in self._lengths]
        last = len(self.layers) == self._num_layers
        quantises = self._pairs != "16"  # each layer when it has run
        may_wait = quantises or not last
        if self._start is None and may_wait and sum(real) <= sum(budget):
            if quantises:
                votes = self._votes[-1]
                everything = Kept.everything(votes.shape, None, votes.scores.device)
                self._trim(self.layers[-1], everything)
            return
        scores = order(
            self._votes,
            "model",
            [real_pairs(self._start, each.shape[2]) for each in self._votes],
            num_heads=self._num_layers * heads,
        )
        may_stay = budget if last else self._may_stay(scores, budget)
        chosen = select_over_layers(
            scores,
            self._start,
            [min(pair) for pair in zip(may_stay, real, strict=True)],
            backend=self._backend,
            **self._protected,
        )
        chosen = [without_padding(kept, self._start, self._lengths) for kept in chosen]
        self._trim(self.layers[-1], chosen[-1])
        if last or sum(layer.size for layer in self.layers) > (1 + SLACK) * sum(may_stay):
            for trimmed, kept in zip(self.layers, chosen, strict=True):
                if trimmed.kept is not None and not last:
                    # A budget below sinks and recent positions protects fewer of them with every
                    # layer, and may use what that leaves for pairs that have gone. Only what the
                    # last selection keeps is sure to be among those of all before.
                    kept = Kept.from_mask(kept.mask() & trimmed.kept.mask())
                self._trim(trimmed, kept)

    def _may_stay(self, scores: Sequence[Tensor], budget: Sequence[int]) -> list[int]:
        """Count the pairs of each row the model's budget can still retain.

        Where no voter compares heads, ranks are final, and so is the budget. A voter that does,
        with a known share s, has K of the final ranks at K / s or below, and ranks only rise. So
        pairs that rank behind that for all voters will be evicted. Where the shares of later layers
        are unknown, any pair may be retained.
        """
        votes = self._votes[0]
        if votes.is_exact or not any(votes.comparable):
            return list(budget)
        if not (votes.has_shared and votes.comparable[0]):
            return [sum(x[0].numel() for x in scores)] * len(budget)
        protected = len(scores) * votes.shape[1] * sum(self._protected.values())
        limit = send(budget, votes.shares.device) / votes.shares[0]
        within = [(-x <= limit.view(-1, 1, 1).to(x.device)).sum((1, 2)) for x in scores]
        counts = torch.stack([x.to(limit.device) for x in within]).sum(0).tolist()
        return [max(n + protected, k) for n, k in zip(counts, budget, strict=True)]

    def abort(self) -> None:
        """Empty the cache, unless other code has replaced it: part of a prefill cannot be used."""
        layers = self._cache.layers
        if any(x.index < len(layers) and layers[x.index] is x.layer for x in self.layers):
            empty_cache(self._cache)

    def _trim(self, trimmed: Trimmed, kept: Kept) -> None:
        """Retain only some pairs of a layer, which are among those that it holds."""
        if self._cache.layers[trimmed.index] is not trimmed.layer:
            raise RuntimeError(
                "expected the cache as it was left, got one in which another hook has replaced "
                f"layer {trimmed.index}; kvpress.ComposedPress chains presses"
            )
        if self._pairs != "16":
            kept = replace(kept, per_head=None)
        how: dict[str, Any] = {"pairs": self._pairs, "backend": self._backend}
        own = kept.of_heads(self._own_heads)
        if trimmed.kept is None:
            with present(self._cache, trimmed.index):
                evict(self._cache, trimmed.index, own, **how)
        elif len(kept.indices) < trimmed.size:
            own = own.within(trimmed.kept.of_heads(self._own_heads))
            with present(self._cache, trimmed.index):
                recompress(self._cache, trimmed.index, own, **how)
        trimmed.layer = self._cache.layers[trimmed.index]
        trimmed.kept, trimmed.size = kept, len(kept.indices)


class Streaming(Prefill):
    """A prefill whose layers are trimmed as they run.

    The peak is lower, and an exception halfway leaves the cache empty instead of whole.
    """

    def __init__(self, plan: Plan, view: ViewBuilder) -> None:
        super().__init__(plan, view)
        self._stream: StreamingBudget | None = None

    def _rates_now(self, num_unrated: int, is_last: bool) -> bool:
        return True

    def _act(self, is_last: bool) -> None:
        last = self.rated[-1]
        if len(self.rated) == 1:
            self._stream = self._begin(last.cache, last.done)
        if self._stream is None:  # nothing to evict
            super()._act(is_last)
            return
        self._stream.add(last.index, last.done.votes)
        if is_last:
            stream, self._stream = self._stream, None
            rated, self.rated = self.rated, []
            self._end(stream, rated)
            self.committed = True

    def _begin(self, cache: Cache, rating: Rating) -> StreamingBudget | None:
        """Prepare to trim the layers as they run, if pairs are to be evicted."""
        plan, num_keys = self.plan, rating.votes.shape[2]
        totals = plan.keep(rating.lengths, num_keys, rating.gain)
        nothing_leaves = not plan.evicts or (rating.start is None and totals[0] == num_keys)
        if nothing_leaves and not plan.options.quantises:
            return None
        plan.name_used()
        return StreamingBudget(
            cache,
            budget=plan.budget,
            num_layers=len(plan.layers),
            totals=totals,
            lengths=rating.lengths,
            start=rating.start,
            sinks=plan.options.sinks,
            recent=plan.recent,
            pairs=plan.options.pairs,
            own_heads=rating.own_heads,
            backend=plan.options.backend,
        )

    def _end(self, stream: StreamingBudget, rated: list[Rated]) -> None:
        """Record the compression, after the last layer."""
        run = self._run(rated[0].done)
        for r, trimmed in zip(rated, stream.layers, strict=True):
            if isinstance(trimmed.layer, CompressedLayer):
                trimmed.layer.hold_run(run)
            own = None if trimmed.kept is None else trimmed.kept.of_heads(r.done.own_heads)
            with present(r.cache, r.index):
                adopt(r.cache, r.index, self.plan, r.done, own, r.recent, r.read)
        self._record(
            rated,
            [trimmed.kept for trimmed in stream.layers],
            [(trimmed.before, trimmed.after) for trimmed in stream.layers],
        )

    def abort(self) -> None:
        """Empty the cache of a prefill that has failed."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abort()

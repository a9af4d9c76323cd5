"""A budget that is kept while the layers of a prefill arrive.

Where layers do not share it, each is compressed when it arrives. A budget over the model can be
kept, too. Of the layers seen so far, never more pairs can stay in the end than it has. So when a
layer arrives, the best of all pairs seen are chosen, as many as the budget has, and what falls
behind leaves: those before it stay before it, whatever follows. After the last layer exactly the
pairs are left that one selection over all of them would have kept, and at no time there were more
than the budget, a slack, and one whole layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from moekv.budget import Kept, select, select_over_layers, without_padding
from moekv.cache.caches import cached_pairs, compressed, empty_cache, held_bytes
from moekv.cache.layer import CompressedLayer
from moekv.cache.ragged import RaggedLayer
from moekv.experts.builder import ViewBuilder
from moekv.press.adoption import adopt
from moekv.press.forward import Plan
from moekv.press.prefill import Prefill, Rated
from moekv.press.rating import Rating, real_pairs
from moekv.routing.mixing import Votes, order

SLACK = 1 / 8
"""Share of the budget by which pairs may exceed it before older layers are copied once more."""


@dataclass
class Trimmed:
    """A layer of the stream.

    Attributes
    ----------
    index : int
        In the cache.
    layer : CacheLayerMixin
        What holds its pairs now.
    before : int
        Bytes of the storages that it came with.
    kept : Kept or None
        What it holds; None: all that it came with.
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
    """Trims the layers of one prefill to their budget, as they arrive.

    Parameters
    ----------
    cache : Cache
        Of the prefill. Its layers are replaced.
    budget : str
        ``"uniform"``, ``"head"`` or ``"model"``, see ``moekv.budget``.
    num_layers : int
        Layers of the prefill, L.
    totals, lengths : sequence of B ints
        Pairs that a head of each row keeps on average, and real pairs that it has.
    start : Tensor [B], int32, or None
        Padding at the left of each row.
    sinks, recent : int
        First and last real positions that every head keeps, as far as the total allows.
    pairs : str
        How they are stored: one of ``moekv.ops.PAIRS``.
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
        self._backend = backend
        self._votes: list[Votes] = []

    def add(self, index: int, votes: Votes) -> None:
        """Take in the next layer, and trim what can no longer stay.

        A budget over the model waits for the device.

        Parameters
        ----------
        index : int
            Of the layer in the cache; its keys and values are as the prefill left them.
        votes : Votes
            What is said of its pairs, by the voters of the other layers.

        Raises
        ------
        RuntimeError
            Somebody else has replaced a layer of the stream.
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
        """Leave of all layers so far what the model's budget can still keep."""
        heads = self._votes[0].shape[1]
        budget = [self._num_layers * heads * n for n in self._totals]
        real = [len(self.layers) * heads * max(n, 1) for n in self._lengths]
        last = len(self.layers) == self._num_layers
        quantises = self._pairs != "16"  # each layer when it arrives
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
        """Count the pairs of each row that the model's budget can still keep.

        Where no voter compares heads, ranks are final, and so is the budget. A voter that does and
        whose share s is known has K of the final ranks at K / s or below, whatever follows; and
        ranks only rise. So what stands behind that with all voters will not stay. Where the shares
        of those to come are unknown, everything may.
        """
        votes = self._votes[0]
        if votes.is_exact or not any(votes.comparable):
            return list(budget)
        if not (votes.has_shared and votes.comparable[0]):
            return [sum(x[0].numel() for x in scores)] * len(budget)
        protected = len(scores) * votes.shape[1] * sum(self._protected.values())
        limit = torch.tensor(budget, device=votes.shares.device) / votes.shares[0]
        within = [(-x <= limit.view(-1, 1, 1).to(x.device)).sum((1, 2)) for x in scores]
        counts = torch.stack([x.to(limit.device) for x in within]).sum(0).tolist()
        return [max(n + protected, k) for n, k in zip(counts, budget, strict=True)]

    def abort(self) -> None:
        """Empty the cache: part of a prefill is of no use. Unless it is somebody else's by now."""
        layers = self._cache.layers
        if any(x.index < len(layers) and layers[x.index] is x.layer for x in self.layers):
            empty_cache(self._cache)

    def _trim(self, trimmed: Trimmed, kept: Kept) -> None:
        """Leave only the kept pairs in a layer, which are among those that it holds."""
        if self._cache.layers[trimmed.index] is not trimmed.layer:
            raise RuntimeError(
                "expected the cache as it was left, got one in which somebody else has replaced "
                f"layer {trimmed.index} meanwhile; kvpress.ComposedPress chains presses"
            )
        layer = trimmed.layer
        if self._pairs != "16":
            kept = replace(kept, per_head=None)
        if trimmed.kept is None:
            layer = compressed(*cached_pairs(layer), kept, pairs=self._pairs, backend=self._backend)
        elif len(kept.indices) < trimmed.size:
            assert isinstance(layer, RaggedLayer)
            layer = layer.subset(kept, of=trimmed.kept)
        self._cache.layers[trimmed.index] = trimmed.layer = layer
        trimmed.kept, trimmed.size = kept, len(kept.indices)


class Streaming(Prefill):
    """A prefill whose layers are trimmed as they arrive.

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
        if self._stream is None:  # nothing is to leave
            super()._act(is_last)
            return
        self._stream.add(last.index, last.done.votes)
        if is_last:
            stream, self._stream = self._stream, None
            rated, self.rated = self.rated, []
            self._end(stream, rated)
            self.committed = True

    def _begin(self, cache: Cache, rating: Rating) -> StreamingBudget | None:
        """Get ready to trim the layers as they arrive, if anything is to leave."""
        plan, num_keys = self.plan, rating.votes.shape[2]
        totals = plan.keep(rating.lengths, num_keys, rating.gain)
        nothing_leaves = not plan.evicts or (rating.start is None and totals[0] == num_keys)
        if nothing_leaves and not plan.options.quantises:
            return None
        plan.statistics.budget, plan.statistics.stored = plan.budget, plan.options.pairs
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
            backend=plan.options.backend,
        )

    def _end(self, stream: StreamingBudget, rated: list[Rated]) -> None:
        """Record what the stream has done; its last layer has trimmed all to the budget."""
        run = self._run(rated[0].done)
        for r, trimmed in zip(rated, stream.layers, strict=True):
            if isinstance(trimmed.layer, CompressedLayer):
                trimmed.layer.hold_run(run)
            adopt(r.cache, r.index, self.plan, r.done, trimmed.kept, r.recent, r.read)
        self._record(
            rated,
            [trimmed.kept for trimmed in stream.layers],
            [(trimmed.before, trimmed.after) for trimmed in stream.layers],
        )

    def abort(self) -> None:
        """Empty the cache of a prefill that has not come to its end."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abort()

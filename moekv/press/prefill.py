"""A prefill in one forward: all layers are rated, then pairs are evicted."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache

from moekv import ops
from moekv.budget import Kept
from moekv.cache.caches import cached_pairs, check_cache, is_static, present
from moekv.cache.folding import Folding
from moekv.cache.layer import CompressedLayer
from moekv.cache.rows import read_flags
from moekv.experts.builder import ViewBuilder
from moekv.experts.view import LayerView
from moekv.models.habits import check_attention, habits_of
from moekv.models.hooks import index_of
from moekv.models.ranks import Ranks
from moekv.press.adoption import adopt, last_states, read_of
from moekv.press.commit import apply, choose, record, whole_or_empty
from moekv.press.forward import Call, Plan, Strategy
from moekv.press.options import Options
from moekv.press.rating import Rating, Unrated
from moekv.press.recording import recording_of

TOGETHER = 8
"""Layers of a prefill that are rated at once: rating is many small operations for each layer."""

FOLD_QUERIES = 64
"""Tokens whose queries say which pairs are looked at alike."""

FOLD_GATE = 0.5
"""How much alike: evicted pairs for which there is nothing like them are lost."""

FOLD_LEAST = 0.1
"""How much they have to be looked at, in times of the mean: to join, and to spoil a value, is worse
for the others than to be lost. Measured: docs/design.md."""


@dataclass
class Rated:
    """A layer of the running prefill; no cache layer is changed before all are rated."""

    cache: Cache
    index: int
    keys: weakref.ref[Tensor]
    recent: tuple[Tensor, Tensor] | None  # last inputs and queries, if it may be compressed again
    read: Tensor | None  # [B, H, T] fp32, what a calibrated router then notes
    folding: Folding | None  # by which evicted pairs join others
    pending: Unrated | None
    rating: Rating | None = None

    @property
    def num_heads(self) -> int:
        """KV heads that the cache has."""
        keys = self.cache.layers[self.index].keys
        assert keys is not None
        return int(keys.shape[1])

    @property
    def done(self) -> Rating:
        """Its rating, which has to be there."""
        assert self.rating is not None
        return self.rating

    @property
    def num_pairs(self) -> int:
        """Real pairs that the layer had, in all processes."""
        return self.num_heads * self.done.ranks.size * sum(self.done.lengths)

    def counted(self, options: Options) -> Rating:
        """Return its rating, for what the layer stores now: without biases if nothing has left."""
        layer = self.cache.layers[self.index]
        if not options.folds or not isinstance(layer, CompressedLayer):
            return self.done
        return replace(self.done, gain=layer.gain(options.pairs))


def _of_all(num_bytes: Sequence[tuple[int, int]], ranks: Ranks) -> list[tuple[int, int]]:
    """Sum the bytes of layers over all processes."""
    total = iter(ranks.total([n for pair in num_bytes for n in pair]))
    return list(zip(total, total, strict=True))


def folding_of(view: LayerView) -> Folding:
    """Take queries of a layer by which evicted pairs join others."""
    group = view.queries.shape[1] // view.keys.shape[1]
    queries = view.sampled(min(FOLD_QUERIES, max(ops.MAX_FOLD_QUERIES // group, 1)))
    return Folding(queries, view.start, view.logits, FOLD_GATE, FOLD_LEAST)


class Prefill(Strategy):
    """Rates every layer when it has run, and compresses all after the last.

    An exception before that leaves the cache whole.
    """

    def __init__(self, plan: Plan, view: ViewBuilder) -> None:
        super().__init__(plan, view)
        self.rated: list[Rated] = []
        self.committed = False

    @functools.cached_property
    def _mixes(self) -> bool:
        """Whether a layer mixes heads, so that all retain the same pairs."""
        return any(habits_of(x, self.view.rotary).mixes for x in self.plan.layers)

    @property
    def is_done(self) -> bool:
        """Whether all layers have been compressed."""
        return self.committed

    def take(self, call: Call) -> None:
        """Rate a layer, or keep it until some can be rated at once."""
        if call.module is self.plan.layers[0] and not is_static(call.cache):
            indices = [index_of(x) for x in self.plan.layers]
            check_cache(call.cache, indices=indices)
        self.rated.append(self._prepare(call))
        is_last = call.module is self.plan.layers[-1]
        unrated = [r for r in self.rated[-TOGETHER:] if r.rating is None]
        if self._rates_now(len(unrated), is_last):
            pending = [r.pending for r in unrated if r.pending is not None]
            ratings = self.plan.rater.rate(pending, self.plan.options)
            for r, rating in zip(unrated, ratings, strict=True):
                r.rating, r.pending = rating.for_heads(r.num_heads, mixes=self._mixes), None
            del pending
        with torch.no_grad():
            self._act(is_last)

    def _prepare(self, call: Call) -> Rated:
        plan, module = self.plan, call.module
        layer = call.cache.layers[call.index]
        keys, values = (x.to(call.hidden_states.device) for x in cached_pairs(layer))
        assert layer.keys is not None
        held = weakref.ref(layer.keys)  # the tensors that are read may be copies
        kwargs = call.kwargs
        if is_static(call.cache):
            num_tokens = call.hidden_states.shape[1]
            keys, values = keys[:, :, :num_tokens], values[:, :, :num_tokens]
            kwargs = kwargs | {"attention_mask": None}  # no padding, and no slots to come
        if module is not plan.layers[min(len(self.rated), len(plan.layers) - 1)]:
            raise RuntimeError(
                "expected the attention layers to run in order, once in a forward, got layer "
                f"{call.index} out of turn (transformers {transformers.__version__})"
            )
        with torch.no_grad():
            view = self.view(
                module,
                call.hidden_states,
                keys,
                values,
                call.attentions,
                kwargs,
                window=plan.options.window,
                backend=plan.options.backend,
                asked=call.asked,
                expects=plan.rater.expects or plan.options.folds,
                choice=call.choice,
            )
            folding = folding_of(view) if plan.options.folds else None
        call.asked = None  # as large as a layer's pairs, and no longer needed
        recent = last_states(plan, call.hidden_states, view)
        pending = plan.rater.prepare(view)
        read = read_of(plan, pending.view)
        return Rated(call.cache, call.index, held, recent, read, folding, pending)

    def _rates_now(self, num_unrated: int, is_last: bool) -> bool:
        return is_last or num_unrated == TOGETHER

    def _act(self, is_last: bool) -> None:
        """Compress, if this was the last layer, and none that shares pairs is to come."""
        if is_last and not self.plan.shares:
            self._compress()

    def _compress(self) -> None:
        rated, self.rated = self.rated, []
        self._commit(rated)
        self.committed = True

    @torch.no_grad()
    def finish(self) -> Cache | None:
        """Compress what later layers have attended to as well."""
        if len(self.rated) < len(self.plan.layers):
            return None
        cache = self.rated[0].cache
        self._compress()
        return cache

    def _commit(self, rated: list[Rated]) -> None:
        """Compress rated layers; whatever is likely to fail comes before the first is changed."""
        offloaded = rated[0].cache.offloading  # tensors come and go
        if not offloaded and any(r.cache.layers[r.index].keys is not r.keys() for r in rated):
            raise RuntimeError(
                "expected the cache as it was when it was rated, got one that another hook has "
                "changed; kvpress.ComposedPress chains presses"
            )
        plan, ratings = self.plan, [r.done for r in rated]
        kept, num_bytes = choose(ratings, plan), []
        if any(k is not None and k.per_head is None for k in kept):
            check_attention(plan.layers, self.view.rotary, "heads or layers of different lengths")
        run = self._run(ratings[0])
        leaves = any(
            k is not None and len(k.indices) < r.num_pairs for r, k in zip(rated, kept, strict=True)
        )
        if not leaves and plan.unfolded is None:
            plan.statistics.unfolded = "all pairs are retained"
        checked = read_flags([rating.storable for rating in ratings])
        with whole_or_empty(rated[0].cache):
            for r, all_heads, known in zip(rated, kept, checked, strict=True):
                chosen = None if all_heads is None else all_heads.of_heads(r.done.own_heads)
                folding, r.folding = r.folding if leaves else None, None
                with present(r.cache, r.index):
                    how: dict[str, Any] = {"folding": folding, "ranks": r.done.ranks}
                    num_bytes.append(
                        apply(r.cache, r.index, chosen, plan, run, **how, checked=known)
                    )
                    adopt(r.cache, r.index, plan, r.done, chosen, r.recent, r.read)
        self._record(rated, kept, num_bytes)

    def _record(
        self,
        rated: Sequence[Rated],
        kept: Sequence[Kept | None],
        num_bytes: Sequence[tuple[int, int]],
    ) -> None:
        """Record the retained pairs of the rated layers, and their bytes before and after."""
        plan, ratings = self.plan, [r.counted(self.plan.options) for r in rated]
        num_bytes = _of_all(num_bytes, ratings[0].ranks)
        record(ratings, kept, num_bytes, plan.rater, plan.statistics)
        plan.statistics.follow(rated[0].cache, plan.most)
        for r, rating, chosen in zip(rated, ratings, kept, strict=True):
            layer = r.cache.layers[r.index]
            own = rating.own_heads
            plan.later.remember(
                layer,
                None if rating.wanted is None else rating.wanted[:, own],
                None if chosen is None else chosen.of_heads(own),
                plan.rater.names,
            )
        if plan.note is not None:
            plan.note(recording_of(ratings, kept, num_bytes, plan))

    def _run(self, rating: Rating) -> int | None:
        num_keys = rating.votes.shape[2]
        return self.plan.run_without_gaps(
            self.plan.keep(rating.lengths, num_keys, rating.gain), rating.lengths
        )

"""Compression of a cache that goes on growing: during decoding, and between chunks of a prefill.

A growing cache is compressed again and again. Its layers are rated as after a prefill, with two
differences. Only the last tokens' hidden states are known (``moekv.cache.recent``): they give the
window of queries and, on average, the gate weights of all pairs. And the retained pairs have gaps
between them: **places are not positions**. A place is a pair's number among the pairs that a head
holds. An expert sees these in order and may not take a place for a position in the text; keys and
the window's queries are rotated at their true positions. For the experts of moekv this means:

- ``aggressive``, ``moderate``, ``conservative`` retain shares of the held pairs, so that the
  beginning of the text weighs more with every compression.
- ``temporal`` takes the number of held pairs behind one for its age, which is a lower bound, and
  partitions the held pairs instead of the text.
- ``selective`` averages over held neighbours.
- ``learned``, of calibrated routers, alone knows true positions: what it needs of a token is noted
  beside the pair when the token is fed (``moekv.cache.notes``).
- The text's first pairs (sinks) are never evicted. Neither are the last ``recent`` ones; with the
  tokens since they form the run without gaps, in which causality is known: no query before that run
  is observed.
- A kvpress scorer gets what ``kvpress.DecodingPress`` would give it: all pairs, and the hidden
  states of the last tokens alone. Where heads hold different numbers, pairs are padded with zeros
  at the left, whose scores are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from moekv import budget as budgets
from moekv.budget import Grown, Kept, select_grown
from moekv.cache.caches import growing, present, recompress
from moekv.cache.layer import CompressedLayer
from moekv.cache.notes import note, remember
from moekv.cache.ragged import RaggedLayer, count_stored
from moekv.cache.rows import read_flags
from moekv.devices import send
from moekv.experts.builder import ViewBuilder
from moekv.models.habits import check_attention
from moekv.models.hooks import choice_of, index_of
from moekv.models.queries import window_queries
from moekv.models.ranks import ALONE
from moekv.press.adoption import expect, most_of
from moekv.press.commit import observe
from moekv.press.forward import Call, Plan, Strategy
from moekv.press.held import Held
from moekv.press.measuring import measure
from moekv.press.rating import Rating
from moekv.routing.mixing import order


@dataclass
class Shrinking:
    """The pairs to retain after a forward in which pairs are evicted.

    Attributes
    ----------
    padding : list of B ints
        Of the rows, in positions of the mask.
    keep : list of B ints
        Pairs of a head to retain in each row, on average.
    groups : list of list of int
        Rows in which pairs are evicted, rated together where they have as many last inputs and
        the same kind of view, so that each is rated as by itself. Rows within their limit are left
        alone.
    windows : list of int
        Number of last inputs of each group.
    ragged : bool
        Whether layers become ragged even where all heads retain as many.
    stores : bool
        Whether new pairs of all rows are stored in the format of the others. Otherwise, where that
        rounds them, it is done for rows in which pairs are evicted: as for each by itself.

    Without groups no pair is evicted, and the new ones are stored.
    """

    padding: list[int]
    keep: list[int]
    groups: list[list[int]]
    windows: list[int]
    ragged: bool
    stores: bool


@dataclass
class Rated:
    """A layer, and the ratings of its groups of rows."""

    layer: CompressedLayer
    index: int
    held: Held  # sizes alone, as in the parts
    parts: list[tuple[Held, Rating]]
    storable: Tensor | None  # bool, a scalar: whether all its pairs are, if that is to be seen


class Growth(Strategy):
    """Tokens for a cache that is not empty, under `decoding` or between chunks.

    Parameters
    ----------
    plan : Plan
    view : ViewBuilder
    """

    def __init__(self, plan: Plan, view: ViewBuilder) -> None:
        super().__init__(plan, view)
        self._shrinking: Shrinking | None = None
        self._rated: list[Rated] = []
        self._measures = False
        self._waiting: Cache | None = None
        self._ranks = ALONE  # that share out the heads of the layer

    def take(self, call: Call) -> None:
        """Note a layer's new tokens, rate it if it is time, and compress after the last layer."""
        plan, options = self.plan, self.plan.options
        layer = self._growing(call.cache, call.index)
        self._ranks = self.view.ranks(call.module, layer.num_heads)
        call.asked = asked = call.asked or window_queries(
            call.module, call.hidden_states, call.kwargs, options.window, 0, self.view.rotary
        )
        remember(layer, call.hidden_states, asked.query, options.window)
        if call.module is plan.layers[0]:
            self._measures = plan.later.is_due(layer)
        if self._measures:
            measure(call, plan, self.view)
        call.asked = replace(
            asked, query=asked.query[:0]
        )  # frees what may be as large as the layer
        calibrated = plan.rater.calibrated
        if calibrated is not None:
            with torch.no_grad():
                choice = choice_of(call.choice, len(call.hidden_states))
                projected = calibrated.project(call.index, call.hidden_states, choice)
                own = self._ranks.own(layer.num_heads)
                note(layer, calibrated.read(call.index, projected)[:, own])
        if call.module is plan.layers[0]:
            fed = call.hidden_states.shape[1]
            self._shrinking = self._decide(call.cache, fed, call.kwargs.get("attention_mask"))
        self.num_taken += 1
        if self._shrinking is None:
            return
        with torch.no_grad():
            with present(call.cache, call.index):
                self._rate(call, layer, self._shrinking)
            if self.is_done and plan.shares:
                self._waiting = call.cache
            elif self.is_done:
                self._shrink(call.cache, self._shrinking)

    @torch.no_grad()
    def finish(self) -> Cache | None:
        """Compress what later layers have attended to as well."""
        cache, self._waiting = self._waiting, None
        if cache is not None and self._shrinking is not None:
            self._shrink(cache, self._shrinking)
        return cache

    def _growing(self, cache: Cache, index: int) -> CompressedLayer:
        layer = cache.layers[index]
        if isinstance(layer, CompressedLayer):
            return layer
        with present(cache, index):
            return growing(cache, index, backend=self.plan.options.backend)

    def _rate(self, call: Call, layer: CompressedLayer, shrinking: Shrinking) -> None:
        options, rater = self.plan.options, self.plan.rater
        held = Held.of(layer, shrinking.padding, self._ranks)
        assert layer.recent is not None
        able = layer.all_storable() if options.quantises else None
        rated = Rated(layer, call.index, held.sizes(), [], able)
        for rows, window in zip(shrinking.groups, shrinking.windows, strict=True):
            part = held.rows(rows)
            own = None if part is held else send(rows, held.keys.device)
            view = part.view(
                call.module,
                _of_rows(layer.recent.states(window), own, layer.batch_size),
                _of_rows(layer.recent.queries(window), own, layer.batch_size),
                call.asked,
                _of_rows(call.attentions, own, layer.batch_size),
                {k: _of_rows(x, own, layer.batch_size) for k, x in call.kwargs.items()},
                backend=options.backend,
                rotary=self.view.rotary,
            )
            alone = part.alone([shrinking.keep[b] for b in rows])
            (rating,) = rater.rate([rater.prepare(view)], options, alone, goes_on=True)
            rated.parts.append((part.sizes(), rating))
        self._rated.append(rated)

    def _decide(self, cache: Cache, fed: int, mask: Any) -> Shrinking | None:
        """Decide what to retain when the first layer has new tokens; None: everything."""
        plan, decoding = self.plan, self.plan.options.decoding
        layers = [self._growing(cache, index_of(module)) for module in plan.layers]
        count_stored(x for layer in layers for x in (layer, layer.notes))
        seen, batch = layers[0].get_seq_length(), layers[0].batch_size
        num_heads = layers[0].num_heads * self._ranks.size
        in_prompt = plan.context_length is not None and seen <= plan.context_length
        # A cache in 16 bits is stored when it is met, whatever row is going to be compressed first.
        stores = plan.options.quantises and (in_prompt or any(_is_wide(x) for x in layers))
        padding = [0] * batch

        def too_many(limit: Sequence[int]) -> list[int]:
            # Only the first layer has the new tokens so far.
            coming = [0, *[fed] * (len(layers) - 1)]
            own = [
                n + layer.num_heads * more
                for layer, more in zip(layers, coming, strict=True)
                for n in layer.count_pairs(padding)
            ]
            total = self._ranks.total(own)
            counts = [total[i : i + batch] for i in range(0, len(total), batch)]
            return _exceeds(counts, num_heads, limit, over_model=plan.budget in budgets.OVER_MODEL)

        if in_prompt:
            padding = list(self.view.row_starts(mask, batch))
            gained = layers[0].gain(plan.options.pairs)
            keep = limit = plan.keep([seen - p for p in padding], seen, gained)
        elif decoding is not None:
            keep = [decoding.target] * batch
            limit = [decoding.target + decoding.interval - 1] * batch
            if stores or too_many(limit):
                padding = list(self.view.row_starts(mask, batch))
        else:
            return None
        rows = too_many(limit)
        if not rows:
            return Shrinking(padding, keep, [], [], True, True) if stores else None
        assert layers[0].recent is not None
        counts = layers[0].recent.counts()
        lengths = self._ranks.lengths([layer.head_lengths(padding) for layer in layers])
        groups: dict[tuple[Any, ...], list[int]] = {}
        for b in rows:
            window = max(min(plan.options.window, counts[b], seen - padding[b]), 1)
            kinds = [_seen_as(held[b], fed if i else 0, window) for i, held in enumerate(lengths)]
            groups.setdefault((window, *kinds), []).append(b)
        ragged = plan.budget not in budgets.DENSE or in_prompt or any(padding)
        ragged = ragged or plan.options.quantises
        if ragged:
            what = "heads or layers of different lengths"
            check_attention(plan.layers, self.view.rotary, what)
        windows = [window for window, *_ in groups]
        return Shrinking(padding, keep, list(groups.values()), windows, ragged, stores)

    def _shrink(self, cache: Cache, shrinking: Shrinking) -> None:
        """Compress the rated layers."""
        self.plan.name_used()
        kept: list[list[Kept]] = []  # of each group, of each layer
        for group, rows in enumerate(shrinking.groups):
            parts = [
                (held.of_all_heads(), rating)
                for held, rating in (rated.parts[group] for rated in self._rated)
            ]
            keep = [shrinking.keep[b] for b in rows]
            kept.append(self._choose(parts, keep, dense=not shrinking.ragged))
        checked = read_flags([rated.storable for rated in self._rated])
        for rated, known, *chosen in zip(self._rated, checked, *kept, strict=True):
            whole = _merge(rated.held.of_all_heads(), shrinking.groups, chosen)
            if shrinking.ragged:
                whole = replace(whole, per_head=None)
            with present(cache, rated.index):
                self._leave(cache, rated, whole, shrinking, checked=known)
            for (_, rating), part in zip(rated.parts, chosen, strict=True):
                self._observe(rating, part)
            if list(map(len, shrinking.groups)) == [len(rated.held.lengths)]:  # all rows at once
                part, rating = rated.parts[0]
                wanted = rating.wanted
                if wanted is not None:
                    wanted = wanted.view(part.of_all_heads().shape)
                    wanted = functional.pad(wanted, (whole.shape[2] - wanted.shape[2], 0))
                own = rated.held.ranks.own(rated.held.shape[1])
                self.plan.later.remember(
                    cache.layers[rated.index],
                    None if wanted is None else wanted[:, own],
                    whole.of_heads(own),
                    self.plan.rater.names,
                )

    def _choose(
        self, parts: Sequence[tuple[Held, Rating]], keep: Sequence[int], *, dense: bool
    ) -> list[Kept]:
        """Choose the pairs to retain; all rows of a dense layer retain as many."""
        options = self.plan.options

        def under(budget: str, layers: slice, keep: Sequence[int]) -> list[Kept]:
            these = parts[layers]
            votes = [rating.votes.view(*held.shape[:2]) for held, rating in these]
            scores = order(votes, budget, [held.real for held, _ in these])
            return select_grown(
                [
                    Grown(x, held.start, held.lengths)
                    for x, (held, _) in zip(scores, these, strict=True)
                ],
                keep,
                budget=budget,
                sinks=options.sinks,
                recent=self.plan.recent,
                backend=options.backend,
            )

        lengths = [[min(row) for row in held.lengths] for held, _ in parts]
        alike = dense and all(held.start is None for held, _ in parts)
        return budgets.choose(under, self.plan.budget, keep, lengths, alike=alike)

    def _leave(
        self, cache: Cache, rated: Rated, kept: Kept, shrinking: Shrinking, *, checked: bool
    ) -> None:
        """Compress one layer; `kept` are the pairs that the heads of all processes retain.

        `checked`: whether all pairs are known to be storable in a quantised format.
        """
        plan, before = self.plan, rated.layer
        heads = len(rated.held.everywhere[0])
        held = [sum(row) for row in rated.held.everywhere]
        seen = before.get_seq_length()
        # The run without gaps that another block has left, and the tokens since.
        since = before.run + seen - before.context_length
        runs = [since] * len(held)
        newest = [seen] * len(held)
        leaving = [b for rows in shrinking.groups for b in rows]
        for b in leaving:
            keep, had = shrinking.keep[b], held[b] // heads
            if (
                plan.budget in budgets.OVER_MODEL
            ):  # pairs may have been evicted however few there were
                had = keep + 1
            run = plan.run_without_gaps([keep], [had])
            if run is not None:
                runs[b], newest[b] = min(run, since), run
        # For rows that are left alone the least number of pairs is not known.
        least = min(shrinking.keep) if len(leaving) == len(held) else 0
        # More room than that is given back.
        before.most = most_of(before, plan, least, kept.per_head)
        options, index = plan.options, rated.index
        own = rated.held.own(kept)
        alone = None if shrinking.stores or len(leaving) == len(held) else leaving
        how: dict[str, Any] = {"pairs": options.pairs, "alone": alone, "checked": checked}
        layer = recompress(cache, index, own, **how, backend=options.backend)
        expect(layer, plan, min(runs), least, kept.per_head)
        if layer.recent is not None:
            layer.recent.keep(newest)
        wait = layer.num_waiting(shrinking.padding) if isinstance(layer, RaggedLayer) else 0
        self._record(layer, kept, sum(held), heads * wait)
        plan.statistics.hold(index, kept.counts())
        plan.statistics.follow(cache, plan.most)

    def _observe(self, rating: Rating, kept: Kept) -> None:
        """Record a rating, and the pairs that are retained."""
        share = kept.mask().float()
        rows = rating.seen.shares.shape[1]
        share = share.mean(1) if len(share) == rows else share.flatten(0, 1)
        observe([rating], self.plan.rater, self.plan.statistics, [share])

    def _record(self, layer: CompressedLayer, kept: Kept, num_held: int, waiting: int) -> None:
        """Count the pairs that were added since the last count, and those retained.

        But for such as wait in the tail, which are counted when they are stored.
        """
        statistics = self.plan.statistics
        owner, counted = layer.counted
        counted = counted if owner == statistics.epoch else 0
        num_kept = len(kept.indices) - waiting
        before, after = num_held - waiting - counted, num_kept - counted
        came, stored = layer.bytes_per_pair, layer.stored_bytes_per_pair
        statistics.count((before, after), (before * came, after * stored), Fraction(came, stored))
        layer.counted = (statistics.epoch, num_kept)


def _exceeds(
    counts: Sequence[Sequence[int]], num_heads: int, limit: Sequence[int], *, over_model: bool
) -> list[int]:
    """Find the rows that hold more than their limit in any layer, or in all together.

    Parameters
    ----------
    counts : sequence of L sequences of B ints
        Pairs of each layer's rows, all heads together.
    num_heads : int
        KV heads of a layer.
    limit : sequence of B ints
        Pairs of a head.
    over_model : bool
        Whether the layers share their budget.
    """
    if over_model:
        num_heads *= len(counts)
        counts = [[sum(row) for row in zip(*counts, strict=True)]]
    return [b for b, most in enumerate(limit) if any(rows[b] > num_heads * most for rows in counts)]


def _seen_as(lengths: Sequence[int], coming: int, window: int) -> tuple[bool, bool]:
    """Return the kind of view: whether heads differ, and whether all tokens are known."""
    return len(set(lengths)) > 1, max(lengths) + coming <= window


def _is_wide(layer: CompressedLayer) -> bool:
    """Whether a layer is in 16 bits, and was not asked to be in fewer."""
    return not isinstance(layer, RaggedLayer) or layer.pairs == "16"


def _of_rows(value: Any, rows: Tensor | None, batch: int) -> Any:
    """Select rows of a tensor that has one for each row of the batch, or of a tuple of such.

    `rows`: their numbers; None: all.
    """
    if isinstance(value, tuple):
        return tuple(_of_rows(x, rows, batch) for x in value)
    if rows is None or not isinstance(value, Tensor) or value.dim() < 2 or len(value) != batch:
        return value
    return value[rows.to(value.device)]


def _merge(held: Held, groups: Sequence[Sequence[int]], chosen: Sequence[Kept]) -> Kept:
    """Join what the rows of a layer retain. Rows of no group retain all that they hold."""
    if len(groups) == 1 and len(groups[0]) == len(held.lengths):
        (kept,) = chosen
        if kept.shape == held.shape:
            return kept
    mask, count = held.real, 0
    for rows, kept in zip(groups, chosen, strict=True):
        stays = kept.mask()
        mask[send(rows, mask.device), :, mask.shape[2] - stays.shape[2] :] = stays
        count += len(kept.indices)
    leaving = {b for rows in groups for b in rows}
    count += sum(sum(row) for b, row in enumerate(held.lengths) if b not in leaving)
    return Kept.from_mask(mask, count)

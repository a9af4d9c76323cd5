"""Compression of a cache that goes on growing: during decoding, and between chunks of a prefill.

A growing cache is compressed again and again. Every time its layers are rated as after a prefill,
with two differences. Only the last tokens' hidden states are known (``moekv.cache.recent``): they
give the window of queries and, on average, the gate weights of all pairs. And what is left of a
sequence has gaps: **places are not positions**. An expert sees the pairs of a head in their order,
as if nothing had ever stood between them, and may not take the place of a pair for its position in
the text; keys carry the rotation of their true positions, and so do the window's queries. What
that means for the experts of moekv:

- ``aggressive``, ``moderate``, ``conservative`` keep shares of what is left, so that with every
  compression the text's beginning weighs more.
- ``temporal`` takes the number of pairs behind one for its age, which is a lower bound, and
  partitions of pairs that are left for partitions of the text.
- ``selective`` averages over neighbours that are left.
- ``learned``, of calibrated routers, alone knows true positions: what it needs of a token is noted
  beside its pair when it comes (``moekv.cache.notes``).
- Sinks stay the text's own: they never leave. So do the last ``recent`` ones, and with the
  tokens since they make up the run of pairs without gaps, in which causality is known: no query
  older than that run is asked.
- A kvpress scorer gets what ``kvpress.DecodingPress`` would give it: all pairs, and the hidden
  states of the last tokens alone. Where heads hold different numbers, theirs stand at the right,
  behind zeros, whose scores are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from moekv.budget import Grown, Kept, select_grown
from moekv.cache.caches import growing, recompress
from moekv.cache.growing import GrowingLayer
from moekv.cache.layer import CompressedLayer
from moekv.cache.notes import note, remember, take_notes
from moekv.experts.builder import ViewBuilder
from moekv.experts.view import LayerView
from moekv.models.habits import check_attention
from moekv.models.hooks import index_of
from moekv.models.queries import window_queries
from moekv.press.commit import observe
from moekv.press.forward import Call, Plan, Strategy
from moekv.press.held import Held
from moekv.press.rating import Rating


@dataclass
class Shrinking:
    """What is to stay after a forward in which pairs leave.

    Attributes
    ----------
    padding : list of B ints
        Of the rows, in positions of the mask.
    keep : list of B ints
        Pairs of a head that stay in each row, on average.
    ragged : bool
        Whether layers become ragged even where all heads keep as many.
    """

    padding: list[int]
    keep: list[int]
    ragged: bool


class Growth(Strategy):
    """Tokens for a cache that holds some, in a block in which compression goes on.

    Parameters
    ----------
    plan : Plan
    view : ViewBuilder
    """

    def __init__(self, plan: Plan, view: ViewBuilder) -> None:
        super().__init__(plan, view)
        self._shrinking: Shrinking | None = None
        self._grown: list[tuple[CompressedLayer, Grown, Rating]] = []
        self._num_taken = 0

    @property
    def is_done(self) -> bool:
        """Whether all layers have come."""
        return self._num_taken == len(self.plan.layers)

    def take(self, call: Call) -> None:
        """Remember what a layer has got, rate it if it is time, and act after the last."""
        plan, options = self.plan, self.plan.options
        layer = growing(call.cache, call.index, backend=options.backend)
        asked = call.asked or window_queries(
            call.module, call.hidden_states, call.kwargs, options.window, 0, self.view.rotary
        )
        remember(layer, call.hidden_states, asked.query, options.window)
        call.asked = replace(asked, query=asked.query[:0])  # what may be as large as the layer
        calibrated = plan.rater.calibrated
        if calibrated is not None:
            with torch.no_grad():
                projected = calibrated.project(call.index, call.hidden_states)
                note(layer, calibrated.read(call.index, projected))
        if call.module is plan.layers[0]:
            fed = call.hidden_states.shape[1]
            self._shrinking = self._decide(call.cache, fed, call.kwargs.get("attention_mask"))
        self._num_taken += 1
        if self._shrinking is None:
            return
        with torch.no_grad():
            self._rate(call, layer, self._shrinking)
            if self.is_done:
                self._shrink(call.cache, self._shrinking)

    def _rate(self, call: Call, layer: CompressedLayer, shrinking: Shrinking) -> None:
        options, rater = self.plan.options, self.plan.rater
        held = Held.of(layer, shrinking.padding)
        assert layer.recent is not None
        view = held.view(
            call.module,
            layer.recent.states(options.window),
            layer.recent.queries(options.window),
            call.asked,
            call.attentions,
            call.kwargs,
            kinds=rater.kinds,
            backend=options.backend,
            rotary=self.view.rotary,
        )
        (rating,) = rater.rate([rater.look(view)], options, held.alone(shrinking.keep))
        grown = Grown(rating.scores.view(held.shape), held.start, held.lengths)
        self._grown.append((layer, grown, rating))

    def _decide(self, cache: Cache, fed: int, mask: Any) -> Shrinking | None:
        """Say what is to stay of a cache whose first layer has got new tokens; None: all."""
        plan, decoding = self.plan, self.plan.options.decoding
        layers = [
            growing(cache, index_of(module), backend=plan.options.backend) for module in plan.layers
        ]
        seen, batch = layers[0].get_seq_length(), layers[0].batch_size
        in_prompt = plan.context_length is not None and seen <= plan.context_length
        padding = [0] * batch

        def too_many(limit: Sequence[int]) -> bool:
            # All but the first layer still have to get the new tokens.
            coming = [0, *[fed] * (len(layers) - 1)]
            counts = [
                [n + layer.num_heads * more for n in layer.count_pairs(padding)]
                for layer, more in zip(layers, coming, strict=True)
            ]
            return _exceeds(counts, layers[0].num_heads, limit, over_model=plan.budget == "model")

        if in_prompt:
            padding = list(self.view.row_starts(mask, batch))
            keep = limit = plan.keep([seen - p for p in padding], seen)
        elif decoding is not None:
            keep = [decoding.target] * batch
            limit = [decoding.target + decoding.interval - 1] * batch
            if too_many(limit):
                padding = list(self.view.row_starts(mask, batch))
        else:
            return None
        if not too_many(limit):
            return None
        ragged = in_prompt or any(padding) or plan.budget != "uniform"
        if ragged:
            what = "heads or layers of different lengths"
            check_attention(plan.layers[0], self.view.rotary, what)
        return Shrinking(padding, keep, ragged)

    def _shrink(self, cache: Cache, shrinking: Shrinking) -> None:
        """Let pairs leave the rated layers."""
        plan, options = self.plan, self.plan.options
        kept = select_grown(
            [grown for _, grown, _ in self._grown],
            shrinking.keep,
            budget=plan.budget,
            sinks=options.sinks,
            recent=plan.recent,
            backend=options.backend,
        )
        if shrinking.ragged:
            kept = [replace(chosen, per_head=None) for chosen in kept]
        for (_, grown, rating), chosen in zip(self._grown, kept, strict=True):
            layer = recompress(cache, rating.index, chosen, backend=options.backend)
            held = [sum(row) for row in grown.lengths]
            heads = grown.scores.shape[1]
            run = plan.run_without_gaps(shrinking.keep, [n // heads for n in held])
            _expect(layer, plan, run)
            if layer.recent is not None:
                layer.recent.keep(layer.run)
            self._record(layer, rating, chosen, sum(held))

    def _record(self, layer: CompressedLayer, rating: Rating, kept: Kept, num_held: int) -> None:
        """Count the pairs that have come since those of the layer were counted, and what stays."""
        statistics = self.plan.statistics
        share = kept.mask().float()
        rows = rating.seen.shares.shape[1]
        share = share.mean(1) if len(share) == rows else share.flatten(0, 1)
        observe([rating], self.plan.rater, statistics, [share])
        owner, counted = layer.counted
        counted = counted if owner == statistics.epoch else 0
        num_kept = len(kept.indices)
        before, after, pair = num_held - counted, num_kept - counted, layer.bytes_per_pair
        statistics.count((before, after), (before * pair, after * pair))
        layer.counted = (statistics.epoch, num_kept)


def last_states(plan: Plan, hidden_states: Tensor, view: LayerView) -> tuple[Tensor, Tensor] | None:
    """Copy inputs and queries of the last tokens of a prefill that no head will lack.

    Parameters
    ----------
    plan : Plan
    hidden_states : Tensor [B, T, hidden]
        Of an attention layer.
    view : LayerView
        Of the layer.

    Returns
    -------
    tuple of Tensor [B, N, hidden] and [B, Hq, N, D], or None where compression does not go on.
    """
    if not plan.goes_on:
        return None
    length, lengths = hidden_states.shape[1], view.lengths
    run = plan.run_without_gaps(plan.keep(lengths, length), lengths)
    run = plan.options.window if run is None else min(plan.options.window, run)
    run = min(run, view.queries.shape[2])
    queries = view.queries[:, :, view.queries.shape[2] - run :]
    return hidden_states[:, length - run :].clone(), queries.clone()


def read_of(plan: Plan, index: int, projected: Tensor | None) -> Tensor | None:
    """Say what is to be noted of what a calibrated router reads of new tokens.

    Parameters
    ----------
    plan : Plan
    index : int
        Of the layer.
    projected : Tensor [B, N, H + E] or None
        See ``CalibratedRouter.project``.

    Returns
    -------
    Tensor [B, H, N], float32, or None
        None where there is none, or compression does not go on.
    """
    router = plan.rater.calibrated
    if router is None or projected is None or not plan.goes_on:
        return None
    return router.read(index, projected)


def adopt(
    cache: Cache,
    index: int,
    plan: Plan,
    rating: Rating,
    kept: Kept | None,
    recent: tuple[Tensor, Tensor] | None,
    read: Tensor | None,
) -> None:
    """Make a layer ready for the next compression after its prefill, if there is to be one.

    Parameters
    ----------
    cache : Cache
    index : int
        Of the layer.
    plan : Plan
    rating : Rating
        Of the layer.
    kept : Kept or None
        What it holds now; None: all.
    recent, read
        See :func:`last_states`, without which nothing is done, and :func:`read_of`.
    """
    if recent is None:
        return
    backend = plan.options.backend
    layer = growing(cache, index, backend=backend)
    remember(layer, *recent, plan.options.window)
    if read is not None:
        layer.notes = take_notes(read, kept, backend=backend)
    _expect(layer, plan, layer.run)
    padding = [rating.scores.shape[2] - n for n in rating.lengths]
    layer.counted = (plan.statistics.epoch, sum(layer.count_pairs(padding)))


def _expect(layer: CompressedLayer, plan: Plan, run: int | None) -> None:
    """Tell a layer how far it may be cropped, and how far it will grow, where that is known."""
    layer.hold_run(run)
    decoding = plan.options.decoding
    if decoding is not None:
        layer.most = decoding.interval
        if isinstance(layer, GrowingLayer):
            layer.most += decoding.target
    if layer.notes is not None:
        layer.notes.run = layer.run
        if decoding is not None:
            layer.notes.most = layer.most


def _exceeds(
    counts: Sequence[Sequence[int]], num_heads: int, limit: Sequence[int], *, over_model: bool
) -> bool:
    """Say whether a row of any layer, or of all together, holds more than its limit.

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
    return any(
        count > num_heads * most for rows in counts for count, most in zip(rows, limit, strict=True)
    )

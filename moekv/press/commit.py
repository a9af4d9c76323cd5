"""From votes to evictions: chooses the pairs to retain, compresses layers, records statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from moekv import budget as budgets
from moekv.budget import Kept, select, without_padding
from moekv.cache.caches import empty_cache, evict, held_bytes, is_static
from moekv.cache.folding import Folding
from moekv.cache.layer import CompressedLayer
from moekv.cache.ragged import RaggedLayer
from moekv.cache.static import compact
from moekv.models.ranks import ALONE, Ranks
from moekv.press.forward import Plan
from moekv.press.hits import kept_alone
from moekv.press.rater import Rater
from moekv.press.rating import Rating, protected
from moekv.press.stats import Statistics
from moekv.routing.mixing import order


def choose(ratings: Sequence[Rating], plan: Plan) -> list[Kept | None]:
    """Return the pairs that each layer retains; None: all.

    The one place where a dominant policy and a model's budget wait for the device.
    """
    options = plan.options
    if not plan.acts:
        return [None] * len(ratings)
    plan.name_used()
    if not plan.evicts:
        return _everything(ratings, plan)
    if options.policy == "dominant":
        return _choose_by_dominant(ratings, plan)
    first = ratings[0]
    num_keys = first.votes.shape[2]
    totals = plan.keep(first.lengths, num_keys, first.gain)
    if first.start is None and totals[0] == num_keys:
        return _everything(ratings, plan)
    sinks, recent = protected_in(first, plan)

    def under(budget: str, layers: slice, totals: Sequence[int]) -> list[Kept]:
        these = ratings[layers]
        return select(
            order([r.votes for r in these], budget, [r.real for r in these]),
            first.start,
            totals,
            budget=budget,
            sinks=sinks,
            recent=recent,
            backend=options.backend,
        )

    lengths = [first.lengths] * len(ratings)
    chosen = budgets.choose(under, plan.budget, totals, lengths, alike=first.start is None)
    # So far a row may consist of padding alone.
    chosen = [without_padding(kept, first.start, first.lengths) for kept in chosen]
    if plan.context_length is not None or options.quantises:
        chosen = [replace(kept, per_head=None) for kept in chosen]
    return list(chosen)


def _everything(ratings: Sequence[Rating], plan: Plan) -> list[Kept | None]:
    """Retain all pairs, in ragged layers if they are quantised."""
    if not plan.options.quantises:
        return [None] * len(ratings)
    return [Kept.everything(r.votes.shape, r.real, r.votes.scores.device) for r in ratings]


def protected_in(rating: Rating, plan: Plan) -> tuple[int, int]:
    """Count the first and last positions that are always retained."""
    sinks, recent = protected(rating, plan.options)
    return sinks, max(recent, plan.recent) if rating.ends else recent


def _choose_by_dominant(ratings: Sequence[Rating], plan: Plan) -> list[Kept | None]:
    dominant = [r.dominant for r in ratings if r.dominant is not None]
    numbers = torch.stack([r.to(dominant[0].device) for r in dominant]).tolist()
    chosen: list[Kept] = []
    for rating, number in zip(ratings, numbers, strict=True):
        totals = kept_alone(plan.rater.experts[number], rating.lengths, plan.options, rating.gain)
        chosen += select(
            [rating.votes.scores[0]],
            rating.start,
            totals,
            sinks=0,
            recent=0,
            backend=plan.options.backend,
        )
    if len({kept.per_head for kept in chosen}) > 1 or plan.options.quantises:
        # A mask serves dense layers of one length only; ragged ones may differ.
        chosen = [replace(kept, per_head=None) for kept in chosen]
    return list(chosen)


def apply(
    cache: Cache,
    index: int,
    kept: Kept | None,
    plan: Plan,
    run: int | None,
    folding: Folding | None = None,
    ranks: Ranks = ALONE,
    *,
    checked: bool = False,
) -> tuple[int, int]:
    """Compress a layer of a cache.

    Parameters
    ----------
    cache : Cache
    index : int
        Of the layer.
    kept : Kept or None
    plan : Plan
    run : int or None
        Last positions that every head retains; None: all.
    folding : Folding, optional
        Has evicted pairs join those that stay.
    ranks : Ranks
        The processes that share out the layer's heads; `kept` is of those of this one.
    checked : bool
        Whether all pairs are known to be storable in a quantised format.

    Returns
    -------
    before, after : int
        Bytes of the layer's storages in this process.
    """
    before = after = held_bytes(cache.layers[index])
    if is_static(cache):
        compact(cache, index, kept, backend=plan.options.backend)
    elif kept is not None:
        options = plan.options
        how: dict[str, Any] = {"pairs": options.pairs, "checked": checked}
        how |= {"folding": folding, "backend": options.backend}
        before, after = evict(cache, index, kept, **how)
        layer = cache.layers[index]
        assert isinstance(layer, CompressedLayer)
        layer.hold_run(run)
        if isinstance(layer, RaggedLayer) and layer.num_joined is not None:
            plan.statistics.join(ranks.gather(layer.num_joined.view(1), 0).sum())
    return before, after


@contextmanager
def whole_or_empty(cache: Cache) -> Iterator[None]:
    """Empty a cache if the block raises, as when memory runs out.

    A cache of which some layers are compressed cannot be used.
    """
    try:
        yield
    except BaseException:
        empty_cache(cache)
        raise


def observe(
    ratings: Sequence[Rating],
    rater: Rater,
    statistics: Statistics,
    kept: Sequence[Tensor] | None = None,
) -> None:
    """Record ratings, and the share [B, T] of heads that retain each position, if any left."""
    first = 0
    while first < len(ratings):
        seen = ratings[first].seen  # of the layers that were rated together
        last = first + len(seen.load)
        shares = None if kept is None else torch.stack(list(kept[first:last]))
        indices = [r.index for r in ratings[first:last]]
        statistics.observe(indices, seen.among(len(rater.experts)), shares)
        for index, rates in zip(indices, seen.hit_rates.unbind(), strict=True):
            if len(rates) > len(rater.shared):
                rater.routers.take_in(index, rates[len(rater.shared) :])
        first = last


def record(
    ratings: Sequence[Rating],
    kept: Sequence[Kept | None],
    num_bytes: Iterable[tuple[int, int]],
    rater: Rater,
    statistics: Statistics,
) -> None:
    """Count the retained pairs of rated layers, and their bytes before and after."""
    everywhere = torch.ones_like(ratings[0].votes.scores[0, :, 0])
    shares = [
        everywhere.to(r.votes.scores.device) if k is None else k.share()
        for r, k in zip(ratings, kept, strict=True)
    ]
    observe(ratings, rater, statistics, shares)
    for rating, chosen, change in zip(ratings, kept, num_bytes, strict=True):
        pairs = rating.votes.shape[1] * sum(rating.lengths)
        stay = pairs if chosen is None else len(chosen.indices)
        gain = Fraction(1) if chosen is None else rating.gain
        statistics.count((pairs, stay), change, gain)
        heads = rating.votes.shape[1]
        statistics.hold(
            rating.index,
            torch.tensor(rating.lengths, device="cpu")[:, None].expand(-1, heads)
            if chosen is None
            else chosen.counts(),
        )

"""Prepares a layer for the next compression: last hidden states, notes, and room."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor
from transformers import Cache

from moekv.budget import Kept
from moekv.cache.caches import growing
from moekv.cache.layer import CompressedLayer
from moekv.cache.notes import remember, take_notes
from moekv.cache.rows import gain
from moekv.experts.view import LayerView
from moekv.models.hooks import index_of
from moekv.press.forward import Plan
from moekv.press.rating import Rating


def last_states(plan: Plan, hidden_states: Tensor, view: LayerView) -> tuple[Tensor, Tensor] | None:
    """Copy inputs and queries of the last tokens of a prefill, whose pairs every head retains.

    Parameters
    ----------
    plan : Plan
    hidden_states : Tensor [B, T, hidden]
        Of an attention layer.
    view : LayerView
        Of the layer.

    Returns
    -------
    tuple of Tensor [B, N, hidden] and [B, Hq, N, D], or None where the cache is compressed once.
    """
    if not plan.goes_on:
        return None
    length = hidden_states.shape[1]
    stored = gain(plan.options.pairs, view.keys, view.values)
    newest = min(max(_newest(plan, view.lengths, length, stored)), view.queries.shape[2])
    queries = view.queries[:, :, view.queries.shape[2] - newest :]
    return hidden_states[:, length - newest :].clone(), queries.clone()


def _newest(plan: Plan, lengths: Sequence[int], length: int, stored: Fraction) -> list[int]:
    """Count the last tokens of each row whose pairs every head retains, at most a window.

    Parameters
    ----------
    plan : Plan
    lengths : sequence of B ints
        Real tokens of each row.
    length : int
        Padding included.
    stored : Fraction
        Pairs that are stored in the bytes of one.
    """
    keep = plan.keep(lengths, length, stored)
    runs = [plan.run_without_gaps([k], [n]) for k, n in zip(keep, lengths, strict=True)]
    window = plan.options.window
    return [
        min(window, n if run is None else min(n, run)) for n, run in zip(lengths, runs, strict=True)
    ]


def read_of(plan: Plan, view: LayerView) -> Tensor | None:
    """Return what a calibrated router notes of new tokens.

    Parameters
    ----------
    plan : Plan
    view : LayerView
        Of a layer, with the router's projection of its hidden states if there is one.

    Returns
    -------
    Tensor [B, H, N], float32, or None
        None without a calibrated router, or where the cache is compressed once.
    """
    router = plan.rater.calibrated
    if router is None or view.read is None or not plan.goes_on:
        return None
    return router.read(index_of(view.module), view.read)[:, view.own_heads]


def adopt(
    cache: Cache,
    index: int,
    plan: Plan,
    rating: Rating,
    kept: Kept | None,
    recent: tuple[Tensor, Tensor] | None,
    read: Tensor | None,
) -> None:
    """Prepare a layer for the next compression after its prefill, if there will be one.

    Parameters
    ----------
    cache : Cache
    index : int
        Of the layer.
    plan : Plan
    rating : Rating
        Of the layer.
    kept : Kept or None
        The pairs that its heads in this process retain; None: all.
    recent, read
        See :func:`last_states` and :func:`read_of`. Nothing is done if `recent` is None.
    """
    if recent is None:
        return
    backend = plan.options.backend
    layer = growing(cache, index, backend=backend)
    remember(layer, *recent, plan.options.window)
    assert layer.recent is not None
    layer.recent.keep(_newest(plan, rating.lengths, rating.votes.shape[2], rating.gain))
    if read is not None:
        layer.notes = take_notes(read, kept, backend=backend)
        layer.reader = plan.rater.reader
    stay = plan.keep(rating.lengths, rating.votes.shape[2], rating.gain)
    held = None if layer.is_ragged else rating.votes.shape[2] if kept is None else kept.per_head
    expect(layer, plan, layer.run, min(stay), held)
    own = layer.num_heads * sum(rating.lengths) if kept is None else len(kept.indices)
    (counted,) = rating.ranks.total([own])
    layer.counted = (plan.statistics.epoch, counted)


def expect(
    layer: CompressedLayer, plan: Plan, run: int | None, least: int, held: int | None
) -> None:
    """Set how far a layer may be cropped, and how far it will grow, where that is known.

    See :func:`most_of`.
    """
    layer.hold_run(run)
    layer.most = most_of(layer, plan, least, held)
    if layer.notes is not None:
        layer.notes.run, layer.notes.most = layer.run, layer.most


def most_of(layer: CompressedLayer, plan: Plan, least: int, held: int | None) -> int | None:
    """Return the pairs that a layer gets room for, where that is known.

    Parameters
    ----------
    layer : CompressedLayer
    plan : Plan
    least : int
        Fewest pairs of a head over the rows, on average over heads that share the budget.
    held : int or None
        Pairs that each head of a dense layer holds; None: of a ragged one.
    """
    decoding = plan.options.decoding
    if decoding is None:
        return layer.most
    return (held or 0) + decoding.interval + max(decoding.target - least, 0)

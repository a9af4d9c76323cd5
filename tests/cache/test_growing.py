"""Growing layers against dynamic ones, over random lives of a cache."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from moekv.budget.kept import Kept
from moekv.cache.growing import GrowingLayer
from moekv.cache.pairs import cropped_to
from moekv.models.hooks import CROPS_BY_COUNT


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 300),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("update"), st.integers(1, 90)),
            st.tuples(st.just("crop"), st.integers(-5, 300).filter(bool)),
            st.tuples(st.just("batch_repeat_interleave"), st.integers(1, 2)),
            st.tuples(st.just("reorder_cache"), st.integers(0, 9)),
            st.tuples(st.just("slice"), st.integers(1, 300)),
        ),
        max_size=8,
    ),
)
def test_a_growing_layer_is_a_dynamic_layer(length, steps):
    generator = torch.Generator().manual_seed(length)

    def pairs(batch: int, count: int) -> list[Tensor]:
        return [torch.randn(batch, 2, count, dim, generator=generator) for dim in (8, 5)]

    first = pairs(2, length)
    expected, got = DynamicLayer(), GrowingLayer(*[x.clone() for x in first])
    expected.update(*first)
    for name, argument in steps:
        for layer in (expected, got):
            if name == "update":
                generator.manual_seed(argument)
                argument_pairs = pairs(len(layer.keys), argument)
                returned = layer.update(*argument_pairs)
                for got_pairs, held in zip(returned, (layer.keys, layer.values), strict=True):
                    assert got_pairs.data_ptr() == held.data_ptr()
                    assert got_pairs.shape == held.shape
            elif name == "slice":  # as kvpress takes an answer off
                layer.keys = layer.keys[:, :, :argument]
                layer.values = layer.values[:, :, :argument]
            elif name == "reorder_cache":
                layer.reorder_cache(torch.arange(len(layer.keys)).roll(argument))
            elif name == "crop" and layer is expected and CROPS_BY_COUNT and argument > 0:
                layer.crop(min(argument - layer.get_seq_length(), 0))  # lengths it takes no more
            else:
                getattr(layer, name)(argument)
        assert got.get_seq_length() == expected.get_seq_length()
        assert torch.equal(got.keys, expected.keys) and torch.equal(got.values, expected.values)


def test_a_growing_layer_seldom_copies():
    layer = GrowingLayer(torch.zeros(1, 2, 500, 8), torch.zeros(1, 2, 500, 5))
    buffers = set()
    for _ in range(1000):
        layer.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 5))
        buffers.add(layer.keys.data_ptr())
    assert len(buffers) <= 10


def test_longer_keys_and_values_take_their_places_one_after_the_other() -> None:
    """The buffers have room to spare, of which none is shown meanwhile."""
    expected, got = DynamicLayer(), GrowingLayer(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 5))
    expected.update(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 5))
    for layer in (expected, got):
        layer.update(torch.full((1, 2, 1, 8), 2.0), torch.full((1, 2, 1, 5), 3.0))
        layer.keys = torch.cat([layer.keys, torch.full((1, 2, 1, 8), 4.0)], 2)
        assert layer.values.shape[2] == 5
        layer.values = torch.cat([layer.values, torch.full((1, 2, 1, 5), 5.0)], 2)
        layer.update(torch.full((1, 2, 1, 8), 6.0), torch.full((1, 2, 1, 5), 7.0))
    assert torch.equal(got.keys, expected.keys) and torch.equal(got.values, expected.values)
    assert got.get_seq_length() == 7


def test_a_slice_is_a_crop_however_it_is_written() -> None:
    every = slice(None)
    for positions in (slice(3), slice(0, 3), slice(0, 3, 1), slice(None, -2)):
        assert cropped_to((every, every, positions), 5) == 3
        assert cropped_to((..., positions, every), 5) == 3
    for positions in (slice(1, 3), slice(0, 3, 2), 3):
        assert cropped_to((every, every, positions), 5) is None


FORMS: list[Callable[[Tensor], Tensor]] = [
    lambda pairs: pairs,
    lambda pairs: pairs.clone(),
    lambda pairs: copy.copy(pairs.detach()),
    lambda pairs: pairs.to(torch.float32, copy=True).contiguous(),
    lambda pairs: pairs.double().float(),
    torch.clone,
    lambda pairs: pairs * 2,
    lambda pairs: torch.cat([pairs, pairs[:, :, -1:]], 2),
]
OWN_FORMS = 5  # of which it is known what they stand for


def shaped(
    pairs: Tensor, form: Callable[[Tensor], Tensor], part: slice | None, before: bool
) -> Tensor:
    pairs = form(pairs) if before else pairs
    pairs = pairs if part is None else pairs[:, :, part]
    return pairs if before else form(pairs)


def crop(layer: DynamicLayer, length: int) -> None:
    if CROPS_BY_COUNT and isinstance(layer, DynamicLayer) and not isinstance(layer, GrowingLayer):
        length = min(length - layer.get_seq_length(), 0)
    layer.crop(length)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    evicted=st.sampled_from([0, 5, 9]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("update"), st.sampled_from([1, 2, 70])),
            st.tuples(st.just("crop"), st.integers(0, 5)),
            st.tuples(st.just("select"), st.sampled_from(["reorder", "repeat", "rows"])),
            st.tuples(st.just("show"), st.none()),
            st.tuples(
                st.just("assign"),
                st.tuples(
                    st.integers(0, 9),  # which of those shown
                    st.sampled_from([None, 0, 1, 2, 3, 6]),  # how many fewer
                    st.booleans(),  # counted from the end
                    st.sampled_from(range(len(FORMS))),
                    st.booleans(),  # before the slice
                    st.booleans(),  # values first
                ),
            ),
        ),
        min_size=3,
        max_size=14,
    ),
)
def test_whatever_is_assigned_is_held_as_in_a_dynamic_layer_or_refused(
    seed: int, evicted: int, steps: list[Any]
) -> None:
    """Views, slices, copies and calculated pairs, of now or of before, keys or values first."""
    generator = torch.Generator().manual_seed(seed)
    run = 3

    def pairs(batch: int, count: int) -> list[Tensor]:
        return [torch.randn(batch, 2, count, dim, generator=generator) for dim in (8, 5)]

    first = pairs(2, 14)
    stays = torch.ones(2, 2, 14, dtype=torch.bool)
    for row in stays.view(4, 14):
        row[torch.randperm(14 - run, generator=generator)[:evicted]] = False
    expected, got = DynamicLayer(), GrowingLayer(*[x.clone() for x in first])
    expected.update(*first)
    if evicted:
        mask = Kept.from_mask(stays)
        kept = Kept(mask.indices, mask.offsets, mask.shape, 14 - evicted)
        got = GrowingLayer.compress(*first, kept)
        got.hold_run(run)

    def held(whole: Tensor) -> Tensor:
        """Leave what the compressed layer is to hold of a dynamic one's [B, H, T, D]."""
        heads = [
            head[row[: len(head)].tolist() + [True] * (len(head) - 14)]
            for rows, marks in zip(whole, stays, strict=True)
            for head, row in zip(rows, marks, strict=True)
        ]
        return torch.stack(heads).view(*whole.shape[:2], -1, whole.shape[3])

    def check() -> None:
        assert got.get_seq_length() == expected.get_seq_length()
        assert torch.equal(got.keys, held(expected.keys))
        assert torch.equal(got.values, held(expected.values))

    shown, moves = [], 0
    for name, argument in steps:
        length = expected.get_seq_length()
        if name == "update":
            new = pairs(len(expected.keys), argument)
            expected.update(*new), got.update(*new)
        elif name == "crop":
            if evicted and length - argument < 14 - run or argument >= length:
                continue
            crop(expected, length - argument), crop(got, length - argument)
        elif name == "select":
            batch = len(expected.keys)
            rows = torch.randint(batch, (batch,), generator=generator)
            if argument == "repeat" and batch < 8:
                rows = torch.arange(batch).repeat_interleave(2)
                expected.batch_repeat_interleave(2), got.batch_repeat_interleave(2)
            elif argument == "rows":
                expected.batch_select_indices(rows), got.batch_select_indices(rows)
            else:
                expected.reorder_cache(rows), got.reorder_cache(rows)
            stays, moves = stays[rows], moves + 1
        elif name == "show" or not shown:
            both = (expected.keys, expected.values), (got.keys, got.values)
            shown.append((*both, length, moves))
        else:
            which, fewer, from_end, form, before, values_first = argument
            one, other, whole, of = shown[which % len(shown)]
            if fewer is not None and fewer >= whole:
                continue
            end = whole if fewer is None else whole - fewer
            part = slice(-fewer) if fewer and from_end else slice(end)
            names = ["values", "keys"] if values_first else ["keys", "values"]
            how = FORMS[form], None if fewer is None else part, before
            replaced = {k: shaped(one[k == "values"], *how) for k in names}
            offered = {k: shaped(other[k == "values"], *how) for k in names}
            old = of != moves and form < OWN_FORMS
            unknown = form >= OWN_FORMS and (evicted > 0 or replaced["keys"].shape[2] < length)
            refused = old or unknown or (evicted > 0 and end < 14 - run)
            try:
                for k in names:
                    setattr(got, k, offered[k])
            except ValueError:
                assert refused
            else:
                assert not (evicted and refused)
                for k in names:
                    setattr(expected, k, replaced[k])
                if of != moves:
                    return  # other rows
        check()

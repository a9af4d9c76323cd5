"""Keys and values that are assigned to compressed layers, against dynamic ones."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_same, held
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from moekv import MoERouterPress, save_cache
from moekv.budget.kept import Kept
from moekv.cache.folding import Folding
from moekv.cache.growing import GrowingLayer
from moekv.cache.layer import CompressedLayer
from moekv.cache.ragged import RaggedLayer
from moekv.models.hooks import CROPS_BY_COUNT

CONTEXT, RUN = 14, 3
DIMS = 8, 5

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


def crop(layer: Any, length: int) -> None:
    if CROPS_BY_COUNT and not isinstance(layer, CompressedLayer):
        length = min(length - layer.get_seq_length(), 0)
    layer.crop(length)


def both(generator: torch.Generator, batch: int, count: int) -> list[Tensor]:
    return [torch.randn(batch, 2, count, dim, generator=generator) for dim in DIMS]


def compressed(
    kind: str, evicted: int, first: list[Tensor], generator: torch.Generator
) -> tuple[Any, Tensor]:
    """Make a layer of a kind, and mark the pairs that stay in it."""
    stays = torch.ones(2, 2, CONTEXT, dtype=torch.bool)
    for head, row in enumerate(stays.view(4, CONTEXT)):
        count = max(evicted - head, 0) if kind != "dense" else evicted
        row[torch.randperm(CONTEXT - RUN, generator=generator)[:count]] = False
    if kind == "dense" and not evicted:
        return GrowingLayer(*[x.clone() for x in first]), stays
    kept = Kept.from_mask(stays)
    layer: CompressedLayer
    if kind == "dense":
        kept = Kept(kept.indices, kept.offsets, kept.shape, CONTEXT - evicted)
        layer = GrowingLayer.compress(*first, kept)
    else:
        queries = torch.randn(2, 4, 6, DIMS[0], generator=generator)
        folding = Folding(queries, None, {"scaling": 0.4, "softcap": 0.0})
        layer = RaggedLayer.compress(
            *first,
            kept,
            pairs="k8v8" if kind == "quantised" else "16",
            folding=folding if kind == "folded" else None,
        )
    layer.hold_run(RUN)
    return layer, stays


def heads(layer: Any) -> list[tuple[Tensor, Tensor]]:
    """Show what each head holds, the pairs of a dense or a ragged layer."""
    if isinstance(layer, GrowingLayer):
        keys, values = (x.as_subclass(Tensor).flatten(0, 1) for x in (layer.keys, layer.values))
        return list(zip(keys, values, strict=True))
    keys, values, _, lengths = layer.padded()
    rows = zip(keys.flatten(0, 1), values.flatten(0, 1), lengths.flatten().tolist(), strict=True)
    return [(k[len(k) - n :], v[len(v) - n :]) for k, v, n in rows]


def staying(pairs: Tensor, stays: Tensor) -> list[Tensor]:
    """Leave of a dynamic layer's [B, H, T, D] what the heads of a compressed one are to hold."""
    marks = [x.tolist() for x in stays.flatten(0, 1)]
    length = pairs.shape[2]
    return [
        head[row[:length] + [True] * (length - CONTEXT)]
        for head, row in zip(pairs.flatten(0, 1), marks, strict=True)
    ]


@pytest.mark.parametrize("kind", ["dense", "ragged", "quantised", "folded"])
@settings(deadline=None, max_examples=100)
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
                    st.permutations(["keys", "values"]),
                    st.sampled_from([1, 2, 2]),  # one half or both
                ),
            ),
        ),
        min_size=3,
        max_size=14,
    ),
)
def test_whatever_is_assigned_is_held_as_in_a_dynamic_layer_or_refused(
    kind: str, seed: int, evicted: int, steps: list[Any]
) -> None:
    """Views, slices, copies and calculated pairs, of now or of before, one half or both."""
    generator = torch.Generator().manual_seed(seed)
    first = both(generator, 2, CONTEXT)
    got, stays = compressed(kind, evicted, first, generator)
    is_ragged = kind != "dense"
    limit = CONTEXT - RUN if evicted or is_ragged else 0
    expected = DynamicLayer()
    expected.update(*first)
    # As they are read: rounded, or with others folded into them.
    for half, pairs in enumerate((expected.keys, expected.values)):
        for place, row in enumerate(stays.flatten(0, 1)):
            pairs.flatten(0, 1)[place][row] = heads(got)[place][half]

    def is_whole() -> bool:
        return expected.keys.shape[2] == expected.values.shape[2]

    def check() -> None:
        assert got.get_seq_length() == expected.get_seq_length()
        if is_ragged:
            assert got.keys.shape == expected.keys.shape
            assert got.values.shape == expected.values.shape
        if is_whole() or not is_ragged:
            halves = [staying(x, stays) for x in (expected.keys, expected.values)]
            for (keys, values), k, v in zip(heads(got), *halves, strict=True):
                assert torch.equal(keys, k)
                assert torch.equal(values, v)

    shown: list[Any] = []
    moves, context = 0, CONTEXT
    for name, argument in steps:
        length = expected.get_seq_length()
        waits = is_ragged and not is_whole()
        if name == "update":
            new = both(generator, len(expected.keys), argument)
            if waits:
                with pytest.raises(ValueError, match="keys and values of as many positions"):
                    got.update(*new)
            else:
                expected.update(*new), got.update(*new)
        elif name == "crop":
            if length - argument < limit or argument >= length or is_whole() < CROPS_BY_COUNT:
                continue
            crop(expected, length - argument), crop(got, length - argument)
            if is_whole():
                context = min(context, length - argument)
        elif name == "select":
            batch = len(expected.keys)
            rows = torch.randint(batch, (batch,), generator=generator)
            if waits:
                with pytest.raises(ValueError, match="keys and values of as many positions"):
                    got.reorder_cache(rows)
                continue
            if argument == "repeat" and batch < 8:
                rows = torch.arange(batch).repeat_interleave(2)
                expected.batch_repeat_interleave(2), got.batch_repeat_interleave(2)
            elif argument == "rows":
                expected.batch_select_indices(rows), got.batch_select_indices(rows)
            else:
                expected.reorder_cache(rows), got.reorder_cache(rows)
            stays, moves = stays[rows], moves + 1
        elif name == "show" or not shown:
            halves = {k: (getattr(expected, k), getattr(got, k)) for k in ("keys", "values")}
            shown.append((halves, moves, context))
        else:
            which, fewer, from_end, form, before, names, count = argument
            snapshot, of, cut = shown[which % len(shown)]
            form = 0 if is_ragged else form
            for k in names[:count]:
                one, other = snapshot[k]
                whole = one.shape[2]
                if fewer is not None and fewer >= whole:
                    continue
                end = whole - (fewer or 0)
                part = slice(-fewer) if fewer and from_end else slice(end)
                how = FORMS[form], None if fewer is None else part, before
                replaced = shaped(one, *how)
                old = of != moves and form < OWN_FORMS
                gone = is_ragged and end > context < cut
                fewer_than_held = replaced.shape[2] < getattr(expected, k).shape[2]
                unknown = form >= OWN_FORMS and (evicted > 0 or fewer_than_held)
                refused = old or gone or unknown or end < limit
                try:
                    setattr(got, k, shaped(other, *how))
                except ValueError:
                    assert refused
                    break
                assert not (refused and (evicted or is_ragged))
                setattr(expected, k, replaced)
                if of != moves:
                    return  # other rows
                if is_whole():
                    context = min(context, end)
        check()


@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 0, 1, 2]])
@pytest.mark.parametrize("budget", ["none left", "uniform", "model"])
def test_rows_that_are_selected_by_hand(budget: str, rows: list[int]) -> None:
    """As in a `DynamicCache`, also under a mask of their own, or refused, and nothing changes."""
    model, text = tiny_model(), tokens(3, 20)
    whole = prefill(model, text)
    if budget == "none left":
        cache = prefill(model, text)
        kept = Kept.from_mask(torch.ones(3, 2, 20).bool())
        kept = Kept(kept.indices, kept.offsets, kept.shape, 20)
        for index, layer in enumerate(cache.layers):
            cache.layers[index] = GrowingLayer.compress(layer.keys, layer.values, kept)
    else:
        with MoERouterPress(0.5, budget=budget)(model):
            cache = prefill(model, text)
    before = held(cache)
    for layer, dense in zip(cache.layers, whole.layers, strict=True):
        for name in ("keys", "values"):
            if budget == "none left":
                setattr(layer, name, getattr(layer, name)[rows])
            else:
                with pytest.raises((TypeError, ValueError), match="expected (a crop|the 10 pairs)"):
                    setattr(layer, name, getattr(layer, name)[rows])
            setattr(dense, name, getattr(dense, name)[rows])
    if budget != "none left":
        assert_same(cache, before)
        return
    mask = torch.ones(len(rows), 21, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        expected, got = (
            model(tokens(len(rows), 1, 1), attention_mask=mask, past_key_values=c).logits
            for c in (whole, cache)
        )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("budget", ["uniform", "model"])
def test_a_crop_by_slices_in_either_order(budget: str) -> None:
    """Each half is shown as it is when its turn comes: none is cut twice."""
    model = tiny_model()
    with MoERouterPress(0.5, budget=budget)(model):
        cache = prefill(model, tokens(1, 20))
    with torch.no_grad():
        model(tokens(1, 6, 1), past_key_values=cache)
    expected = copy.deepcopy(cache)
    expected.crop(22)
    for names in (("keys", "values"), ("values", "keys")):
        for layer in cache.layers:
            for name in names:
                setattr(layer, name, getattr(layer, name)[..., :-2, :])
            assert layer.keys.shape == layer.values.shape
    assert cache.get_seq_length() == 22
    assert_same(cache, held(expected))


@pytest.mark.parametrize("one", ["keys", "values"])
def test_a_half_that_waits_for_the_other(one: str, tmp_path: Path) -> None:
    """What needs both names it, and the other half, or the same put back, ends the wait."""
    model = tiny_model()
    with MoERouterPress(0.5, budget="model")(model):
        cache = prefill(model, tokens(1, 20))
    layer = cache.layers[0]
    whole, before = getattr(layer, one), held(cache)
    setattr(layer, one, whole[:, :, :19])
    refused = "expected keys and values of as many positions, got .* assign the other as well"
    for use in (
        lambda: model(tokens(1, 1), past_key_values=cache),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: save_cache(cache, tmp_path / "cache.safetensors", model),
        lambda: copy.copy(layer),
        layer.to_dense,
    ):
        with pytest.raises(ValueError, match=refused):
            use()
    setattr(layer, one, whole)
    assert_same(cache, before)

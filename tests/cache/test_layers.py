"""The layers of compressed caches against dense ones, over random lives of a cache."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moekv import ops
from moekv.budget import Kept
from moekv.cache import attention
from moekv.cache.attention import RaggedPairs
from moekv.cache.growing import GrowingLayer
from moekv.cache.ragged import RaggedLayer

HEADS, GROUP, DIM, VALUE_DIM = 2, 3, 8, 5


class Twin:
    """A dense layer beside a ragged one: nothing evicted, evicted pairs masked."""

    def __init__(self, batch: int, length: int, seed: int, backend: str = "auto") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.keys, self.values = self.pairs(batch, length)
        self.kept = torch.rand(batch, HEADS, length, generator=self.generator) < 0.4
        self.kept[..., 0] = True
        self.visible = torch.ones(batch, length, dtype=torch.bool)  # by the 2-D attention mask
        self.context = length
        kept = Kept.from_mask(self.kept)
        self.layer = RaggedLayer.compress(self.keys, self.values, kept, backend=backend)

    def pairs(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        return tuple(
            torch.randn(batch, HEADS, length, dim, generator=self.generator)
            for dim in (DIM, VALUE_DIM)
        )

    def append(self, count: int, hide: bool) -> None:
        """Append tokens, attend with their queries, and compare."""
        batch = len(self.keys)
        keys, values = self.pairs(batch, count)
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        self.kept = nn.functional.pad(self.kept, (0, count), value=True)
        seen = torch.ones(batch, count, dtype=torch.bool)
        seen[0, 0] = not hide
        self.visible = torch.cat([self.visible, seen], dim=1)
        query = torch.randn(batch, HEADS * GROUP, count, DIM, generator=self.generator)
        pairs, _ = self.layer.update(keys, values)
        mask = self.visible if not self.visible.all() else None
        got = attention.attend(nn.Identity(), query, pairs, mask)
        assert self.layer.get_seq_length() == self.keys.shape[2]
        torch.testing.assert_close(got, self.attend(query))

    def attend(self, query: Tensor) -> Tensor:
        length, count = self.keys.shape[2], query.shape[2]
        causal = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        mask = causal & (self.kept & self.visible[:, None])[:, :, None]
        keys, values, mask = (
            x.repeat_interleave(GROUP, dim=1) for x in (self.keys, self.values, mask)
        )
        scores = (query @ keys.mT / math.sqrt(DIM)).masked_fill(~mask, -math.inf)
        return (scores.softmax(-1) @ values).transpose(1, 2)

    def crop(self, count: int) -> None:
        length = max(self.keys.shape[2] - count, self.context)
        self.layer.crop(length)
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.kept, self.visible = self.kept[..., :length], self.visible[:, :length]

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows) % len(self.keys)
        self.layer.batch_select_indices(index)
        for name in ("keys", "values", "kept", "visible"):
            setattr(self, name, getattr(self, name)[index])

    def repeat(self, times: int) -> None:
        self.layer.batch_repeat_interleave(times)
        for name in ("keys", "values", "kept", "visible"):
            setattr(self, name, getattr(self, name).repeat_interleave(times, dim=0))


STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 70), st.booleans()),
    st.tuples(st.just("crop"), st.integers(1, 80)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 7), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 200),
    seed=st.integers(0, 2**16),
    backend=st.sampled_from(["cpu", "torch"]),
    steps=st.lists(STEPS, min_size=1, max_size=6),
)
def test_any_life_of_a_cache_equals_the_masked_dense_one(batch, length, seed, backend, steps):
    twin = Twin(batch, length, seed, backend)
    for name, *arguments in [*steps, ("append", 1, False)]:
        getattr(twin, name)(*arguments)


def test_compression_frees_the_bytes_and_copies_what_stays():
    twin = Twin(2, 500, seed=0)
    pairs = int(twin.kept.sum())
    assert twin.layer.nbytes == pairs * (DIM + VALUE_DIM) * 4
    keys, values, lengths = twin.layer.to_dense()
    assert torch.equal(lengths, twin.kept.sum(-1))
    for b in range(2):
        for h in range(HEADS):
            n = int(lengths[b, h])
            assert torch.equal(keys[b, h, -n:], twin.keys[b, h, twin.kept[b, h]])
            assert torch.equal(values[b, h, -n:], twin.values[b, h, twin.kept[b, h]])
            assert not keys[b, h, :-n].any()


def test_appending_moves_old_tokens_a_bounded_number_of_times():
    layer = Twin(1, 10, seed=0).layer
    buffers = set()
    for _ in range(1000):
        layer.update(torch.zeros(1, HEADS, 1, DIM), torch.zeros(1, HEADS, 1, VALUE_DIM))
        buffers.add(layer.tail_keys.data_ptr())
    assert len(buffers) <= 15  # 65, 130, ..., beyond 512 growing by an eighth


def test_beams_share_what_is_stored():
    layer = Twin(1, 100, seed=0).layer
    before = layer.nbytes
    layer.batch_repeat_interleave(8)
    layer.reorder_cache(torch.tensor([3, 3, 0, 1, 7, 7, 7, 2]))
    assert layer.nbytes == before


def test_counts_follow_the_rows():
    layer = Twin(3, 60, seed=1).layer
    rows = layer.stored_pairs
    assert rows == (layer.end - layer.begin).sum(1).tolist() and len(set(rows)) == 3
    layer.reorder_cache(torch.tensor([2, 0, 2]))
    assert layer.stored_pairs == [rows[2], rows[0], rows[2]]


def test_crop_by_slices_as_kvpress_does_it():
    twin = Twin(1, 50, seed=0)
    twin.append(7, hide=False)
    twin.layer.keys = twin.layer.keys[:, :, :53]
    twin.layer.values = twin.layer.values[:, :, :53]
    assert twin.layer.get_seq_length() == 53
    twin.layer.crop(60)  # longer than it is: nothing happens, as in DynamicLayer
    assert twin.layer.get_seq_length() == 53
    assert twin.layer.keys[..., :-2, :].shape == (1, HEADS, 51, DIM)


@pytest.mark.parametrize("length", [49, 0, -58, -8])
def test_crop_into_the_context_is_refused_and_loses_nothing(length):
    twin = Twin(1, 50, seed=0)
    twin.append(7, hide=False)
    with pytest.raises(ValueError, match="the first 50 were compressed together"):
        twin.layer.crop(length)
    twin.append(1, hide=False)


REFUSED = {
    "softmax": lambda p: torch.softmax(p, -1),
    "sdpa": lambda p: nn.functional.scaled_dot_product_attention(torch.zeros(1, 2, 1, 8), p, p),
    "transpose": lambda p: p.transpose(1, 2),
    "one head": lambda p: p[:, 0],
    "skip": lambda p: p[:, :, 1:],
    "expand": lambda p: p[:, :, None],
}


@pytest.mark.parametrize("name", REFUSED)
def test_ragged_pairs_are_not_taken_for_dense_tensors(name):
    with pytest.raises(TypeError, match=r"Call cache.layers\[i\].to_dense\(\)"):
        REFUSED[name](Twin(1, 9, seed=0).layer.keys)


def test_other_misuse_is_named():
    layer = Twin(2, 9, seed=0).layer
    one = torch.zeros(2, HEADS, 1, DIM), torch.zeros(2, HEADS, 1, VALUE_DIM)
    with pytest.raises(ValueError, match=r"num_queries, 8\] .* got \[1, 2, 1, 8\]"):
        layer.update(one[0][:1], one[1][:1])
    with pytest.raises(ValueError, match="torch.float32 on cpu like the cache, got torch.float16"):
        layer.update(one[0].half(), one[1].half())
    assert layer.get_seq_length() == 9
    with pytest.raises(RuntimeError, match="cannot be reset"):
        layer.reset()
    with pytest.raises(TypeError, match="expected a crop of this layer's own pairs"):
        layer.keys = one[0]
    pairs, _ = layer.update(*one)
    query = torch.zeros(2, HEADS * GROUP, 1, DIM)
    with pytest.raises(ValueError, match="over all 10 positions .* got one over 9"):
        attention.attend(nn.Identity(), query, pairs, torch.ones(2, 9))
    with pytest.raises(NotImplementedError, match="expected dropout 0, got 0.1"):
        attention.attend(nn.Identity(), query, pairs, None, dropout=0.1)
    with pytest.raises(NotImplementedError, match="attention sinks"):
        attention.attend(nn.Identity(), query, pairs, None, s_aux=torch.zeros(6))


def test_masks_of_every_kind_mean_the_same():
    twin = Twin(2, 30, seed=3)
    keys, values = twin.pairs(2, 4)
    pairs, _ = twin.layer.update(keys, values)
    query = torch.randn(2, HEADS * GROUP, 4, DIM)
    seen = torch.ones(2, 34, dtype=torch.bool)
    seen[0, 31] = seen[1, 2] = False
    four_d = (torch.ones(4, 34).tril(30).bool() & seen[:, None])[:, None]
    additive = torch.where(four_d, 0.0, torch.finfo(torch.float32).min)
    results = [
        attention.attend(nn.Identity(), query, pairs, mask)
        for mask in (seen, seen.long(), four_d, additive)
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])
    assert isinstance(pairs, RaggedPairs)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scaling_and_softcap_are_the_models(scaling, softcap):
    """Over a ragged layer that has lost nothing, as over all pairs."""
    keys, values = torch.randn(2, 2, HEADS, 20, DIM)
    kept = Kept.from_mask(torch.ones(2, HEADS, 20, dtype=torch.bool))
    layer = RaggedLayer.compress(keys, values, kept)
    new = torch.randn(2, 2, HEADS, 1, DIM)
    pairs, _ = layer.update(*new)
    query = torch.randn(2, HEADS * GROUP, 1, DIM)
    got = attention.attend(
        nn.Identity(), query, pairs, None, scaling=scaling, softcap=softcap
    ).transpose(1, 2)
    keys, values = (
        torch.cat([old, last], 2).repeat_interleave(GROUP, 1)
        for old, last in zip((keys, values), new, strict=True)
    )
    logits = query @ keys.mT * (DIM**-0.5 if scaling is None else scaling)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(got, logits.softmax(-1) @ values, atol=1e-5, rtol=1e-5)


def test_functions_of_transformers_are_wrapped_once_and_still_serve_dense_layers():
    attention.install()
    first = dict(ALL_ATTENTION_FUNCTIONS)
    attention.install()
    assert dict(ALL_ATTENTION_FUNCTIONS) == first
    layer = DynamicLayer()
    keys, values = layer.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    query = torch.randn(1, 2, 5, 8)
    got, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Identity(), query, keys, values, None, 0.0)
    expected = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
    torch.testing.assert_close(got, expected.transpose(1, 2))


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


@pytest.fixture
def op_calls(monkeypatch):
    """What attention asks of ragged_attention."""
    calls = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["backend"])
        return ops.ragged_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "ops", SimpleNamespace(ragged_attention=spy))
    return calls


def growing_step(batch: int, count: int = 1, backend: str = "auto") -> tuple[Tensor, ...]:
    """Queries, keys and values of a step over a growing layer with room behind its pairs."""
    generator = torch.Generator().manual_seed(batch)
    first, new = (
        [torch.randn(batch, HEADS, n, dim, generator=generator) for dim in (DIM, VALUE_DIM)]
        for n in (90, count)
    )
    layer = GrowingLayer(*first, backend=backend)
    pairs = layer.update(*new)
    return torch.randn(batch, HEADS * GROUP, count, DIM, generator=generator), *pairs


def sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as transformers calls it where no compressed layer is in play."""
    keys, values = (x.repeat_interleave(GROUP, dim=1) for x in (keys, values))
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None].bool()
    attend = nn.functional.scaled_dot_product_attention
    return attend(query, keys, values, mask, is_causal=False).transpose(1, 2)


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "2-D"])
def test_steps_over_a_growing_layer_are_served_by_the_op(kind, op_calls):
    query, keys, values = growing_step(2)
    seen = torch.ones(2, 91, dtype=torch.bool)
    seen[1, :30] = False
    mask = {
        "none": None,
        "bool": seen[:, None, None],
        "additive": torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None, None],
        "2-D": seen.long(),
    }[kind]
    name = "flash_attention_2" if kind == "2-D" else "sdpa"
    function = ALL_ATTENTION_FUNCTIONS[name]
    got, weights = function(nn.Identity(), query, keys, values, mask, dropout=0.0, scaling=0.3)
    assert op_calls == ["auto"] and weights is None
    torch.testing.assert_close(got, sdpa(query * 0.3 * DIM**0.5, keys, values, mask))


SOME_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
LEFT_TO_THE_MODEL = {
    "several queries": lambda: (growing_step(1, count=2), {}),
    "backend torch": lambda: (growing_step(1, backend="torch"), {}),
    "plain keys": lambda: (changed(1, torch.clone), {}),
    "gradients": lambda: (changed(0, Tensor.requires_grad_), {}),
    "another dtype": lambda: (changed(0, Tensor.double), {}),
    "mask of another length": lambda: (growing_step(1), {"attention_mask": SOME_MASK}),
    "dropout": lambda: (growing_step(1), {"dropout": 0.1}),
    "softcap": lambda: (growing_step(1), {"softcap": 30.0}),
    "attention sinks": lambda: (growing_step(1), {"s_aux": torch.zeros(6)}),
    "keys that kvpress masks": lambda: (growing_step(1), {"masked": (torch.zeros(1),) * 3}),
}


def changed(index: int, change: Any) -> list[Tensor]:
    tensors = list(growing_step(1))
    tensors[index] = change(tensors[index])
    return tensors


@pytest.mark.parametrize("name", LEFT_TO_THE_MODEL)
def test_all_else_over_a_growing_layer_goes_to_the_models_attention(name, op_calls):
    tensors, options = LEFT_TO_THE_MODEL[name]()
    module = nn.Identity()
    module.masked_key_indices = options.pop("masked", None)
    mask = options.pop("attention_mask", None)
    answer = object()
    serve = attention._serve_compressed_layers(lambda *_, **__: answer)
    assert serve(module, *tensors, mask, **options) is answer
    assert not op_calls


def test_crops_and_copies_of_a_growing_layer_are_still_served(op_calls):
    _, keys, values = growing_step(1)
    layer = copy.deepcopy(GrowingLayer(keys, values))
    layer.crop(40)
    layer.keys, layer.values = layer.keys[:, :, :30], layer.values[:, :, :30]
    new = [torch.randn(1, HEADS, 1, dim) for dim in (DIM, VALUE_DIM)]
    query = torch.randn(1, HEADS * GROUP, 1, DIM)
    pairs = layer.update(*new)
    got, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Identity(), query, *pairs, None)
    assert len(op_calls) == 1
    expected = [
        torch.cat([a[:, :, :30], b], dim=2) for a, b in zip((keys, values), new, strict=True)
    ]
    torch.testing.assert_close(got, sdpa(query, *expected, None))

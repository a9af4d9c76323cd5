"""Growing layers against dynamic ones, over random lives of a cache."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer

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

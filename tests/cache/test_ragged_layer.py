"""Ragged layers against dense ones, over random lives of a cache."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins import DIM, GROUP, HEADS, VALUE_DIM, Twin

from moekv import ops
from moekv.budget import Kept
from moekv.cache import attention
from moekv.cache.ragged import RaggedLayer
from moekv.models.hooks import CROPS_BY_COUNT

STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 70), st.booleans()),
    st.tuples(st.just("crop"), st.integers(1, 80)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 7), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("recompress"), st.floats(0.2, 1.0)),
)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 200),
    seed=st.integers(0, 2**16),
    backend=st.sampled_from(["auto", "torch"]),
    pairs=st.sampled_from(ops.PAIRS),
    steps=st.lists(STEPS, min_size=1, max_size=6),
)
def test_any_life_of_a_cache_equals_the_masked_dense_one(
    batch, length, seed, backend, pairs, steps
):
    twin = Twin(batch, length, seed, backend, pairs)
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


@pytest.mark.parametrize("length", [49, 1 if CROPS_BY_COUNT else 0, -58, -8])
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
    with pytest.raises(ValueError, match="new tokens of 2 rows for this cache, got 1"):
        layer.update(one[0][:1], one[1][:1])
    with pytest.raises(ValueError, match="torch.float32 on cpu like the cache, got torch.float16"):
        layer.update(one[0].half(), one[1].half())
    assert layer.get_seq_length() == 9
    with pytest.raises(RuntimeError, match="cannot be reset"):
        layer.reset()
    twin = Twin(2, 9, seed=0).layer
    for others in (one[0], None, layer.values, twin.keys, layer.rows.keys):
        with pytest.raises(TypeError, match="expected a crop of this layer's own keys, got"):
            layer.keys = others
    assert layer.get_seq_length() == 9
    pairs, _ = layer.update(*one)
    query = torch.zeros(2, HEADS * GROUP, 1, DIM)
    with pytest.raises(ValueError, match="over all 10 positions .* got one over 9"):
        attention.attend(nn.Identity(), query, pairs, torch.ones(2, 9))
    with pytest.raises(NotImplementedError, match="expected dropout 0, got 0.1"):
        attention.attend(nn.Identity(), query, pairs, None, dropout=0.1)
    with pytest.raises(NotImplementedError, match="output_attentions=False"):
        attention.attend(nn.Identity(), query, pairs, None, output_attentions=True)


def test_a_crop_takes_positions_along():
    """They are those of the context, in files, too, which know how many bytes these take."""
    keys, values = torch.randn(2, 1, 2, 17, 4)
    layer = RaggedLayer.compress(keys, values, Kept.from_mask(torch.ones(1, 2, 17).bool()))
    layer.hold_run(None)
    assert layer.positions.tolist() == [[[255, 255, 1]] * 2]
    for length, positions in ((16, [255, 255]), (11, [255, 7])):
        layer.crop(length)
        assert layer.positions.tolist() == [[positions] * 2]


class Operations(TorchDispatchMode):
    """Notes what torch is asked to compute; views and new memory are not counted."""

    NOTHING = re.compile(r"aten\.(view|slice|unsqueeze|empty|new_empty|expand|detach|lift_fresh)\b")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.NOTHING.match(str(func)):
            self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_operations_of_a_compression():
    """On a GPU each is a launch, in each layer: docs/cuda.md says how many."""
    keys, values = torch.randn(2, 1, 8, 64, 16)
    kept = Kept.from_mask(torch.arange(64).expand(1, 8, 64) % 3 > 0)
    with Operations() as operations:
        RaggedLayer.compress(keys, values, kept)
    assert len(operations.names) == 23, operations.names
    page = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text()
    assert f"layer by layer: {len(operations.names)} operations each" in page

"""Pairs in every format: what a layer holds of them, and how it is read."""

import copy
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from twins import DIM, GROUP, HEADS, VALUE_DIM, Twin, rounded

from moekv import ops
from moekv.budget import Kept
from moekv.cache import attention
from moekv.cache.caches import bits_per_number, bytes_by_kind
from moekv.cache.ragged import RaggedLayer
from moekv.cache.rows import Rows, gain, storable

QUANTISED = ops.PAIRS[1:]


def random_rows(count: int, dim: int, value_dim: int, pairs: str, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(count, n, generator=generator) for n in (dim, value_dim))
    return Rows.of(keys, values, pairs)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("pairs", ops.PAIRS)
def test_rows_move_as_they_are(pairs: str, biased: bool) -> None:
    rows = random_rows(9, 64, 48, pairs)
    if biased:
        rows = replace(rows, bias=torch.arange(9).half())
    index = torch.tensor([8, 0, 0, 3])
    some = rows.select(index)
    more = rows.join(*(torch.randn(2, n) for n in (64, 48)))
    for whole, part, both in zip(rows.tensors, some.tensors, more.tensors, strict=True):
        assert torch.equal(part, whole[index])
        assert torch.equal(both[:9], whole) and len(both) == 11
    for whole, part in zip(rows.dense(), some.dense(), strict=True):
        assert torch.equal(part, whole[index])
    assert rows.bytes_per_pair * 9 == sum(x.nbytes for x in rows.tensors)
    again = rows.in_format("k4v4")
    assert again is rows if pairs != "16" else again.pairs == "k4v4"
    for other in (again, rows.widened(), rows.move("cpu"), rows.read_as(*[torch.half] * 2)):
        assert other.bias is rows.bias
    if biased:
        assert more.bias.tolist() == [*range(9), 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (192, 128), (80, 80), (6, 10)])
@pytest.mark.parametrize("pairs", ops.PAIRS)
def test_a_gain_is_the_ratio_of_real_bytes(
    pairs: str, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    keys, values = (torch.randn(5, n).to(dtype) for n in sizes)
    rows = Rows.of(keys, values, pairs)
    stored = sum(x.nbytes for x in rows.tensors)
    assert gain(pairs, keys, values) == Fraction(keys.nbytes + values.nbytes, stored)
    more = sum(x.nbytes for x in Rows.of(keys, values, pairs, bias=torch.zeros(5).half()).tensors)
    assert more == stored + 10
    biased = gain(pairs, keys, values, biased=True)
    assert biased == Fraction(keys.nbytes + values.nbytes, more)
    assert [x.dtype for x in rows.dense()] == [dtype] * 2
    assert [tuple(x.shape) for x in rows.dense()] == [(5, n) for n in sizes]


@pytest.mark.parametrize("pairs", QUANTISED)
def test_what_is_compressed_again_is_not_rounded_again(pairs: str) -> None:
    """Fifty compressions, each with new tokens, leave what stays as the first one stored it."""
    layer = Twin(1, 40, seed=0, pairs=pairs).layer
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        new = [torch.randn(1, HEADS, 1, dim, generator=generator) for dim in (DIM, VALUE_DIM)]
        layer.update(*new)
        before = layer.to_dense()
        longest = before[0].shape[2]
        kept = torch.arange(longest) >= longest - before[2][..., None]
        layer.recompress(Kept.from_mask(kept))
        after = layer.to_dense()
        last = rounded(*new, pairs)
        for old, now, came in zip(before[:2], after[:2], last, strict=True):
            assert torch.equal(now[:, :, :-1], old[:, :, :-1])
            assert torch.equal(now[:, :, -1:], came)
    assert layer.rows.pairs == pairs and layer.get_seq_length() == 90


@pytest.mark.parametrize("pairs", QUANTISED)
def test_bytes_are_those_of_the_storages(pairs: str) -> None:
    twin = Twin(2, 300, seed=0, pairs=pairs)
    layer, count = twin.layer, int(twin.kept.sum())
    assert layer.nbytes == count * layer.stored_bytes_per_pair
    kinds = bytes_by_kind([layer])
    assert kinds["tail"] == kinds["notes"] == kinds["biases"] == 0
    assert kinds["pairs"] + kinds["scales"] == layer.nbytes
    assert kinds["scales"] == layer.rows.scales.nbytes
    assert bits_per_number([layer]) == 8 * layer.stored_bytes_per_pair / (DIM + VALUE_DIM)
    twin.append(3, hide=False)
    assert bytes_by_kind([layer])["tail"] == layer.nbytes - count * layer.stored_bytes_per_pair


@pytest.mark.parametrize("pairs", QUANTISED)
def test_a_layer_is_moved_away_and_fetched(pairs: str) -> None:
    twin = Twin(1, 50, seed=3, pairs=pairs)
    before = twin.layer.to_dense()
    twin.layer.offload()
    twin.layer.prefetch()
    for old, now in zip(before, twin.layer.to_dense(), strict=True):
        assert torch.equal(old, now)
    twin.append(2, hide=False)


@pytest.mark.parametrize("pairs", QUANTISED)
def test_a_copy_is_a_layer_of_its_own(pairs: str) -> None:
    twin = Twin(1, 50, seed=3, pairs=pairs)
    other = copy.deepcopy(twin)
    other.append(5, hide=False)
    other.recompress(0.5)
    other.append(1, hide=False)
    twin.append(1, hide=False)


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of_values", [False, True])
def test_no_number_of_one_pair_reaches_another(pairs: str, bad: float, of_values: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    both = [torch.randn(7, n, generator=generator) for n in (64, 48)]
    clean = Rows.of(*both, pairs).dense()
    both[of_values][2, 5] = bad
    rows = Rows.of(*both).in_format(pairs)
    others, spoilt = torch.arange(7) != 2, rows.dense()
    assert rows.pairs == pairs and not rows.readable
    assert rows.select(others.nonzero()[:, 0]).readable
    assert spoilt[of_values][2].isnan().all()
    kept = Rows.of(*both, pairs)
    assert kept.pairs == "16" and all(a is b for a, b in zip(kept.dense(), both, strict=True))
    for one, other in zip(clean, spoilt, strict=True):
        assert torch.equal(one[others], other[others])
    assert storable(*both).tolist() == others.tolist()


@pytest.mark.parametrize("pairs", QUANTISED)
def test_outlier_channels_of_10000(pairs: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(7, n, generator=generator) for n in (128, 64))
    keys[:, 3], values[:, 60] = 1e4, -1e4
    assert storable(keys, values).all()
    for was, read in zip((keys, values), Rows.of(keys, values, pairs).dense(), strict=True):
        assert (was - read).norm() < 0.02 * was.norm()


def test_pairs_beyond_float16_count_as_such() -> None:
    values = torch.ones(3, 8)
    values[1] = 1e6
    assert storable(torch.ones(3, 8), values).tolist() == [True, False, True]


@pytest.mark.parametrize("pairs", QUANTISED)
def test_gradients_reach_queries_and_the_tail(pairs: str) -> None:
    twin = Twin(1, 30, seed=0, pairs=pairs)
    new = [torch.randn(1, HEADS, 2, dim, requires_grad=True) for dim in (DIM, VALUE_DIM)]
    query = torch.randn(1, HEADS * GROUP, 2, DIM, requires_grad=True)
    keys, _ = twin.layer.update(*new)
    attention.attend(torch.nn.Identity(), query, keys, None).sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (query, *new))


@pytest.mark.parametrize("pairs", QUANTISED)
def test_a_layer_takes_the_dtype_of_wider_tokens(pairs: str) -> None:
    kept = Kept.from_mask(torch.ones(1, HEADS, 9, dtype=torch.bool))
    keys, values = torch.randn(1, HEADS, 9, DIM), torch.randn(1, HEADS, 9, VALUE_DIM)
    layer = RaggedLayer.compress(keys.half(), values.half(), kept, pairs=pairs)
    layer.update(keys[:, :, :1], values[:, :, :1])
    assert layer.dtype == torch.float32 and layer.to_dense()[0].dtype == torch.float32

"""Pages of vLLM's blocks: read, written, and moved together."""

import pytest
import torch
from hypothesis import given, strategies
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm_engine import BLOCK

from moekv.integrations.vllm.compaction import choose, compact, page_counts
from moekv.integrations.vllm.options import Gap, ServingOptions
from moekv.integrations.vllm.pages import Pages, page_layout
from moekv.integrations.vllm.rating import Scores

LAYERS, HEADS, BLOCKS, DIM = 3, 2, 24, 32
needs_amx = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="no AMX tiles")


def filled(
    dtype: torch.dtype = torch.float32, isa: str = "vec"
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Caches of some layers that share a storage, and the pairs that vLLM has written to them.

    Keys and values [L, B * block, H, D] by slot.
    """
    generator = torch.Generator().manual_seed(0)
    whole = torch.zeros(LAYERS, BLOCKS, HEADS, BLOCK, 2 * DIM, dtype=dtype)
    keys, values = torch.randn(2, LAYERS, BLOCKS * BLOCK, HEADS, DIM, generator=generator).to(dtype)
    for layer in range(LAYERS):
        both = whole[layer].view(BLOCKS, HEADS, 2 * BLOCK, DIM).chunk(2, dim=2)
        slots = torch.arange(BLOCKS * BLOCK)
        vllm_ops.cpu_attn_reshape_and_cache(keys[layer], values[layer], *both, slots, isa)
    return list(whole), keys, values


@pytest.mark.parametrize("isa", ["vec", "vec16", pytest.param("amx", marks=needs_amx)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 80, 256])
def test_layout_is_found(isa: str, dtype: torch.dtype, dim: int) -> None:
    if isa == "amx" and (dtype is not torch.bfloat16 or dim % 32):
        pytest.skip("vLLM takes AMX for bfloat16 alone")
    if isa == "vec" and dim % 32:
        pytest.skip("vLLM takes the other for such heads")
    keys, values = page_layout(isa, BLOCK, dim, dtype)
    assert keys.shape == values.shape == (BLOCK, dim)
    places = torch.cat([keys.flatten(), values.flatten()])
    assert torch.equal(places.sort().values, torch.arange(2 * BLOCK * dim))


@pytest.mark.parametrize(
    ("dtype", "isa"),
    [
        (torch.float32, "vec"),
        (torch.bfloat16, "vec"),
        (torch.float16, "vec16"),
        pytest.param(torch.bfloat16, "amx", marks=needs_amx),
    ],
)
def test_pairs_are_read_and_written(dtype: torch.dtype, isa: str) -> None:
    caches, keys, values = filled(dtype, isa)
    pages = Pages(caches, isa)
    blocks = torch.tensor([7, 3, 11])
    own = pages.of(blocks)
    assert own.shape == (LAYERS, HEADS, 3)
    slots = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:70]
    got_keys, got_values = pages.read_all(own, 70)
    assert torch.equal(got_keys, keys[:, slots].transpose(1, 2))
    assert torch.equal(got_values, values[:, slots].transpose(1, 2))
    places = torch.tensor([0, 31, 5, 17])
    one_keys, one_values = pages.read(own[2, 1, torch.tensor([0, 0, 1, 2])], places)
    slots = torch.tensor([7, 7, 3, 11]) * BLOCK + places
    assert torch.equal(one_keys, keys[2, slots, 1])
    assert torch.equal(one_values, values[2, slots, 1])
    before = [cache.clone() for cache in caches]
    pages.write(own[1, 0, :2], *(torch.full((2 * BLOCK, DIM), x, dtype=dtype) for x in (1.0, 2.0)))
    got_keys, got_values = pages.read_all(own[1, 0, :2], 2 * BLOCK)
    assert (got_keys == 1).all() and (got_values == 2).all()
    changed = [(b != c).flatten(2).any(2) for b, c in zip(before, caches, strict=True)]
    assert [x.nonzero().tolist() for x in changed] == [[], [[3, 0], [7, 0]], []]


def test_caches_that_share_no_storage() -> None:
    caches, _, _ = filled()
    with pytest.raises(ValueError, match="expected one storage .* budget 'uniform'"):
        Pages([cache.clone() for cache in caches], "vec")


@given(
    rows=strategies.integers(1, 12),
    full=strategies.integers(2, 8),
    seed=strategies.integers(0, 1000),
    spread=strategies.sampled_from([0.0, 1.0, 30.0]),
    data=strategies.data(),
)
def test_pages_are_shared_out_exactly(
    rows: int, full: int, seed: int, spread: float, data: strategies.DataObject
) -> None:
    kept = data.draw(strategies.integers(1, full - 1))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, full * BLOCK, generator=generator)
    scores += spread * torch.randn(rows, 1, generator=generator)
    counts = page_counts(scores, kept, BLOCK, sinks=4, window=16)
    assert counts.sum() == rows * kept
    assert counts.min() >= 1 and counts.max() <= full


@pytest.mark.parametrize("budget", ["uniform", "model"])
def test_what_stays_is_what_was_chosen(budget: str) -> None:
    """Pairs of all heads, whose pages others take, and nothing of other requests."""
    caches, keys, values = filled()
    pages = Pages(caches, "vec")
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randperm(BLOCKS, generator=generator)[:9]
    scores = torch.randn(LAYERS * HEADS, 8 * BLOCK, generator=generator)
    scores += 2 * torch.randn(LAYERS * HEADS, 1, generator=generator)
    gap = Gap(5, 8)
    indices, counts = choose(scores, gap, BLOCK, 20, ServingOptions(budget=budget))
    assert (len(set(counts.tolist())) > 1) == (budget == "model")
    others = sorted(set(range(BLOCKS)) - set(blocks[5:8].tolist()))
    before = [cache[others].clone() for cache in caches]
    beside = Scores(len(pages.all), BLOCK)
    own = pages.of(blocks)
    beside.write(own.flatten(0, 1), 0, torch.cat([scores, scores[:, :BLOCK]], 1))
    kept = compact(pages, beside, own[..., :8], own[..., 5:8], indices, counts)
    assert torch.equal(kept.counts.flatten(), counts)
    used = []
    begin = 0
    for row in range(LAYERS * HEADS):
        layer, head = divmod(row, HEADS)
        count = int(counts[row])
        used += kept.pages[layer, head, :count].tolist()
        places = indices[begin : begin + count * BLOCK]
        begin += count * BLOCK
        assert (places.diff() > 0).all() and places[:4].tolist() == [0, 1, 2, 3]
        slots = blocks[places // BLOCK] * BLOCK + places % BLOCK
        got_keys, got_values = pages.read_all(kept.pages[layer, head, :count], count * BLOCK)
        assert torch.equal(got_keys, keys[layer, slots, head])
        assert torch.equal(got_values, values[layer, slots, head])
        moved = beside.read(kept.pages[layer, head, None, :count])[0]
        assert torch.equal(moved, scores[row, places])
    assert sorted(used) == sorted(pages.of(blocks[5:8]).flatten().tolist())
    for cache, held in zip(caches, before, strict=True):
        assert torch.equal(cache[others], held)

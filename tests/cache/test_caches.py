from typing import Any

import pytest
import torch
from quantized import quantized_cache
from tiny_models import tiny_model, tokens
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from moekv.budget import Kept
from moekv.cache.buffers import gather_rows, storage_bytes
from moekv.cache.caches import cached_pairs, check_cache, evict, held_bytes


def test_dynamic_caches_are_served() -> None:
    check_cache(DynamicCache())
    check_cache(DynamicCache(config=tiny_model("gemma3").config))


def test_static_caches_are_served_where_one_length_will_do() -> None:
    for name in ("llama", "gemma3"):
        cache = StaticCache(tiny_model(name).config, max_cache_len=99)
        check_cache(cache)
        with pytest.raises(TypeError, match="for many lengths, got a static cache"):
            check_cache(cache, static="many lengths")
    check_cache(DynamicCache(), static="many lengths")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (), "tuple"),
        (lambda: None, "NoneType"),
        (lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"),
        (lambda: StaticCache(tiny_model().config, max_cache_len=9, offloading=True), "offloaded"),
        (quantized_cache, "IdentityLayer"),
    ],
)
def test_other_caches_are_not(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"expected a transformers.DynamicCache.*, got .*{message}"):
        check_cache(make())


def test_layer_types_are_seen_when_they_are_there() -> None:
    cache = quantized_cache()
    model = tiny_model()
    model(tokens(1, 9), past_key_values=cache)
    cache.layer_class_to_replicate = None
    with pytest.raises(TypeError, match="IdentityLayer"):
        check_cache(cache)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_rows(layout: str, dtype: torch.dtype) -> None:
    pairs = torch.randn(2, 7, 3, 5).to(dtype).transpose(1, 2)  # [B, H, T, D] = [2, 3, 7, 5]
    if layout == "contiguous":
        pairs = pairs.contiguous()
    rows = torch.tensor([0, 3, 8, 27, 41])
    kept = gather_rows(pairs, rows)
    assert kept.is_contiguous() and storage_bytes(kept) == kept.numel() * kept.element_size()
    for i, row in enumerate(rows.tolist()):
        assert torch.equal(kept[i], pairs[row // 21, row // 7 % 3, row % 7])


@pytest.mark.parametrize("per_head", [3, None])
def test_evict_frees_memory_and_leaves_what_others_hold(per_head: int | None) -> None:
    cache = DynamicCache()
    cache.update(torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 4), 0)
    keys, values = cached_pairs(cache.layers[0])
    before = keys.clone()
    indices = torch.tensor([1, 4, 9, 0, 1, 2], dtype=torch.int32)
    kept = Kept(indices, torch.tensor([0, 3, 6], dtype=torch.int32), (1, 2, 10), per_head)
    assert evict(cache, 0, kept, backend="auto") == (4 * 20 * (8 + 4), 4 * 6 * (8 + 4))
    assert torch.equal(keys, before)
    (layer,) = cache.layers
    assert layer.get_seq_length() == 10
    if per_head is None:
        kept_keys, kept_values, lengths = layer.to_dense()
        assert lengths.tolist() == [[3, 3]]
    else:
        assert layer.keys.shape[2] == 3
        kept_keys, kept_values = layer.keys, layer.values
    assert torch.equal(kept_keys[0, 0], keys[0, 0, [1, 4, 9]])
    assert torch.equal(kept_values[0, 1], values[0, 1, :3])
    assert layer.nbytes == 4 * 6 * (8 + 4)


def test_storage_bytes_counts_what_is_allocated() -> None:
    x = torch.zeros(10, 4)
    assert storage_bytes(x) == 160
    assert storage_bytes(x[:2]) == 160
    assert storage_bytes(x[:2], x[3:]) == 160
    assert storage_bytes(x, torch.zeros(2)) == 168


def test_bytes_are_those_of_pairs_as_they_are() -> None:
    """Autocast may leave keys wider than values; nothing is widened to be counted."""
    cache = DynamicCache()
    cache.update(*torch.zeros(2, 1, 2, 5, 8), 0)
    layer = cache.layers[0]
    layer.keys, layer.values = layer.keys.clone(), layer.values.bfloat16()
    assert held_bytes(layer) == 2 * 5 * 8 * (4 + 2)
    assert [x.dtype for x in cached_pairs(layer)] == [torch.float32] * 2

from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from moekv.cache import cached_pairs, check_cache, evict, gather_pairs, storage_bytes


class IdentityLayer(QuantizedLayer):
    """A quantised layer that needs no quantisation library."""

    def __init__(self) -> None:
        super().__init__(nbits=4, axis_key=0, axis_value=0, q_group_size=64, residual_length=4)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def quantized_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = IdentityLayer
    return cache


def test_dynamic_caches_are_served() -> None:
    check_cache(DynamicCache())
    check_cache(DynamicCache(config=tiny_model("gemma3").config))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (), "tuple"),
        (lambda: None, "NoneType"),
        (lambda: StaticCache(tiny_model().config, max_cache_len=99), "StaticLayer"),
        (lambda: DynamicCache(offloading=True), "offloaded"),
        (quantized_cache, "IdentityLayer"),
    ],
)
def test_other_caches_are_not(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"expected a transformers.DynamicCache, got .*{message}"):
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
def test_gather_pairs(layout: str, dtype: torch.dtype) -> None:
    pairs = torch.randn(2, 7, 3, 5).to(dtype).transpose(1, 2)  # [B, H, T, D] = [2, 3, 7, 5]
    if layout == "contiguous":
        pairs = pairs.contiguous()
    indices = torch.tensor([[[0, 3], [1, 6], [5, 6]], [[2, 3], [0, 1], [4, 5]]], dtype=torch.int32)
    kept = gather_pairs(pairs, indices)
    assert kept.is_contiguous() and storage_bytes(kept) == kept.numel() * kept.element_size()
    for b in range(2):
        for h in range(3):
            for i in range(2):
                assert torch.equal(kept[b, h, i], pairs[b, h, indices[b, h, i]])


def test_evict_frees_memory_and_leaves_what_others_hold() -> None:
    layer = DynamicLayer()
    layer.update(torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 4))
    keys, values = cached_pairs(layer)
    before = keys.clone()
    indices = torch.tensor([[[1, 4, 9], [0, 1, 2]]], dtype=torch.int32)
    assert evict(layer, indices) == (4 * 20 * (8 + 4), 4 * 6 * (8 + 4))
    assert torch.equal(keys, before)
    assert torch.equal(layer.keys[0, 0], keys[0, 0, [1, 4, 9]])
    assert torch.equal(layer.values[0, 1], values[0, 1, :3])
    assert storage_bytes(layer.keys, layer.values) == 4 * 6 * (8 + 4)
    assert layer.get_seq_length() == 3


def test_storage_bytes_counts_what_is_allocated() -> None:
    x = torch.zeros(10, 4)
    assert storage_bytes(x) == 160
    assert storage_bytes(x[:2]) == 160
    assert storage_bytes(x[:2], x[3:]) == 160
    assert storage_bytes(x, torch.zeros(2)) == 168

"""Input that is refused, and what must be as it was before."""

from typing import Any

import pytest
import torch
from growth_cases import decode
from tiny_models import prefill, tokens
from torch import Tensor, nn
from transformers import DynamicCache

from moekv import Expert, LayerView, MoERouterPress
from moekv.cache.ragged import RaggedLayer

LENGTH = 40


class Failing(Expert):
    """Raises in a chosen layer, as long as it is told to."""

    name = "failing"

    def __init__(self, layer: int = 1) -> None:
        self.layer: int | None = layer

    def scores(self, view: LayerView) -> Tensor:
        if view.module.layer_idx == self.layer:
            raise ArithmeticError("out of luck")
        return view.keys.norm(dim=-1)


class Given(Expert):
    """Gives the scores that it was given: [B, H, T], or [T] for every row and head."""

    name = "given"

    def __init__(self, scores: Tensor) -> None:
        self.given = scores

    def scores(self, view: LayerView) -> Tensor:
        return self.given.expand(view.keys.shape[:3]) if self.given.dim() == 1 else self.given


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_untouched(
    model: nn.Module, press: MoERouterPress, cache: DynamicCache | None = None
) -> None:
    """No hook is left, the cache holds all that was fed, and model and press work."""
    assert not num_hooks(model)
    stats = press.get_stats()
    assert stats["forward_count"] == 0 and stats["compression"]["bytes_before"] == 0
    if cache is not None:
        full = prefill(model, tokens(1, LENGTH))
        for layer, whole in zip(cache.layers, full.layers, strict=False):
            assert not layer.is_initialized or torch.equal(layer.keys, whole.keys)
            assert not layer.is_initialized or torch.equal(layer.values, whole.values)
    press.compression_ratio = 0.5
    with press(model):
        prefill(model, tokens(1, LENGTH))
    assert press.get_stats()["compression"]["ratio"] == 0.5


def refuse(
    error: type[Exception],
    message: str,
    model: nn.Module,
    press: MoERouterPress,
    cache: Any = None,
    **inputs: Any,
) -> None:
    """Assert that a prefill in the press's block is refused, and that nothing is lost."""
    cache = DynamicCache() if cache is None else cache
    with pytest.raises(error, match=message), torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache, **inputs)
    assert_untouched(model, press, cache)


def refuse_block(
    error: type[Exception], message: str, model: nn.Module, press: MoERouterPress, **given: Any
) -> None:
    """Assert that a block does not begin, and hangs nothing on the model."""
    before = num_hooks(model)
    with pytest.raises(error, match=message), press(model, **given):
        pytest.fail("the block began")
    assert num_hooks(model) == before


def padded(length: int = LENGTH) -> Tensor:
    """The mask of two rows, of which the second begins with padding."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :7] = 0
    return mask


def compressed(model: nn.Module, budget: str, extra: int = 0) -> DynamicCache:
    """A compressed cache of LENGTH tokens, and some since."""
    with MoERouterPress(budget=budget)(model):
        cache = prefill(model, tokens(1, LENGTH))
    for step in range(extra):
        decode(model, cache, LENGTH + step)
    return cache


def held(cache: DynamicCache) -> list[Tensor]:
    """Everything that a cache holds."""
    return [
        pairs.clone()
        for layer in cache.layers
        for pairs in (
            layer.to_dense() if isinstance(layer, RaggedLayer) else (layer.keys, layer.values)
        )
    ]


def assert_same(cache: DynamicCache, before: list[Tensor]) -> None:
    for pairs, old in zip(held(cache), before, strict=True):
        assert torch.equal(pairs, old)


def lengths(cache: DynamicCache) -> list[int]:
    """Pairs that a head of each dense layer holds."""
    return [layer.keys.shape[2] for layer in cache.layers]


def assert_holds(cache: DynamicCache, full: DynamicCache, kept: list[int]) -> None:
    """Every head of a dense cache holds the pairs of these positions."""
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert torch.equal(layer.keys, whole.keys[:, :, kept])
        assert torch.equal(layer.values, whole.values[:, :, kept])

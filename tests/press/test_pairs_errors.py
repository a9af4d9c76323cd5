"""``pairs`` that cannot be served, and pairs that cannot be stored."""

from typing import Any

import pytest
import torch
from refusals import LENGTH, Given, num_hooks, refuse_block
from tiny_models import prefill, tiny_model, tokens
from torch import nn

from moekv import MoERouterPress, ops
from moekv.cache.rows import check_pairs
from moekv.models.hooks import by_name, hook_arguments

QUANTISED = ops.PAIRS[1:]


@pytest.mark.parametrize("pairs", ["8", "k8v2", "int8", 8, None, "K8V8", ""])
def test_unknown_pairs(pairs: object) -> None:
    message = "pairs among 16, k8v8, k8v4, k4v4, auto, got"
    with pytest.raises(ValueError, match=message):
        MoERouterPress(pairs=pairs)
    model, press = tiny_model(), MoERouterPress()
    press.pairs = pairs
    with pytest.raises(ValueError, match=message), press(model):
        pytest.fail("the block began")
    assert not num_hooks(model)


@pytest.mark.parametrize("pairs", QUANTISED)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_quantised_pairs_and_eager_attention(pairs: str, ratio: float) -> None:
    press = MoERouterPress(ratio, pairs=pairs, budget="uniform")
    message = f"'sdpa' for pairs '{pairs}', got 'eager'"
    refuse_block(ValueError, message, tiny_model(attention="eager"), press)


@pytest.mark.parametrize("pairs", QUANTISED)
def test_quantised_pairs_of_heads_that_are_mixed(pairs: str) -> None:
    message = f"attention can be replaced for pairs '{pairs}'"
    refuse_block(ValueError, message, tiny_model("doge"), MoERouterPress(pairs=pairs))


def test_sizes_and_dtypes_that_no_format_serves() -> None:
    with pytest.raises(ValueError, match="expected an even head dim of values in 4 bits, got 15"):
        check_pairs("k8v4", 16, 15, torch.float32)
    check_pairs("k8v8", 16, 15, torch.float32)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16 for pairs 'k8v8', got"):
        check_pairs("k8v8", 16, 16, torch.float64)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("pairs", QUANTISED)
def test_a_pair_that_cannot_be_stored_ranks_last(pairs: str, bad: float) -> None:
    """And no other pair sees it: heads hold what they would hold without it."""
    model, press = (
        tiny_model(),
        MoERouterPress(0.85, pairs=pairs, experts=[Given(torch.arange(40.0))]),
    )
    place = 20  # neither a sink nor recent

    def spoil(module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
        _, cache = hook_arguments(by_name(module, args, kwargs))
        layer = cache.layers[module.layer_idx]
        layer.values = layer.values.clone()
        layer.values[0, 1, place, 3] = bad

    hooks = [x.self_attn.register_forward_hook(spoil, with_kwargs=True) for x in model.model.layers]
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
    for hook in hooks:
        hook.remove()
    for layer in cache.layers:
        keys, values, _ = layer.to_dense()
        assert keys.isfinite().all() and values.isfinite().all()
    with torch.no_grad():
        assert model(tokens(1, 1), past_key_values=cache).logits.isfinite().all()

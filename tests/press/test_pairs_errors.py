"""``pairs`` that cannot be served, and pairs that cannot be stored."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from growth_cases import decode
from refusals import LENGTH, Given, num_hooks, refuse_block
from tiny_models import prefill, tiny_model, tokens
from torch import nn
from transformers import PreTrainedModel

from moekv import DecodingConfig, MoERouterPress, ops
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


def test_quantised_pairs_of_float32_and_kernels_for_16_bits() -> None:
    """They would be refused by the first token that is decoded."""
    message = "expected keys and values of float16 or bfloat16 for pairs 'k8v4' with backend 'cuda'"
    with pytest.raises(RuntimeError, match=message):
        check_pairs("k8v4", 16, 16, torch.float32, backend="cuda")


def spoiling(
    model: PreTrainedModel, place: int, bad: float, layers: Sequence[int] = (0, 1)
) -> AbstractContextManager[None]:
    """Let attention leave a number in a value of the cache, where it is filled."""

    def spoil(module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
        _, cache = hook_arguments(by_name(module, args, kwargs))
        layer = cache.layers[module.layer_idx]
        layer.values = layer.values.clone()
        layer.values[0, 1, place, 3] = bad

    @contextmanager
    def spoilt() -> Iterator[None]:
        modules = [model.model.layers[i].self_attn for i in layers]
        hooks = [module.register_forward_hook(spoil, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    return spoilt()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e5])
@pytest.mark.parametrize("pairs", QUANTISED)
def test_a_pair_that_cannot_be_stored_ranks_last(
    pairs: str, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    """And no other pair sees it: heads hold what they would hold without it."""
    model, place = tiny_model(), 20  # neither a sink nor recent
    press = MoERouterPress(0.85, pairs=pairs, experts=[Given(torch.arange(40.0))])
    with spoiling(model, place, bad), press(model):
        cache = prefill(model, tokens(1, LENGTH))
    for layer in cache.layers:
        keys, values, _ = layer.to_dense()
        assert keys.isfinite().all() and values.isfinite().all()
        assert layer.rows.pairs == pairs
    assert not caplog.records
    with torch.no_grad():
        assert model(tokens(1, 1), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("pairs", QUANTISED)
def test_a_layer_with_a_sink_that_cannot_be_stored_stays_in_16_bits(
    pairs: str, ratio: float, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is read as it is, the other layer is quantised, and the log says so."""
    model, bad = tiny_model(), 1e7
    press = MoERouterPress(ratio, router=None, pairs=pairs, streaming=streaming)
    with spoiling(model, 1, bad, layers=[1]), press(model):
        cache = prefill(model, tokens(1, LENGTH))
    assert [layer.rows.pairs for layer in cache.layers] == [pairs, "16"]
    assert (cache.layers[1].to_dense()[1] == bad).sum() == 1
    (record,) = caplog.records
    assert f"pairs='{pairs}' cannot store" in record.message
    stats = press.get_stats()
    assert stats["cache"]["bytes_held"] == sum(layer.nbytes for layer in cache.layers)
    with torch.no_grad():
        assert model(tokens(1, 1), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("pairs", QUANTISED)
def test_a_new_pair_that_cannot_be_stored_widens_its_layer_until_it_leaves(
    pairs: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, press = (
        tiny_model(),
        MoERouterPress(0.0, router=None, pairs=pairs, decoding=DecodingConfig(30, 4), recent=6),
    )
    formats = []
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
        for step in range(16):
            if step == 1:
                layer = cache.layers[0]
                layer.tail_values[0, 0, 0, 2] = -1e7
            decode(model, cache, LENGTH + step)
            formats.append(cache.layers[0].rows.pairs)
            assert cache.layers[1].rows.pairs == pairs
    values = cache.layers[0].to_dense()[1]
    assert formats[0] == pairs and "16" in formats and formats[-1] == pairs
    assert len(caplog.records) == 1 and values.isfinite().all() and values.amin() > -1e3

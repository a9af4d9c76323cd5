"""Models that a press cannot serve, and versions of transformers that call them otherwise."""

from abc import abstractmethod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from every_model import TEXT_MODELS, build
from model_sweep import try_press
from refusals import LENGTH, assert_untouched, lengths, num_hooks, refuse_block
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RoFormerConfig,
    RoFormerForCausalLM,
)
from transformers.cache_utils import CacheLayerMixin

from moekv import DecodingConfig, MoERouterPress
from moekv.models import hooks
from moekv.models.hooks import find_layers, hook_arguments


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_models_in_double_precision(backend: str) -> None:
    message = "model in float32, float16 or bfloat16, got float64"
    refuse_block(TypeError, message, tiny_model().double(), MoERouterPress(backend=backend))


def test_model_of_another_structure() -> None:
    refuse_block(
        TypeError,
        "a model of transformers, got Linear, which has no config",
        nn.Linear(2, 2),
        MoERouterPress(),
    )


def test_sliding_windows_in_all_layers() -> None:
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=16,
        )
    )
    refuse_block(ValueError, "got none: sliding windows or chunks", model, MoERouterPress())


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("falcon_h1", "LinearAttentionAndFull", "pairs and states in one cache layer"),
        ("deepseek_v32", "DynamicIndexed", "attention of kind 'indexed_attention'"),
    ],
)
def test_cache_layers_that_hold_more_than_pairs(name: str, kind: str, reason: str) -> None:
    """The error says what keeps them from being compressed."""
    if name not in TEXT_MODELS:
        pytest.skip(f"this transformers has no {name}")
    model = build(name)
    if not type(DynamicCache(config=model.config).layers[0]).__name__.startswith(kind):
        pytest.skip("this transformers keeps it in other caches")
    refuse_block(ValueError, f"got none: {reason}", model, MoERouterPress())


class _Peft:
    """Stands in a model's place while it generates, as PEFT's models do."""

    active_peft_config = SimpleNamespace(is_prompt_learning=True)

    def prepare(self, **inputs: Any) -> Any:
        return inputs.get("past_key_values_of_another_version")


def test_a_learned_prompt_and_a_cache_of_another_name() -> None:
    model: Any = tiny_model()
    press, prepare = MoERouterPress(), model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = _Peft().prepare
    message = "expected a PEFT whose generate finds caches .* feeds its virtual tokens again"
    with pytest.raises(RuntimeError, match=message), press(model):
        prefill(model, tokens(1, LENGTH))
    model.prepare_inputs_for_generation = prepare  # as it puts it back
    assert_untouched(model, press)


SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_queries_that_cannot_be_seen() -> None:
    config = RoFormerConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=True,
    )
    model = RoFormerForCausalLM(config)
    refuse_block(TypeError, "can be seen, got RoFormer", model, MoERouterPress())


def test_positions_told_by_distances() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4))
    refuse_block(TypeError, "by its keys, got Bloom.*alibi", model, MoERouterPress())


def test_heads_of_more_channels() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=288))
    # PyTorch stands in for the kernels, in steps of padded rows that compress as well.
    assert try_press(model) == "works: 2 of 2 layers"
    press = MoERouterPress(0.5, pairs="k8v8")
    with press(model):
        prefill(model, tokens(1, LENGTH))
    assert press.get_stats()["budget"]["used"] == "model"
    message = "at most 256 channels for backend 'cpu'.*got 288"
    refuse_block(TypeError, message, model, MoERouterPress(backend="cpu"))


def test_compression_that_goes_on_where_heads_are_mixed() -> None:
    model, message = tiny_model("doge"), "each head reads its own pairs.*got Doge"
    press = MoERouterPress(decoding=DecodingConfig(20, 5))
    refuse_block(ValueError, message, model, press)
    refuse_block(ValueError, message, model, MoERouterPress(), context_length=100)


@pytest.mark.parametrize("budget", ["head", "model"])
def test_ragged_budgets_and_eager_attention(budget: str) -> None:
    model, press = tiny_model(attention="eager"), MoERouterPress(budget=budget)
    refuse_block(ValueError, f"such as 'sdpa' for budget '{budget}', got 'eager'", model, press)


def test_eager_attention_and_layers_of_different_lengths() -> None:
    model, input_ids = tiny_model(attention="eager"), tokens(1, LENGTH)
    press = MoERouterPress(policy="dominant", experts=["aggressive", "conservative"], top_k=1)
    with press(model):
        cache = prefill(model, input_ids)  # all layers of one length: served
        assert lengths(cache) == [12, 12]
        press._rater.routers[1].prior.copy_(torch.tensor([0.0, 9.0]))
        cache = DynamicCache()
        with pytest.raises(ValueError, match="heads or layers of different lengths, got 'eager'"):
            model(input_ids, past_key_values=cache)
    assert lengths(cache) == [LENGTH, LENGTH]
    assert press.get_stats()["forward_count"] == 1


def test_flex_attention() -> None:
    class BlockMask:
        pass

    model = tiny_model()
    _, layers = find_layers(model)

    def mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": BlockMask()}

    press = MoERouterPress()
    forward = layers[0].forward
    layers[0].forward = lambda *a, **k: forward(*a, **k | {"attention_mask": None})
    handle = layers[0].register_forward_pre_hook(mask, with_kwargs=True)
    with pytest.raises(TypeError, match="tensor, got BlockMask.*sdpa"), press(model):
        prefill(model, tokens(1, LENGTH))
    handle.remove()
    del layers[0].forward
    assert_untouched(model, press)


def test_hooks_without_what_they_need() -> None:
    for given in ({"cache": 1}, {"past_key_values": 1}, {"hidden_states": torch.ones(1, 2, 3)}):
        with pytest.raises(RuntimeError, match="with `.*`, got .*transformers 5"):
            hook_arguments(given)


def _update(self: Any, key_states: Tensor, value_states: Tensor, *, window: int) -> None: ...


def _sizes(self: Any, num_queries: int) -> None: ...


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("update", _update, r"update\(.*cache_kwargs.*got .*'window'"),
        ("get_mask_sizes", _sizes, r"get_mask_sizes\(.*got \['num_queries'\]"),
        ("evict", abstractmethod(lambda self: None), r"no other abstract methods.*got \['evict'\]"),
    ],
)
def test_caches_of_a_transformers_that_nobody_knows(
    name: str, method: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, press = tiny_model(), MoERouterPress()
    with monkeypatch.context() as patch:
        patch.setattr(CacheLayerMixin, name, method, raising=False)
        patch.setattr(
            CacheLayerMixin,
            "__abstractmethods__",
            CacheLayerMixin.__abstractmethods__ | ({name} if name == "evict" else set()),
        )
        refuse_block(RuntimeError, message + ".*does not know transformers", model, press)
    assert_untouched(model, press)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DynamicCache", dict, "expected caches that derive from Cache, got dict"),
        ("ALL_ATTENTION_FUNCTIONS", {"eager": None}, r"such as 'sdpa', got \['eager'\]"),
    ],
)
def test_a_transformers_of_other_caches_or_attention_functions(
    name: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, press = tiny_model(), MoERouterPress()
    with monkeypatch.context() as patch:
        patch.setattr(hooks, name, value)
        refuse_block(RuntimeError, message + ".*does not know transformers", model, press)
    assert_untouched(model, press)


@pytest.mark.parametrize("silent", [[0, 1], [1]], ids=["all", "the last"])
def test_hooks_that_are_not_called(silent: list[int]) -> None:
    model, press, cache = tiny_model(), MoERouterPress(), DynamicCache()
    message = "compressed nothing: .* not all attention layers.*transformers 5"
    with press(model):
        for index in silent:
            layer = find_layers(model)[1][index]
            layer._call_impl = layer.forward  # as code that calls it directly
        with pytest.raises(RuntimeError, match=message), torch.no_grad():
            model(tokens(1, LENGTH), past_key_values=cache)
    for index in silent:
        del find_layers(model)[1][index]._call_impl
    assert lengths(cache) == [LENGTH, LENGTH] and not num_hooks(model)
    assert_untouched(model, press, cache)

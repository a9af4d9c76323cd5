"""One test for each row of docs/errors.md."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from kvpress import BlockPress, ComposedPress, DecodingPress, KnormPress
from random_router import random_router
from targets import Target
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor, nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from moekv import (
    DecodingConfig,
    Expert,
    LayerView,
    MoERouterPress,
    ops,
    prefill_in_chunks,
    register_expert,
)
from moekv.cache.ragged import RaggedLayer
from moekv.cache.static import CompactStaticLayer
from moekv.calibration import router as router_module
from moekv.calibration.router import CalibratedRouter, model_fingerprint
from moekv.models.hooks import find_layers

NAN, INF = float("nan"), float("inf")
LENGTH = 40


def test_every_row_is_a_test_and_every_test_a_row() -> None:
    page = (Path(__file__).parent.parent / "docs/errors.md").read_text()
    rows = re.findall(r"\| `(test_\w+)` \|$", page, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| (?!input|-)", page, re.MULTILINE))
    here = {name for name in globals() if name.startswith("test_")}
    assert sorted(rows) == sorted(here - {"test_every_row_is_a_test_and_every_test_a_row"})


class Failing(Expert):
    """Raises in a chosen layer, as long as it is told to."""

    name = "failing"

    def __init__(self, layer: int = 1) -> None:
        self.layer: int | None = layer

    def scores(self, view: LayerView) -> Tensor:
        if view.module.layer_idx == self.layer:
            raise ArithmeticError("out of luck")
        return view.keys.norm(dim=-1)


class Fixed(Expert):
    name = "fixed"

    def __init__(self, scores: Tensor) -> None:
        self.fixed = scores

    def scores(self, view: LayerView) -> Tensor:
        return self.fixed.expand(view.keys.shape[:3]) if self.fixed.dim() == 1 else self.fixed


def assert_untouched(model: nn.Module, press: MoERouterPress, cache: DynamicCache) -> None:
    """No hook is left, the cache holds all that was fed, and model and press work."""
    decoder, layers = find_layers(model)
    assert not decoder._forward_pre_hooks
    assert not any(layer._forward_hooks for layer in layers)
    stats = press.get_stats()
    assert stats["forward_count"] == 0 and stats["compression"]["bytes_before"] == 0
    full = prefill(model, tokens(1, LENGTH))
    for layer, whole in zip(cache.layers, full.layers, strict=False):
        assert not layer.is_initialized or torch.equal(layer.keys, whole.keys)
    press.compression_ratio = 0.5
    with press(model):
        prefill(model, tokens(1, LENGTH))
    assert press.get_stats()["compression"]["ratio"] == 0.5


def refuse(
    error: type[Exception],
    message: str,
    model: nn.Module,
    press: MoERouterPress,
    input_ids: Tensor | None = None,
    cache: Any = None,
    **inputs: Any,
) -> None:
    """Assert that a prefill in the press's block is refused, and that nothing is lost."""
    input_ids = tokens(1, LENGTH) if input_ids is None else input_ids
    cache = DynamicCache() if cache is None else cache
    with pytest.raises(error, match=message), torch.no_grad(), press(model):
        model(input_ids, past_key_values=cache, **inputs)
    assert_untouched(model, press, cache)


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [-0.1, 1.0, NAN])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"compression_ratio in \[0, 1\).*got"):
        MoERouterPress(ratio)
    press = MoERouterPress()
    press.compression_ratio = ratio
    refuse(ValueError, "compression_ratio in", tiny_model(), press)


@pytest.mark.parametrize("ratio", ["a", None, [0.5]], ids=str)
def test_ratio_that_is_no_number(ratio: Any) -> None:
    with pytest.raises(TypeError, match="expected compression_ratio a number, got"):
        MoERouterPress(ratio)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_models_in_double_precision(backend: str) -> None:
    model = tiny_model().double()
    cache, message = DynamicCache(), "model in float32, float16 or bfloat16, got float64"
    with pytest.raises(TypeError, match=message), MoERouterPress(backend=backend)(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("options", [{"num_experts": 2}, {"experts": ["semantic"]}, {"top_k": 99}])
def test_more_experts_per_token_than_experts(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected top_k <= num_experts"):
        MoERouterPress(**{"top_k": 3} | options)
    with pytest.raises(ValueError, match="expected top_k an integer >= 1, got 0"):
        MoERouterPress(top_k=0)


@pytest.mark.parametrize("number", [0, -1, 2.5, True, 10_000, "many"])
def test_number_of_experts(number: Any) -> None:
    with pytest.raises(ValueError, match="expected num_experts"):
        MoERouterPress(num_experts=number, top_k=1)


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("router_type", "best", "hierarchical"),
        ("policy", "best", "mixture, dominant"),
        ("budget", "best", "auto, uniform, head, model"),
        ("balance_mode", "best", "entropy"),
        ("experts", ["selective", "best"], "temporal"),
    ],
)
def test_unknown_names(option: str, value: Any, choices: str) -> None:
    with pytest.raises(ValueError, match=f"{choices}.*, got 'best'"):
        MoERouterPress(**{option: value})


@pytest.mark.parametrize("budget", ["head", "model"])
def test_ragged_budgets_and_eager_attention(budget: str) -> None:
    model, press = tiny_model(attention="eager"), MoERouterPress(budget=budget)
    message = f"such as 'sdpa' for budget '{budget}', got 'eager'"
    with pytest.raises(ValueError, match=message), press(model):
        pass
    assert not any(layer._forward_hooks for layer in find_layers(model)[1])


@pytest.mark.parametrize("budget", ["head", "model"])
def test_ragged_budgets_in_a_wrapper(budget: str) -> None:
    model, press = tiny_model(), ComposedPress([MoERouterPress(budget=budget)])
    message = "inside a kvpress wrapper, whose layers are dense"
    with pytest.raises(ValueError, match=message), press(model):
        prefill(model, tokens(1, LENGTH))


def test_what_excludes_streaming() -> None:
    with pytest.raises(ValueError, match="policy 'mixture' with streaming, got 'dominant'"):
        MoERouterPress(policy="dominant", streaming=True)
    with pytest.raises(ValueError, match="expected streaming or context_length, got both"):
        MoERouterPress(budget="model", streaming=True, context_length=100)


def test_ragged_budgets_and_the_dominant_policy() -> None:
    with pytest.raises(ValueError, match="'uniform' with policy 'dominant'.*got 'model'"):
        MoERouterPress(policy="dominant", budget="model")


@pytest.mark.parametrize("number", [0, -1, 2.5, True, None])
def test_decoding_options(number: Any) -> None:
    for name in ("target", "interval"):
        with pytest.raises(ValueError, match=f"expected {name} an integer >= 1, got {number}"):
            DecodingConfig(**{name: number})
    with pytest.raises(TypeError, match="decoding a moekv.DecodingConfig, got 2048"):
        MoERouterPress(decoding=2048)
    if number is not None:
        with pytest.raises(ValueError, match="expected context_length an integer >= 1"):
            MoERouterPress(context_length=number)


GOES_ON = [{"decoding": DecodingConfig()}, {"context_length": LENGTH}]


@pytest.mark.parametrize("options", GOES_ON)
def test_compression_that_goes_on_and_the_dominant_policy(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'mixture' where compression goes on.*got 'dominant'"):
        MoERouterPress(policy="dominant", **options)


@pytest.mark.parametrize("options", GOES_ON)
def test_compression_that_goes_on_in_a_wrapper(options: dict[str, Any]) -> None:
    model, press = tiny_model(), ComposedPress([MoERouterPress(**options)])
    message = "neither decoding nor context_length inside a kvpress wrapper"
    with pytest.raises(ValueError, match=message), press(model):
        prefill(model, tokens(1, LENGTH))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="auto, cpu, cuda, torch, got 'tpu'"):
        MoERouterPress(backend="tpu")


def test_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = ops.available_backends() | {"cuda": "no device; plug one in"}
    monkeypatch.setattr(ops, "available_backends", lambda: reasons)
    with pytest.raises(RuntimeError, match="'cuda' is not available: no device; plug one in"):
        MoERouterPress(backend="cuda")


@pytest.mark.parametrize(
    ("experts", "error"),
    [
        ([object(), "selective"], TypeError),
        ("selective", TypeError),
        ([], ValueError),
        (["selective", "selective"], ValueError),
        ([KnormPress(), KnormPress()], ValueError),
    ],
)
def test_what_is_no_expert(experts: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        MoERouterPress(experts=experts)


@pytest.mark.parametrize("option", ["sinks", "recent", "window", "cache_update_interval"])
@pytest.mark.parametrize("value", [-1, 1.5, None])
def test_counts(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"expected {option} an integer >= [01], got {value}"):
        MoERouterPress(**{option: value})


def test_expert_name_that_is_taken() -> None:
    with pytest.raises(ValueError, match="got 'selective', which is registered"):
        register_expert("selective", Failing)


# --- Tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda op: op("select_kept")(torch.zeros(4, 8), None, total=[2]),
            r"select_kept: expected scores .*got \[4, 8\]",
        ),
        (
            lambda op: op("mix_scores")(
                torch.zeros(2, 1, 1, 8),
                torch.zeros(1, 7, 2),
                torch.zeros(1, 7, 2, dtype=torch.int32),
            ),
            r"mix_scores: expected weights .*\[1, 7, 2\]",
        ),
        (
            lambda op: op("kv_compact_")(
                torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 2)
            ),
            "kv_compact_: expected indices of dtype int32, got float32",
        ),
    ],
)
def test_wrong_tensors(target: Target, call: Callable[[Any], Any], message: str) -> None:
    if target.device != "cpu":
        pytest.skip("the tensors of this test are on the CPU")
    with pytest.raises(RuntimeError, match=f"moekv::{message}"):
        call(target.op)
    op = target.op("gating_topk")
    if target.backend != "torch":
        # Not by way of the dispatcher, which would ask the backend of the other device.
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        op = functools.partial(op.default.redispatch, keys)
    with pytest.raises(RuntimeError, match="moekv::gating_topk: expected bias on the device"):
        op(torch.zeros(3, 4), torch.zeros(4, device="meta"), None, k=1)


@pytest.mark.parametrize("indices", [[3, 1], [1, 1], [-1, 2], [2, 8]])
def test_wrong_indices_move_nothing(target: Target, indices: list[int]) -> None:
    if target.device != "cpu":
        pytest.skip("a GPU does not check")
    keys, values = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    before = keys.clone(), values.clone()
    with pytest.raises(RuntimeError, match="moekv::kv_compact_: expected indices"):
        target.op("kv_compact_")(keys, values, torch.tensor([[indices]], dtype=torch.int32))
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


def test_nan_and_infinite_logits(target: Target) -> None:
    logits = torch.tensor([[NAN, 1.0, 0.0], [INF, 0.0, 0.0], [NAN, -INF, NAN]])
    weights, experts, *_ = target.op("gating_topk")(logits.to(target.device), None, None, k=2)
    assert experts.tolist() == [[1, 2], [0, 1], [0, 1]]
    assert weights.isfinite().all() and weights[1].tolist() == [1, 0]
    assert weights[2].tolist() == [0.5, 0.5]


def test_nan_and_infinite_scores(target: Target) -> None:
    scores = torch.tensor([[[9.0, NAN, -INF, INF, NAN, 0.0]]], device=target.device)
    start = torch.tensor([[1]], dtype=torch.int32, device=target.device)
    for total, kept in enumerate([[3], [3, 5], [2, 3, 5], [1, 2, 3, 5], [1, 2, 3, 4, 5]], 1):
        assert target.op("select_kept")(scores, start, total=[total])[0].tolist() == kept


def test_nan_and_infinite_scores_of_an_expert() -> None:
    scores = torch.arange(float(LENGTH))
    scores[20:30], scores[5], scores[35] = NAN, INF, -INF
    model, expert = tiny_model(), Fixed(scores)
    press = MoERouterPress(0.5, experts=[expert], top_k=1, sinks=0, recent=0)
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
    full = prefill(model, tokens(1, LENGTH))
    # +inf at 5, and the highest 19 of the numbers; neither -inf at 35 nor a NaN.
    kept = [5, *range(10, 20), *range(30, 35), *range(36, 40)]
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert torch.equal(layer.keys, whole.keys[:, :, kept])


# --- Models and caches ----------------------------------------------------------------------------


def test_caches_that_cannot_be_served() -> None:
    from quantized import quantized_cache

    model = tiny_model()
    for cache, name in [
        (quantized_cache(), "IdentityLayer"),
        (DynamicCache(offloading=True), "offloaded"),
        (StaticCache(model.config, max_cache_len=64, offloading=True), "offloaded"),
    ]:
        refuse(TypeError, f"StaticCache, got .*{name}", model, MoERouterPress(), cache=cache)
        assert not any(layer.is_initialized for layer in cache.layers)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"budget": "head"}, "budget 'head'"),
        ({"budget": "model"}, "budget 'model'"),
        ({"policy": "dominant"}, "policy 'dominant'"),
        ({"streaming": True}, "streaming"),
        ({"decoding": DecodingConfig()}, "compression that goes on"),
        ({"context_length": LENGTH}, "compression that goes on"),
        ({}, "rows with padding"),
    ],
)
def test_static_caches_and_layers_of_different_lengths(options: dict[str, Any], what: str) -> None:
    model, press = tiny_model(), MoERouterPress(**options)
    cache = StaticCache(model.config, max_cache_len=64)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    message = f"DynamicCache for .*{what}.*, got a static cache"
    for inputs in ({"attention_mask": mask}, {}) if options else ({"attention_mask": mask},):
        with pytest.raises(TypeError, match=message), torch.no_grad(), press(model):
            model(tokens(2, LENGTH), past_key_values=cache, **inputs)
    assert not any(layer.is_initialized for layer in cache.layers)
    with pytest.raises(TypeError, match=message), press(model):
        model.generate(
            tokens(2, LENGTH),
            attention_mask=mask,
            cache_implementation="static",
            max_new_tokens=2,
        )


def test_memory_that_runs_out_in_a_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, press = tiny_model(), MoERouterPress()
    cache, layers = StaticCache(model.config, max_cache_len=64), []

    def run_out(layer: CompactStaticLayer, *args: Any, **kwargs: Any) -> None:
        layers.append(layer)
        if len(layers) == 2:
            raise MemoryError("no memory for the second layer")
        compact(layer, *args, **kwargs)

    compact = CompactStaticLayer.compact
    monkeypatch.setattr(CompactStaticLayer, "compact", run_out)
    with pytest.raises(MemoryError), torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert len(layers) == 2 and not cache.get_seq_length()
    monkeypatch.undo()
    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    expected = prefill_with(model, budget="uniform")
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert int(layer.evicted) == LENGTH // 2
        torch.testing.assert_close(layer.keys[:, :, : LENGTH // 2], other.keys)


def prefill_with(model: nn.Module, **options: Any) -> DynamicCache:
    with MoERouterPress(**options)(model):
        return prefill(model, tokens(1, LENGTH))


def compressed(model: nn.Module, budget: str, batch: int = 1, extra: int = 0) -> DynamicCache:
    """A compressed cache of LENGTH tokens, and some since."""
    with MoERouterPress(budget=budget)(model):
        cache = prefill(model, tokens(batch, LENGTH))
    for step in range(extra):
        where = torch.tensor([LENGTH + step])
        with torch.no_grad():
            model(
                tokens(batch, 1, seed=step),
                past_key_values=cache,
                cache_position=where,
                position_ids=where[None],
            )
    return cache


def held(cache: DynamicCache) -> list[Tensor]:
    """Everything that a cache holds."""
    return [
        pairs.clone()
        for layer in cache.layers
        for pairs in (layer.to_dense() if isinstance(layer, RaggedLayer) else (layer.keys,))
    ]


def assert_same(cache: DynamicCache, before: list[Tensor]) -> None:
    for pairs, old in zip(held(cache), before, strict=True):
        assert torch.equal(pairs, old)


COMPRESSED = ["uniform", "model"]


@pytest.mark.parametrize("budget", COMPRESSED)
@pytest.mark.parametrize(
    ("name", "dtype", "batch", "message"),
    [
        ("llama", torch.float32, 2, r"new pairs \[1, 2, num_queries, 16\].*got \[2, 2, 1, 16\]"),
        ("llama", torch.bfloat16, 1, "torch.float32 on cpu like the cache, got torch.bfloat16"),
        ("llama_mha", torch.float32, 1, r"got \[1, 4, 1, 16\]"),
        ("qwen3", torch.float32, 1, r"got \[1, 2, 1, 24\]"),
    ],
)
def test_other_tokens_for_a_compressed_cache(
    budget: str, name: str, dtype: torch.dtype, batch: int, message: str
) -> None:
    cache = compressed(tiny_model(), budget, extra=1)
    before = held(cache)
    other = tiny_model(name).to(dtype)
    where = torch.tensor([LENGTH + 1])
    with pytest.raises(ValueError, match=message), torch.no_grad():
        other(
            tokens(batch, 1),
            past_key_values=cache,
            cache_position=where,
            position_ids=where[None],
        )
    assert_same(cache, before)


@pytest.mark.parametrize("budget", COMPRESSED)
def test_memory_that_runs_out_when_a_layer_grows(
    budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    cache, expected = (compressed(model, budget) for _ in range(2))
    before = held(cache)
    for failing in (1, 2):  # the buffer of the keys, that of the values
        calls = []

        def run_out(
            self: Tensor,
            *args: Any,
            failing: int = failing,
            calls: list[int] = calls,
            **kwargs: Any,
        ) -> Tensor:
            calls.append(1)
            if len(calls) == failing:
                raise MemoryError("no memory for one more token")
            return self.new_zeros(*args, **kwargs)

        pair = torch.ones(1, 2, 1, 16)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_empty", run_out)
            with pytest.raises(MemoryError):
                cache.layers[0].update(pair, pair)
        assert_same(cache, before)
    for each in (cache, expected):
        each.layers[0].update(pair, pair)
    assert_same(cache, held(expected))


@pytest.mark.parametrize("budget", COMPRESSED)
def test_crop_into_a_compressed_context(budget: str) -> None:
    model = tiny_model()
    cache = compressed(model, budget, extra=3)
    before, length = held(cache), cache.get_seq_length()
    for wanted in (-4, length - 4, 0, -length - 1):
        with pytest.raises(ValueError, match="compressed together, only tokens after them"):
            cache.crop(wanted)
        assert_same(cache, before)
    cache.crop(-2)
    assert cache.get_seq_length() == length - 2
    cache.crop(length - 3)
    assert_same(cache, held(compressed(model, budget)))


def test_ragged_cache_for_code_that_expects_dense_tensors() -> None:
    cache = compressed(tiny_model(), "model")
    before = held(cache)
    eager = tiny_model(attention="eager")
    where = torch.tensor([[LENGTH]])
    keys = cache.layers[0].keys
    for use in (
        lambda: eager(tokens(1, 1), past_key_values=cache, position_ids=where),
        lambda: torch.cat([keys, keys], dim=2),
        lambda: keys.sum(),
        lambda: keys + 1,
        lambda: keys[:, :, 3:],
        lambda: keys[0],
        lambda: [pair for layer in cache for pair in layer[0]],
    ):
        with pytest.raises(TypeError, match=r"to_dense\(\)"), torch.no_grad():
            use()
    cache.crop(LENGTH)  # what the first layer got before eager attention gave up
    assert_same(cache, before)


def test_reset_of_a_ragged_cache() -> None:
    cache = compressed(tiny_model(), "model")
    with pytest.raises(RuntimeError, match="new text with a new cache"):
        cache.reset()


def test_no_cache() -> None:
    model, press = tiny_model(), MoERouterPress()
    with pytest.raises(RuntimeError, match="use_cache=True"), press(model):
        model(tokens(1, LENGTH), use_cache=False)
    assert_untouched(model, press, DynamicCache())


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
    with pytest.raises(ValueError, match="sliding windows in all"), MoERouterPress()(model):
        pass
    assert not any(layer._forward_hooks for layer in find_layers(model)[1])


def test_queries_that_cannot_be_formed() -> None:
    model, cache = tiny_model("stablelm"), DynamicCache()
    with pytest.raises(ValueError, match="StableLmAttention"), MoERouterPress(0.5)(model):
        model(tokens(1, 40), past_key_values=cache)
    assert type(cache.layers[0]) is DynamicLayer
    with MoERouterPress(0.5, num_experts=4)(model):  # as the error says
        prefill(model, tokens(1, 40))


def test_model_of_another_structure() -> None:
    with (
        pytest.raises(TypeError, match="decoder-only.*got Linear"),
        MoERouterPress()(nn.Linear(2, 2)),
    ):
        pass


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
    assert_untouched(model, press, DynamicCache())


def test_eager_attention_and_layers_of_different_lengths() -> None:
    model, input_ids = tiny_model(attention="eager"), tokens(1, LENGTH)
    press = MoERouterPress(policy="dominant", experts=["aggressive", "conservative"], top_k=1)
    with press(model):
        cache = prefill(model, input_ids)  # all layers of one length: served
        assert [layer.keys.shape[2] for layer in cache.layers] == [32, 32]
        press._rater.routers[1].prior.copy_(torch.tensor([9.0, 0.0]))
        cache = DynamicCache()
        with pytest.raises(ValueError, match="heads or layers of different lengths, got 'eager'"):
            model(input_ids, past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [LENGTH, LENGTH]
    assert press.get_stats()["forward_count"] == 1


def test_hooks_without_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attend = self.self_attn

        def positional(hidden_states: Tensor, **kwargs: Any) -> Any:
            return attend(hidden_states, **kwargs)

        self._modules["self_attn"] = positional
        try:
            return original(self, hidden_states, **kwargs)
        finally:
            self._modules["self_attn"] = attend

    model, press = tiny_model(), MoERouterPress()
    message = "with `hidden_states`, got .*transformers 5"
    with monkeypatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", forward)
        with pytest.raises(RuntimeError, match=message), press(model):
            prefill(model, tokens(1, LENGTH))
    assert_untouched(model, press, DynamicCache())


def test_hooks_that_are_not_called() -> None:
    model, press = tiny_model(), MoERouterPress()
    message = "compressed nothing in 1 forward.*transformers 5"
    with pytest.raises(RuntimeError, match=message), press(model):
        for layer in find_layers(model)[1]:
            layer._forward_hooks.clear()
        cache = prefill(model, tokens(1, LENGTH))
    assert_untouched(model, press, cache)


def test_prefill_outside_of_the_block() -> None:
    model, press = tiny_model(), MoERouterPress()
    cache = prefill(model, tokens(1, LENGTH))
    with pytest.raises(RuntimeError, match=r"compressed nothing in 2 forward\(s\)"), press(model):
        for step in range(2):
            with torch.no_grad():
                model(tokens(1, 1, seed=step), past_key_values=cache)
    cache.crop(LENGTH)
    assert_untouched(model, press, cache)
    with press(model):
        pass  # nothing fed, nothing to complain about


# --- Prompts --------------------------------------------------------------------------------------


def test_left_padding_and_eager_attention() -> None:
    model, press = tiny_model(attention="eager"), MoERouterPress()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    cache = DynamicCache()
    with pytest.raises(ValueError, match="'sdpa' for rows with padding, got 'eager'"), press(model):
        model(tokens(2, LENGTH), attention_mask=mask, past_key_values=cache)
    assert not cache.layers  # nothing has run


def test_left_padding_in_a_wrapper() -> None:
    model, press = tiny_model(), ComposedPress([MoERouterPress()])
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    message = r"inside a kvpress wrapper, got \[0, 7\] padding"
    with pytest.raises(ValueError, match=message), press(model):
        model(tokens(2, LENGTH), attention_mask=mask, past_key_values=DynamicCache())


def test_memory_that_runs_out_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    model, press, cache = tiny_model(), MoERouterPress(budget="model"), DynamicCache()
    compress, done = RaggedLayer.compress, []

    def run_out(*args: Any, **kwargs: Any) -> RaggedLayer:
        if done:
            raise MemoryError("no memory for the second layer")
        done.append(compress(*args, **kwargs))
        return done[0]

    monkeypatch.setattr(RaggedLayer, "compress", run_out)
    with pytest.raises(MemoryError, match="second layer"), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert done and cache.get_seq_length() == 0  # as before the prefill
    assert not any(layer.is_initialized for layer in cache.layers)
    monkeypatch.undo()
    with press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert cache.get_seq_length() == LENGTH and isinstance(cache.layers[0], RaggedLayer)


def test_exception_halfway_through_a_stream() -> None:
    model, cache, expert = tiny_model(), DynamicCache(), Failing()
    press = MoERouterPress(experts=[expert], top_k=1, budget="model", streaming=True)
    with pytest.raises(ArithmeticError), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert cache.get_seq_length() == 0 and not any(x.is_initialized for x in cache.layers)
    assert press.get_stats()["forward_count"] == 0
    expert.layer = None
    with press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert cache.get_seq_length() == LENGTH and isinstance(cache.layers[0], RaggedLayer)


def test_padding_at_the_right() -> None:
    model, press = tiny_model(), MoERouterPress()
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, -3:] = 0
    refuse(ValueError, "padding_side = 'left'", model, press, attention_mask=mask)


def test_prefill_in_chunks() -> None:
    model, press = tiny_model(), MoERouterPress()
    cache = prefill(model, tokens(1, LENGTH))
    with pytest.raises(RuntimeError, match="got 3 tokens for a cache that holds 40"), press(model):
        model(tokens(1, 3), past_key_values=cache)
    assert_untouched(model, press, cache)
    with pytest.raises(RuntimeError, match="prefill in one forward"), press(model):
        model.generate(tokens(1, LENGTH), prefill_chunk_size=16, max_new_tokens=2)


def test_second_prompt_at_a_wrong_position() -> None:
    model, cache = tiny_model(), DynamicCache()
    press = MoERouterPress(decoding=DecodingConfig(30, 5))
    where = torch.arange(LENGTH + 1, LENGTH + 4)
    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        before = held(cache)
        with pytest.raises(RuntimeError, match="at position 40, or at place 20 .* got 3 at 41"):
            model(tokens(1, 3), past_key_values=cache, cache_position=where)
        assert_same(cache, before)
        model(tokens(1, 3), past_key_values=cache, cache_position=where - 1)
        model(tokens(1, 3), past_key_values=cache)
    assert cache.get_seq_length() == 26


def test_prompt_longer_than_its_length() -> None:
    model, press, cache = tiny_model(), MoERouterPress(context_length=30), DynamicCache()
    with torch.no_grad(), press(model):
        message = "context_length = 30 tokens, got 31 for a cache that holds 0"
        with pytest.raises(RuntimeError, match=message):
            model(tokens(1, 31), past_key_values=cache)
        assert not cache.get_seq_length()
        model(tokens(1, 25), past_key_values=cache)
        with pytest.raises(RuntimeError, match="got 6 for a cache that holds 25"):
            model(tokens(1, 6), past_key_values=cache)
        model(tokens(1, 5), past_key_values=cache)
        assert cache.layers[1].to_dense()[2].tolist() == [[15, 15]]


def test_chunks_at_wrong_positions() -> None:
    model, press, cache = tiny_model(), MoERouterPress(context_length=30), DynamicCache()
    message = r"positions below 10 .* got 29: some versions of transformers .*prefill_in_chunks"
    where = torch.arange(20, 30)[None]
    with pytest.raises(RuntimeError, match=message), torch.no_grad(), press(model):
        model(tokens(1, 10), past_key_values=cache, position_ids=where)
    assert not cache.get_seq_length()


def test_arguments_of_prefill_in_chunks() -> None:
    model, press = tiny_model(), MoERouterPress()
    with pytest.raises(ValueError, match="chunk_size >= 1, got 0"):
        prefill_in_chunks(press, model, tokens(1, LENGTH), chunk_size=0)
    for other in (
        MoERouterPress(budget="model", streaming=True),
        MoERouterPress(policy="dominant"),
    ):
        with pytest.raises(ValueError, match="streaming=False, .* and policy 'mixture', got"):
            prefill_in_chunks(other, model, tokens(1, LENGTH), chunk_size=9)
    full = prefill(model, tokens(1, LENGTH))
    with pytest.raises(ValueError, match="empty cache, got one that holds 40"):
        prefill_in_chunks(press, model, tokens(1, LENGTH), chunk_size=9, past_key_values=full)
    assert press.context_length is None
    assert_untouched(model, press, full)


def test_eager_attention_and_compression_that_goes_on() -> None:
    model, press = tiny_model(attention="eager"), MoERouterPress(context_length=LENGTH)
    cache = DynamicCache()
    with pytest.raises(ValueError, match="for a prompt in chunks, got 'eager'"), press(model):
        model(tokens(1, 10), past_key_values=cache)
    assert not cache.layers
    mask = torch.ones(2, LENGTH + 1, dtype=torch.long)
    mask[1, :7] = 0
    cache = prefill(model, tokens(2, LENGTH), attention_mask=mask[:, :-1])
    press = MoERouterPress(decoding=DecodingConfig(20, 5))
    message = "for heads or layers of different lengths, got 'eager'"
    with pytest.raises(ValueError, match=message), torch.no_grad(), press(model):
        model(tokens(2, 1), past_key_values=cache, attention_mask=mask)
    cache.crop(LENGTH)
    full = prefill(model, tokens(2, LENGTH), attention_mask=mask[:, :-1])
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert torch.equal(layer.keys, whole.keys)


@pytest.mark.parametrize("budget", ["head", "model"])
@pytest.mark.parametrize("failing", ["pairs", "pairs beside notes", "notes"])
def test_memory_that_runs_out_while_decoding(
    failing: str, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tiny_model(), DynamicCache()
    router = None if failing == "pairs" else random_router(model)
    press = MoERouterPress(
        budget=budget, decoding=DecodingConfig(20, 5), sinks=1, recent=2, router=router
    )
    recompress, done = RaggedLayer.recompress, []

    def run_out(layer: RaggedLayer, *args: Any) -> None:
        kind = "notes" if layer.stored_keys.shape[1] == 1 else "pairs"
        if kind in done and kind in failing.split()[0]:
            raise MemoryError("no memory for the second layer")
        recompress(layer, *args)
        done.append(kind)

    def decode(step: int) -> None:
        where = torch.tensor([LENGTH + step])
        model(
            tokens(1, 1, seed=step),
            past_key_values=cache,
            cache_position=where,
            position_ids=where[None],
        )

    def held() -> list[int]:
        return [int(layer.to_dense()[2].sum()) for layer in cache.layers]

    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        for step in range(4):
            decode(step)
        whole = held()
        monkeypatch.setattr(RaggedLayer, "recompress", run_out)
        with pytest.raises(MemoryError, match="second layer"):
            decode(4)
        monkeypatch.undo()
        assert done.count("pairs") == 1
        assert all((layer.whole_notes() is None) == (router is None) for layer in cache.layers)
        if budget == "head":
            assert held() == [40, whole[1] + 2]
        assert cache.get_seq_length() == LENGTH + 5
        decode(5)
        assert sum(held()) == 80 if budget == "head" else sum(held()) <= 2 * 2 * 25
        for step in range(6, 12):
            decode(step)
            assert sum(held()) <= 2 * 2 * 25


def test_context_shorter_than_what_always_stays() -> None:
    model = tiny_model()
    press = MoERouterPress(0.5, budget="uniform", sinks=4, recent=16)
    full = prefill(model, tokens(1, 18))
    with press(model):
        cache = prefill(model, tokens(1, 18))
    kept = [0, 1, 2, 3, 13, 14, 15, 16, 17]
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert torch.equal(layer.keys, whole.keys[:, :, kept])


@pytest.mark.parametrize("policy", ["mixture", "dominant"])
def test_context_of_one_token(policy: str) -> None:
    model, press = tiny_model(), MoERouterPress(0.9, policy=policy)
    with press(model):
        out = model.generate(
            tokens(1, 1), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
    expected = model.generate(tokens(1, 1), max_new_tokens=3, do_sample=False)
    assert torch.equal(out.sequences, expected)
    assert press.get_stats()["compression"]["ratio"] == 0


def test_experts_that_need_hidden_states_in_growing_caches() -> None:
    message = "can do without hidden states.*got expected"
    for options in ({"decoding": DecodingConfig(20, 5)}, {"context_length": 100}):
        with pytest.raises(ValueError, match=message):
            MoERouterPress(experts=["expected"], top_k=1, **options)
    model = tiny_model()
    press = DecodingPress(
        MoERouterPress(experts=["expected"], top_k=1), compression_interval=4, target_size=12
    )
    with pytest.raises(ValueError, match=message), press(model):
        model.generate(tokens(1, LENGTH), max_new_tokens=8, do_sample=False)
    # Beside another, that one has all the say.
    both = MoERouterPress(experts=["expected", "semantic"], top_k=1, decoding=DecodingConfig(20, 5))
    alone = MoERouterPress(experts=["semantic"], top_k=1, decoding=DecodingConfig(20, 5))
    caches = []
    for press in (both, alone):
        press.compression_ratio = 0.0
        caches.append(DynamicCache())
        with press(model), torch.no_grad():
            model(tokens(1, 20), past_key_values=caches[-1])
            for step in range(5):
                model(tokens(1, 1, seed=step), past_key_values=caches[-1])
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert one.keys.shape[2] == 20 and torch.equal(one.keys, other.keys)


# --- Calibrated routers ---------------------------------------------------------------------------


def test_options_beside_a_calibrated_router() -> None:
    router = random_router(tiny_model())
    for options, names in (
        ({"top_k": 1, "experts": ["semantic"]}, "top_k or experts"),
        ({"num_experts": 4, "router_type": "pikv"}, "num_experts or router_type"),
        ({"policy": "dominant"}, "policy"),
    ):
        with pytest.raises(ValueError, match=f"no {names} beside a calibrated .*router=None"):
            MoERouterPress(router=router, **options)


@pytest.mark.parametrize("name", ["cache_aware", "streaming"])
def test_flags_that_are_none(name: str) -> None:
    with pytest.raises(TypeError, match=f"expected {name} True or False, got 'no'"):
        MoERouterPress(**{name: "no"})


def test_what_is_no_calibrated_router() -> None:
    with pytest.raises(TypeError, match="expected router a moekv.CalibratedRouter.*got int"):
        MoERouterPress(router=3)
    with pytest.raises(ValueError, match="top_k between 1 and 3 experts, got 4"):
        random_router(tiny_model(), top_k=4)
    with pytest.raises(ValueError, match="expected an expert among .*, got 'learned'"):
        random_router(tiny_model(), experts=["learned", "semantic"])


def test_routers_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: Any) -> None:
        message = f"hub id of a calibrated router, got '{re.escape(str(name))}', .*none can be read"
        with pytest.raises(ValueError, match=message):
            MoERouterPress(router=str(name))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(tmp_path / "nowhere")
    refused("nobody/nothing")
    refused(tmp_path)  # empty
    with pytest.raises(ValueError, match="config.json cannot be found"):
        MoERouterPress(router=str(tmp_path))
    router = random_router(tiny_model())
    router.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        file = tmp_path / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        refused(tmp_path)
        file.unlink()
        refused(tmp_path)
        file.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    refused(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_router_of_an_earlier_format(tmp_path: Path) -> None:
    random_router(tiny_model()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("format") == 2
    for found in ({}, {"format": 3}):
        file.write_text(json.dumps(config | found))
        message = f"format 2, got one of format {found.get('format', 1)}.*`moekv calibrate`"
        with pytest.raises(ValueError, match=message):
            MoERouterPress(router=str(tmp_path))


def test_router_of_another_model() -> None:
    model, other = tiny_model(), tiny_model("qwen2")
    names = f"a tiny model \\({model_fingerprint(model)}\\).*{model_fingerprint(other)}"
    with (
        pytest.raises(ValueError, match=names),
        MoERouterPress(router=random_router(model))(other),
    ):
        pytest.fail("the block began")
    find = find_layers(other)[1]
    assert not any(layer._forward_hooks for layer in find)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CalibratedRouter:
    """A router that comes with the package for the tiny model."""
    router = random_router(tiny_model())
    router.save_pretrained(tmp_path / router.model)
    monkeypatch.setattr(router_module, "SHIPPED", tmp_path)
    return router


def test_tokens_that_a_calibrated_router_has_not_seen(shipped: CalibratedRouter) -> None:
    model, config = tiny_model(), DecodingConfig(20, 5)
    cache = prefill(model, tokens(1, LENGTH))
    press = MoERouterPress(router=shipped, budget="uniform", decoding=config)
    message = "tokens have all been fed in a block of this press.*router=None"
    with pytest.raises(RuntimeError, match=message), press(model):
        model(tokens(1, 1), past_key_values=cache)
    assert_untouched(model, press, cache)
    # Some tokens outside of the block are enough.
    cache = DynamicCache()
    with torch.no_grad():
        with press(model):
            model(tokens(1, LENGTH), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
        with pytest.raises(RuntimeError, match=message), press(model):
            model(tokens(1, 1), past_key_values=cache)
        assert cache.get_seq_length() == 20 + 1
        with MoERouterPress(router=None, decoding=DecodingConfig(9, 3))(model):
            model(tokens(1, 1), past_key_values=cache)
        # Another press has gone on without notes: there are none any more.
        with pytest.raises(RuntimeError, match=message), press(model):
            model(tokens(1, 1), past_key_values=cache)
    # Nobody has asked for the package's router.
    cache, press = prefill(model, tokens(1, LENGTH)), MoERouterPress(decoding=config)
    with press(model), torch.no_grad():
        model(tokens(1, 1), past_key_values=cache)
    assert press.get_stats()["router"] == "shared expert, not calibrated"
    assert cache.layers[0].keys.shape[2] == 20
    # But once it has rated, it is not given up in silence.
    press = MoERouterPress(decoding=config)
    with press(model), torch.no_grad():
        prefill(model, tokens(1, LENGTH))
        cache = prefill(tiny_model(), tokens(1, LENGTH))  # the same model, outside of the block
        with pytest.raises(RuntimeError, match=message):
            model(tokens(1, 1), past_key_values=cache)
    assert "calibrated for" in press.get_stats()["router"]


def test_calibrated_routers_and_kvpress_decoding(shipped: CalibratedRouter) -> None:
    model = tiny_model()
    for given in ({"router": shipped}, {}):
        cache, press = prefill(model, tokens(1, LENGTH)), MoERouterPress(**given)
        wrapper = DecodingPress(press, compression_interval=3, target_size=16)
        with wrapper(model), torch.no_grad():
            model(tokens(1, 1), past_key_values=cache)
            model(tokens(1, 1), past_key_values=cache)
            if given:
                with pytest.raises(RuntimeError, match=r"fed in a block.*router=None"):
                    model(tokens(1, 1), past_key_values=cache)
                assert cache.layers[0].keys.shape[2] == LENGTH + 3
                continue
            model(tokens(1, 1), past_key_values=cache)
        assert cache.layers[1].keys.shape[2] == 16
        assert press.get_stats()["router"] == "shared expert, not calibrated"


# --- Experts and presses --------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("policy", ["mixture", "dominant"])
def test_exception_in_an_expert(layer: int, policy: str) -> None:
    model, expert, cache = tiny_model(), Failing(layer), DynamicCache()
    press = MoERouterPress(experts=[expert, "semantic"], policy=policy)
    with pytest.raises(ArithmeticError, match="out of luck"), torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert [x.keys.shape[2] for x in cache.layers] == [LENGTH] * (layer + 1)
    expert.layer = None
    assert_untouched(model, press, cache)


@pytest.mark.parametrize("budget", ["uniform", "model"])
def test_exception_in_an_expert_while_decoding(budget: str) -> None:
    model, expert, cache = tiny_model(), Failing(), DynamicCache()
    press = MoERouterPress(experts=[expert], top_k=1, budget=budget, decoding=DecodingConfig(20, 1))
    expert.layer = None
    where = torch.tensor([LENGTH])
    inputs = {"past_key_values": cache, "cache_position": where, "position_ids": where[None]}

    def held() -> list[list[int]]:
        return [
            layer.to_dense()[2].tolist() if budget == "model" else layer.keys.shape[2]
            for layer in cache.layers
        ]

    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        before = held()
        expert.layer = 1
        with pytest.raises(ArithmeticError, match="out of luck"):
            model(tokens(1, 1), **inputs)
        grown = [torch.tensor(n) + 1 for n in before]
        assert [torch.tensor(n).tolist() for n in held()] == [n.tolist() for n in grown]
        expert.layer = None
        cache.crop(-1)
        model(tokens(1, 1), **inputs)
    assert press.get_stats()["forward_count"] == 2
    assert torch.tensor(held()).float().mean() == 20


def test_scores_of_an_expert_of_another_shape() -> None:
    model, expert = tiny_model(), Fixed(torch.zeros(1, 2, LENGTH - 1))
    press = MoERouterPress(experts=[expert], top_k=1)
    cache = DynamicCache()
    message = r"scores \[1, 2, 40\] on cpu from expert 'fixed', got torch.float32 \[1, 2, 39\]"
    with pytest.raises(ValueError, match=message), torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    expert.fixed = torch.rand(1, 2, LENGTH)
    assert_untouched(model, press, cache)


def test_one_press_in_two_blocks() -> None:
    model, other, press = tiny_model(), tiny_model("qwen2"), MoERouterPress(budget="uniform")
    for second in (model, other):
        with press(model):
            with pytest.raises(RuntimeError, match="one block at a time"), press(second):
                pass
            cache = prefill(model, tokens(1, LENGTH))  # the outer block goes on
        assert cache.get_seq_length() == LENGTH // 2
    press.reset_stats()
    assert_untouched(model, press, DynamicCache())


@pytest.mark.parametrize("outer", [MoERouterPress, KnormPress])
def test_nested_presses(outer: Callable[..., Any]) -> None:
    model, press = tiny_model(), MoERouterPress()
    options = {"budget": "uniform"} if outer is MoERouterPress else {}
    with outer(compression_ratio=0.5, **options)(model):
        with pytest.raises(RuntimeError, match="without a press at work"), press(model):
            pass
        cache = prefill(model, tokens(1, LENGTH))
    assert cache.get_seq_length() == LENGTH // 2
    assert_untouched(model, press, DynamicCache())


def test_cache_changed_by_another_press() -> None:
    model, press, cache = tiny_model(), MoERouterPress(), DynamicCache()
    message = "another hook has changed"
    with pytest.raises(RuntimeError, match=message), press(model), KnormPress(0.25)(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    # The other press has done its work, but in the last layer; this one none.
    assert [layer.keys.shape[2] for layer in cache.layers] == [LENGTH * 3 // 4, LENGTH]
    assert_untouched(model, press, DynamicCache())


def test_another_model() -> None:
    model, press = tiny_model(), MoERouterPress()
    with press(model):
        prefill(model, tokens(1, LENGTH))
    other = tiny_model("qwen2")
    with pytest.raises(RuntimeError, match=r"got another: call reset_stats\(\)"), press(other):
        pass
    press.reset_stats()
    assert_untouched(other, press, DynamicCache())


def test_cache_already_cut() -> None:
    model, press = tiny_model(), MoERouterPress()
    composed = ComposedPress([KnormPress(0.5), press])
    with pytest.raises(ValueError, match="put MoERouterPress first"), composed(model):
        prefill(model, tokens(1, LENGTH))
    assert_untouched(model, press, DynamicCache())


def test_reordered_hidden_states() -> None:
    model, press = tiny_model(), MoERouterPress()
    with pytest.raises(ValueError, match="in order"), BlockPress(press, block_size=10)(model):
        prefill(model, tokens(1, LENGTH))
    assert_untouched(model, press, DynamicCache())

"""Caches that cannot be compressed, and what compressed ones refuse."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from growth_cases import decode
from peers import peer
from quantized import quantized_cache
from refusals import LENGTH, assert_same, compressed, held, padded, refuse
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache

from moekv import DecodingConfig, MoERouterPress
from moekv.cache.layer import CompressedLayer
from moekv.cache.static import CompactStaticLayer
from moekv.models.hooks import CROPS_BY_COUNT

COMPRESSED = ["uniform", "model"]


def static_cache(**options: Any) -> StaticCache:
    return StaticCache(tiny_model().config, max_cache_len=64, **options)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (quantized_cache, "IdentityLayer"),
        (lambda: static_cache(offloading=True), "offloaded"),
    ],
)
def test_caches_that_cannot_be_served(make: Callable[[], Cache], name: str) -> None:
    cache = make()
    message = f"StaticCache, got .*{name}"
    refuse(TypeError, message, tiny_model(), MoERouterPress(), cache)
    assert not any(layer.is_initialized for layer in cache.layers)


def test_a_cache_of_the_models_own() -> None:
    parts = {"__module__": "transformers.models.own.modeling_own", "layers": []}
    own: Any = type("OwnCache", (), parts)()
    message = "got OwnCache, the model's own in transformers .*; a later one, .* is served"
    refuse(TypeError, message, tiny_model(), MoERouterPress(), own)


def test_continuous_batching(caplog: pytest.LogCaptureFixture) -> None:
    model, config = tiny_model(), GenerationConfig(max_new_tokens=4, eos_token_id=0)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with MoERouterPress()(model):
            model.generate_batch([[5, 6, 7] * 10], generation_config=config)
    finally:
        logger.removeHandler(caplog.handler)
    said = "".join(str(r.exc_info[1]) if r.exc_info else r.getMessage() for r in caplog.records)
    assert "expected a transformers.DynamicCache or StaticCache, got the pages" in said
    assert "generate(...) takes batches of prompts" in said and "`moekv serve` requests" in said


@pytest.mark.parametrize(
    ("options", "block", "what"),
    [
        ({"budget": "head"}, {}, "budget 'head'"),
        ({"budget": "model"}, {}, "budget 'model'"),
        ({"policy": "dominant"}, {}, "policy 'dominant'"),
        ({"streaming": True}, {}, "streaming"),
        ({"pairs": "k8v4"}, {}, "pairs 'k8v4'"),
        ({"decoding": DecodingConfig()}, {}, "repeated compression"),
        ({}, {"context_length": LENGTH}, "repeated compression"),
        ({}, {}, "rows with padding"),
    ],
)
def test_static_caches_and_layers_of_different_lengths(
    options: dict[str, Any], block: dict[str, Any], what: str
) -> None:
    model, press, cache = tiny_model(), MoERouterPress(**options), static_cache()
    mask = padded()
    message = f"DynamicCache for .*{what}.*, got a static cache"
    for inputs in (
        ({"attention_mask": mask}, {}) if options | block else ({"attention_mask": mask},)
    ):
        with pytest.raises(TypeError, match=message), torch.no_grad(), press(model, **block):
            model(tokens(2, LENGTH), past_key_values=cache, **inputs)
    assert not any(layer.is_initialized for layer in cache.layers)
    with pytest.raises(TypeError, match=message), press(model, **block):
        model.generate(
            tokens(2, LENGTH),
            attention_mask=mask,
            cache_implementation="static",
            max_new_tokens=2,
        )


def test_static_caches_and_padding_in_masks_of_hybrid_models() -> None:
    """generate makes a mask for each kind of layer before the model runs."""
    model, press = tiny_model("gemma3"), MoERouterPress()
    cache = StaticCache(model.config, max_cache_len=LENGTH + 2)
    with pytest.raises(TypeError, match="rows with padding"), press(model):
        model.generate(
            tokens(2, LENGTH),
            attention_mask=padded(),
            past_key_values=cache,
            max_new_tokens=2,
            disable_compile=True,
        )
    assert not any(layer.is_initialized for layer in cache.layers)


def test_memory_that_runs_out_in_a_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, press, cache = tiny_model(), MoERouterPress(), static_cache()
    compact, layers = CompactStaticLayer.compact, []

    def run_out(layer: CompactStaticLayer, *args: Any, **kwargs: Any) -> None:
        layers.append(layer)
        if len(layers) == 2:
            raise MemoryError("no memory for the second layer")
        compact(layer, *args, **kwargs)

    monkeypatch.setattr(CompactStaticLayer, "compact", run_out)
    with pytest.raises(MemoryError), torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert len(layers) == 2 and not cache.get_seq_length()
    monkeypatch.undo()
    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    expected = compressed(model, "uniform")
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert int(layer.evicted) == LENGTH // 2
        torch.testing.assert_close(layer.keys[:, :, : LENGTH // 2], other.keys)


def test_rows_that_cannot_be_repeated() -> None:
    """As layers of states in transformers 5.24, which hybrid models have."""
    states = type("StateLayer", (), {"is_sliding": False})()
    model, press, cache = tiny_model(), MoERouterPress(decoding=DecodingConfig(20)), DynamicCache()
    message = "to continue each 3 times, got a StateLayer, which transformers .* does not repeat"
    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        cache.layers.append(states)
        with pytest.raises(TypeError, match=message):
            model(tokens(3, 1), past_key_values=cache)
    assert [layer.batch_size for layer in cache.layers[:-1]] == [1, 1]


@pytest.mark.parametrize("budget", COMPRESSED)
@pytest.mark.parametrize(
    ("name", "dtype", "rows", "message"),
    [
        ("llama", torch.float32, 3, "new tokens of 2 rows for this cache, got 3"),
        ("llama", torch.float32, 4, r"of 2 rows.*got 4; cache.reorder_cache\(.*interleave\(2\)\)"),
        ("llama", torch.bfloat16, 2, "torch.float32 on cpu like the cache, got torch.bfloat16"),
        ("llama_mha", torch.float32, 2, r"got \[2, 4, 1, 16\]"),
        ("qwen3", torch.float32, 2, r"got \[2, 2, 1, 24\]"),
    ],
)
def test_other_tokens_for_a_compressed_cache(
    budget: str, name: str, dtype: torch.dtype, rows: int, message: str
) -> None:
    cache = compressed(tiny_model(), budget, extra=1)
    cache.batch_repeat_interleave(2)
    before = held(cache)
    other = tiny_model(name).to(dtype)
    where = torch.tensor([LENGTH + 1])
    with pytest.raises(ValueError, match=message), torch.no_grad():
        other(
            tokens(rows, 1),
            past_key_values=cache,
            cache_position=where,
            position_ids=where[None],
        )
    assert_same(cache, before)


@pytest.mark.parametrize("budget", COMPRESSED)
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("rows", [3, 4])
def test_a_mask_of_other_rows_than_a_cache_has(budget: str, grows: bool, rows: int) -> None:
    model = tiny_model()
    press = MoERouterPress(budget=budget, decoding=DecodingConfig(20) if grows else None)
    with press(model):
        cache = prefill(model, tokens(2, LENGTH))
    before = held(cache)
    mask = torch.ones(rows, LENGTH + 1, dtype=torch.long)
    block = press(model) if grows else contextlib.nullcontext()
    message = f"of 2 rows for this cache, got {rows}"
    with pytest.raises(ValueError, match=message), block, torch.no_grad():
        model(tokens(rows, 1), attention_mask=mask, past_key_values=cache)
    assert_same(cache, before)


@pytest.mark.parametrize("budget", COMPRESSED)
@pytest.mark.parametrize("how", ["compressed", "selected"])
def test_pairs_of_before_a_compression(budget: str, how: str) -> None:
    model = tiny_model()
    cache = compressed(model, budget)
    before = [(layer.keys, layer.values) for layer in cache.layers]
    if how == "selected":
        cache.reorder_cache(torch.tensor([0]))
    else:
        growing = DecodingConfig(12, 1)
        options = {"experts": ["selective"], "top_k": 1, "budget": budget}
        with MoERouterPress(decoding=growing, **options)(model):
            decode(model, cache, LENGTH)
    after = held(cache)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        with pytest.raises(ValueError, match="older ones, which are not kept"):
            layer.keys = keys
        with pytest.raises(ValueError, match="older ones, which are not kept"):
            layer.values = values
    assert_same(cache, after)


def test_fewer_pairs_of_a_dense_layer() -> None:
    """The true length would be lost: nobody says which have left."""
    model = tiny_model()
    cache = compressed(model, "uniform")
    before = held(cache)
    for layer in cache.layers:
        some = torch.tensor([0, 2, 5])
        for name in ("keys", "values"):
            pairs = getattr(layer, name)
            for fewer in (pairs[:, :, some], (pairs * 2)[:, :, :3]):
                with pytest.raises(
                    ValueError, match="slice .* of its own, .* got 3: which of them"
                ):
                    setattr(layer, name, fewer)
    assert_same(cache, before)
    press = peer("DecodingPress")(peer("KnormPress")(), compression_interval=1, target_size=3)
    with torch.no_grad(), press(model), pytest.raises(ValueError, match="which of them left"):
        model(tokens(1, 1), past_key_values=cache)


def test_pairs_that_a_dense_layer_has_not_handed_out() -> None:
    """As many as it holds, or more: a crop of them could not be told from what is held."""
    model = tiny_model()
    cache, other = (compressed(model, "uniform") for _ in range(2))
    whole = prefill(model, tokens(1, LENGTH))
    before = held(cache)
    for layer, twin, dense in zip(cache.layers, other.layers, whole.layers, strict=True):
        for name in ("keys", "values"):
            pairs = getattr(layer, name)
            for others in (
                None,
                torch.clone(pairs),
                pairs * 2,
                torch.cat([pairs, pairs], 2),
                getattr(twin, name),
                getattr(twin, name)[:, :, :-1],
                getattr(dense, name),
            ):
                with pytest.raises(ValueError, match="which of them left, .*cache.update appends"):
                    setattr(layer, name, others)
    assert_same(cache, before)


@pytest.mark.parametrize("failing", [1, 2], ids=["keys", "values"])
@pytest.mark.parametrize("budget", COMPRESSED)
def test_memory_that_runs_out_when_a_layer_grows(
    budget: str, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pair, calls = tiny_model(), torch.ones(1, 2, 1, 16), []
    cache, expected = (compressed(model, budget) for _ in range(2))
    before = held(cache)

    def run_out(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == failing:
            raise MemoryError("no memory for one more token")
        return self.new_zeros(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", run_out)
        with pytest.raises(MemoryError):
            cache.layers[0].update(pair, pair)
    assert len(calls) == failing
    assert_same(cache, before)
    for each in (cache, expected):
        each.layers[0].update(pair, pair)
    assert_same(cache, held(expected))


@pytest.mark.parametrize("budget", COMPRESSED)
def test_crop_into_a_compressed_context(budget: str) -> None:
    model = tiny_model()
    cache = compressed(model, budget, extra=3)
    before, length, run = held(cache), cache.get_seq_length(), 16
    assert length == LENGTH + 3 and [layer.run for layer in cache.layers] == [run, run]
    message = f"first {LENGTH} were compressed together, only tokens after them can be removed"
    nothing = length - 4 - run if CROPS_BY_COUNT else 0
    for wanted in (-4 - run, length - 4 - run, nothing, -length - 1):
        with pytest.raises(ValueError, match=f"{message}, and the last {run} of them"):
            cache.crop(wanted)
        assert_same(cache, before)
    cache.crop(-2)
    assert cache.get_seq_length() == length - 2
    cache.crop(length - 3)
    context = held(compressed(model, budget))
    assert_same(cache, context)
    cache.crop(-run)  # every head has these
    assert cache.get_seq_length() == LENGTH - run
    left = [x[:, :, :-run] if x.is_floating_point() else x - run for x in context]
    assert_same(cache, left)
    with pytest.raises(ValueError, match=r"only tokens after them can be removed\. "):
        cache.crop(-1)
    assert_same(cache, left)


@pytest.mark.parametrize("budget", COMPRESSED)
def test_a_crop_to_what_is_no_number_of_tokens(budget: str) -> None:
    cache = compressed(tiny_model(), budget, extra=3)
    before, length = held(cache), cache.get_seq_length()
    for wanted in (length - 1.0, float(LENGTH), -1.0, "1"):
        for crop in (cache.crop, cache.layers[1].crop):
            with pytest.raises(TypeError):
                crop(wanted)
            assert_same(cache, before)
    cache.crop(torch.tensor(length - 1) if not CROPS_BY_COUNT else torch.tensor(-1))
    assert [layer.get_seq_length() for layer in cache.layers] == [length - 1] * 2


@pytest.mark.parametrize("name", ["gpt_oss", "gemma3"])
@pytest.mark.parametrize("first", [True, False], ids=["in order", "compressed ones first"])
def test_a_crop_that_one_layer_refuses(name: str, first: bool) -> None:
    """Layers with sliding windows, which are not compressed, lose nothing either."""
    model = tiny_model(name)
    with MoERouterPress(0.5, recent=1)(model):
        cache = prefill(model, tokens(1, 12))
    cache.layers = cache.layers if first else cache.layers[::-1]
    kinds = {isinstance(layer, CompressedLayer) for layer in cache.layers}
    lengths = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(ValueError, match="cannot crop"):
        cache.crop(9 if not CROPS_BY_COUNT else -3)
    assert kinds == {True, False}
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    cache.layers.reverse()
    for layer in cache.layers:
        if not isinstance(layer, CompressedLayer):
            layer.sliding_window = 4  # which it has exceeded: it refuses after others have cropped
    with pytest.raises((ValueError, RuntimeError), match="sliding"):
        cache.crop(11 if not CROPS_BY_COUNT else -1)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths


def test_ragged_cache_for_code_that_expects_dense_tensors() -> None:
    cache = compressed(tiny_model(), "model")
    before = held(cache)
    eager = tiny_model(attention="eager")
    where = torch.tensor([[LENGTH]])
    keys = cache.layers[0].keys
    assert keys.to(keys.device) is keys and keys.numel() == keys.shape.numel()
    for use in (
        lambda: eager(tokens(1, 1), past_key_values=cache, position_ids=where),
        lambda: torch.cat([keys, keys], dim=2),
        lambda: keys.sum(),
        lambda: keys + 1,
        lambda: keys[:, :, 3:],
        lambda: keys[0],
        lambda: keys.to("meta"),
        lambda: keys.to(torch.float16),
        lambda: [pair for layer in cache for pair in layer[0]],
    ):
        with pytest.raises(TypeError, match=r"to_dense\(\)"), torch.no_grad():
            use()
    cache.crop(LENGTH)  # what the first layer got before eager attention gave up
    assert_same(cache, before)


def begun_with(cache: DynamicCache) -> dict[str, Callable[[], Any]]:
    """Make other caches of the pairs that a cache's layers show."""

    def update(other: Cache) -> None:
        for index, layer in enumerate(cache.layers):
            other.update(layer.keys, layer.values, index)

    def assign() -> None:
        other = DynamicCache(config=tiny_model().config)
        for new, old in zip(other.layers, cache.layers, strict=True):
            new.lazy_initialization(*[torch.empty(1)] * 2)
            new.keys, new.values = old.keys, old.values
        tiny_model()(tokens(1, 1), past_key_values=other)

    def longer() -> None:
        other = DynamicCache()
        tiny_model()(tokens(1, 5), past_key_values=other)
        update(other)

    return {
        "iteration": lambda: DynamicCache(list(cache)),
        "iteration, with a config": lambda: DynamicCache(list(cache), config=tiny_model().config),
        "pairs of caches": lambda: EncoderDecoderCache(list(EncoderDecoderCache(cache, cache))),
        "update": lambda: update(DynamicCache()),
        "update, static": lambda: update(static_cache()),
        "update behind others": longer,
        "assignment": assign,
    }


@pytest.mark.parametrize("how", begun_with(DynamicCache()))
def test_pairs_without_their_layer(how: str) -> None:
    """They would be the first positions, of as many as there are pairs."""
    model = tiny_model()
    cache = compressed(model, "uniform")
    before = held(cache)
    with pytest.raises(TypeError, match=rf"compressed layer retains of {LENGTH} positions"):
        begun_with(cache)[how]()
    assert_same(cache, before)
    with MoERouterPress(0.0, decoding=DecodingConfig(LENGTH, 1))(model):  # nothing has left
        model(tokens(1, LENGTH), past_key_values=(whole := DynamicCache()))
    assert DynamicCache(list(whole)).get_seq_length() == LENGTH


@pytest.mark.parametrize("budget", COMPRESSED)
def test_reset_of_a_compressed_cache(budget: str) -> None:
    cache = compressed(tiny_model(), budget)
    before = held(cache)
    with pytest.raises(RuntimeError, match="new text with a new cache"):
        cache.reset()
    assert_same(cache, before)

"""Budgets that are kept while layers arrive: what stays is what is kept when all have."""

import functools
from typing import Any

import pytest
import torch
from given_expert import press_by
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moekv import DecodingConfig, MoERouterPress
from moekv.budget import kept_pairs, select, without_padding
from moekv.cache.caches import cached_pairs
from moekv.cache.growing import GrowingLayer
from moekv.cache.ragged import RaggedLayer
from moekv.press.streaming import SLACK, StreamingBudget
from moekv.routing.mixing import Votes, order

LENGTH, NUM_LAYERS = 90, 6
BUDGETS = ["uniform", "head", "model"]


given_press = functools.partial(press_by, lambda layer: -0.1 * (layer - 2) ** 2, budget="model")


def deep_model() -> PreTrainedModel:
    """Layers enough for a budget to fill up and be trimmed again."""
    config = tiny_model().config.to_dict() | {"num_hidden_layers": NUM_LAYERS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.generation_config.eos_token_id = None
    return model.eval()


def stored_pairs(cache: DynamicCache) -> int:
    """Pairs in all layers of a cache."""
    return sum(
        len(layer.stored_keys) if isinstance(layer, RaggedLayer) else layer.keys.shape[:3].numel()
        for layer in cache.layers
        if layer.is_initialized
    )


def assert_equal(left: DynamicCache, right: DynamicCache) -> None:
    ragged = ("stored_keys", "stored_values", "begin", "end", "context_length")
    for a, b in zip(left.layers, right.layers, strict=True):
        assert type(a) is type(b)
        for name in ragged if isinstance(a, RaggedLayer) else ("keys", "values", "evicted"):
            x, y = getattr(a, name), getattr(b, name)
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


def _votes(scores: Tensor, voters: tuple[bool, ...], has_shared: bool, generator: Any) -> Votes:
    """Shares that differ from layer to layer, but for a shared voter's."""
    shares = torch.rand(scores.shape[:2], generator=generator) + 0.1
    if has_shared:
        shares[1:] *= 0.2 / shares[1:].sum(0)
        shares[0] = 0.8
    else:
        shares /= shares.sum(0)
    return Votes(scores, shares, voters, has_shared)


@settings(deadline=None, max_examples=150)
@given(
    num_layers=st.integers(1, 7),
    heads=st.integers(1, 3),
    length=st.integers(1, 60),
    padding=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    ratio=st.floats(0.01, 0.99),
    sinks=st.integers(0, 6),
    recent=st.integers(0, 8),
    distinct=st.sampled_from([2, 5, 10_000]),
    voters=st.sampled_from([(True,), (False,), (True, False), (True, False, True), (False, True)]),
    has_shared=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_stream_ends_where_one_selection_does(
    num_layers, heads, length, padding, ratio, sinks, recent, distinct, voters, has_shared, seed
):
    generator = torch.Generator().manual_seed(seed)
    lengths = [max(length - n, 0) for n in padding]
    totals = [kept_pairs(n, ratio) for n in lengths]
    start = None
    if any(padding):
        start = torch.tensor([length - n for n in lengths], dtype=torch.int32)
    shape = (len(padding), heads, length)
    said = [
        # Few distinct scores: ties; a scale for each layer: some layers lose nearly all.
        torch.randint(0, distinct, (len(voters), *shape), generator=generator).float()
        * torch.rand((), generator=generator)
        for _ in range(num_layers)
    ]
    said[seed % num_layers][0, 0, 0, seed % length] = float("nan")
    has_shared = has_shared and len(voters) > 1
    votes = [_votes(x, voters, has_shared, generator) for x in said]
    real = None
    if start is not None:
        real = torch.arange(length) >= start[:, None, None]
    scores = order(votes, "model", [real] * num_layers)
    pairs = [torch.randn(2, *shape, 2, generator=generator) for _ in votes]
    protected = {"sinks": sinks, "recent": recent, "backend": "cpu"}
    expected = DynamicCache()
    chosen = select(scores, start, totals, budget="model", **protected)
    if start is not None:
        chosen = [without_padding(kept, start, [0]) for kept in chosen]  # as if rows were empty
    cache = DynamicCache()
    stream = StreamingBudget(
        cache,
        budget="model",
        num_layers=num_layers,
        totals=totals,
        lengths=lengths,
        start=start,
        **protected,
    )
    budget = num_layers * heads * sum(totals)
    empty = num_layers * heads * sum(n == 0 for n in lengths)
    for index, (layer, kept) in enumerate(zip(pairs, chosen, strict=True)):
        cache.update(*layer, index)
        expected.update(*layer, index)
        expected.layers[index] = RaggedLayer.compress(*layer, kept, backend="cpu")
        stream.add(index, votes[index])
        if has_shared and voters[0]:  # what a share of .8 can still bring
            most = budget / 0.8 + num_layers * heads * (sinks + recent) * len(padding)
            assert stored_pairs(cache) <= (1 + SLACK) * most
        elif voters == (True,) or not any(voters):
            assert stored_pairs(cache) <= (1 + SLACK) * budget
    assert_equal(cache, expected)
    assert stored_pairs(cache) == budget - empty
    assert [layer.after for layer in stream.layers] == [layer.nbytes for layer in cache.layers]


def test_what_ranks_last_leaves_at_once_and_older_layers_later() -> None:
    """Budget: two of ten layers, 40 pairs. Each layer has one pair more that beats all before."""
    cache, heads = DynamicCache(), 1
    stream = StreamingBudget(
        cache,
        budget="model",
        num_layers=10,
        totals=[4],
        lengths=[20],
        start=None,
        sinks=0,
        recent=0,
        backend="cpu",
    )
    sizes = []
    for index in range(10):
        cache.update(*torch.zeros(2, 1, heads, 20, 2), index)
        scores = torch.full((1, heads, 20), -float(index))
        scores[..., : max(index - 1, 0)] = index
        stream.add(index, Votes(scores[None], torch.ones(1, 1), (True,)))
        sizes.append([layer.size for layer in stream.layers])
    assert sizes[2] == [20, 20, 1] and sizes[3] == [20, 20, 1, 2]  # within the slack: 45
    assert sizes[4] == [20, 14, 1, 2, 3]  # 46: trimmed to 40
    assert sum(sizes[-1]) == 40 and sizes[-1][2:] == [1, 2, 3, 4, 5, 6, 7, 8]


def padded_batch(padding: list[int]) -> dict[str, Tensor]:
    input_ids = tokens(len(padding), LENGTH)
    mask = torch.ones_like(input_ids)
    for row, n in enumerate(padding):
        mask[row, :n] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 0.97])
@pytest.mark.parametrize("padding", [[0], [0, 40, 85]], ids=["one row", "padded rows"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_prefill_is_compressed_as_in_the_exact_form(
    budget: str, padding: list[int], ratio: float
) -> None:
    model, inputs = deep_model(), padded_batch(padding)
    caches, tokens_out, stats = [], [], []
    for streaming in (False, True):
        press = given_press(ratio, budget=budget, streaming=streaming)
        cache = DynamicCache()
        with press(model):
            out = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0
            )
        caches.append(cache)
        tokens_out.append(out)
        stats.append(press.get_stats()["compression"])
    assert torch.equal(*tokens_out) and stats[0] == stats[1]
    if ratio:
        assert_equal(*caches)
        heads = model.config.num_key_value_heads
        kept = sum(kept_pairs(LENGTH - n, ratio) for n in padding)
        dense = isinstance(caches[1].layers[0], GrowingLayer)
        assert dense == (budget == "uniform" and padding == [0])
        assert stored_pairs(caches[1]) == NUM_LAYERS * heads * (kept + 7 * dense)  # with 7 tokens


@pytest.mark.parametrize("budget", BUDGETS)
def test_decoding_goes_on_compressing_after_a_stream(budget: str) -> None:
    model, outs = deep_model(), []
    for streaming in (False, True):
        config, cache = DecodingConfig(target=30, interval=4), DynamicCache()
        press = given_press(0.5, budget=budget, streaming=streaming, decoding=config)
        with press(model):
            outs.append(model.generate(tokens(1, LENGTH), past_key_values=cache, max_new_tokens=20))
        assert stored_pairs(cache) <= 34 * NUM_LAYERS * model.config.num_key_value_heads
    assert torch.equal(*outs)


def resident_pairs(press: MoERouterPress) -> list[int]:
    """Pairs in the cache during a prefill, each time that a layer's hooks have run."""
    model, cache, resident = deep_model(), DynamicCache(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: resident.append(stored_pairs(cache)))
    with press(model), torch.no_grad():
        model(tokens(1, LENGTH), past_key_values=cache)
    return resident


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_peak_is_the_budget_a_slack_and_one_layer(budget: str, ratio: float) -> None:
    heads, kept = deep_model().config.num_key_value_heads, kept_pairs(LENGTH, ratio)
    exact = resident_pairs(given_press(ratio, budget=budget))
    streaming = resident_pairs(given_press(ratio, budget=budget, streaming=True))
    assert exact[-1] == streaming[-1] == NUM_LAYERS * heads * kept
    assert exact[-2] == (NUM_LAYERS - 1) * heads * LENGTH
    # A layer that is whole comes on top.
    if budget == "model":
        assert max(streaming) <= (1 + SLACK) * NUM_LAYERS * heads * kept
    else:
        assert streaming == [n * heads * kept for n in range(1, NUM_LAYERS + 1)]


def break_down(error: BaseException) -> Any:
    def hook(*_: Any, **__: Any) -> None:
        raise error

    return hook


@pytest.mark.parametrize("error", [ArithmeticError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("layer", [0, 4, NUM_LAYERS - 1])
@pytest.mark.parametrize("budget", ["uniform", "model"])
def test_an_error_halfway_leaves_an_empty_cache(
    budget: str, layer: int, place: str, error: BaseException
) -> None:
    model, cache = deep_model(), DynamicCache()
    press = given_press(0.75, budget=budget, streaming=True)
    module = model.model.layers[layer].input_layernorm if place == "before" else None
    module = module or model.model.layers[layer].mlp
    handle = module.register_forward_pre_hook(break_down(error))
    with pytest.raises(type(error)), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert not model.model._forward_hooks
    finished = layer == NUM_LAYERS - 1 and place == "after"  # all are trimmed by then
    assert any(x.is_initialized for x in cache.layers) == finished
    assert stored_pairs(cache) == (NUM_LAYERS * 2 * kept_pairs(LENGTH, 0.75) if finished else 0)
    assert press.get_stats()["forward_count"] == finished
    handle.remove()
    with press(model):
        again = DynamicCache()
        model(tokens(1, LENGTH), past_key_values=again)
    with given_press(0.75, budget=budget)(model):
        exact = DynamicCache()
        model(tokens(1, LENGTH), past_key_values=exact)
    assert_equal(again, exact)


def test_an_error_that_is_caught_inside_the_block_leaves_an_empty_cache_too() -> None:
    model, press, cache = deep_model(), given_press(0.75, streaming=True), DynamicCache()
    handle = model.model.layers[4].mlp.register_forward_pre_hook(break_down(ArithmeticError()))
    with press(model):
        with pytest.raises(ArithmeticError):
            model(tokens(1, LENGTH), past_key_values=cache)
        assert stored_pairs(cache) == 0
        handle.remove()
        model(tokens(1, LENGTH), past_key_values=cache)
    assert stored_pairs(cache) == NUM_LAYERS * 2 * kept_pairs(LENGTH, 0.75)


@pytest.mark.parametrize("method", ["compress", "recompress"])
def test_memory_that_runs_out_while_a_layer_is_trimmed(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, press, cache = deep_model(), given_press(0.75, streaming=True), DynamicCache()
    monkeypatch.setattr(RaggedLayer, method, break_down(MemoryError("no more")))
    with pytest.raises(MemoryError, match="no more"), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert not any(layer.is_initialized for layer in cache.layers)


def test_layers_with_sliding_windows_are_emptied_as_well() -> None:
    model, press = tiny_model("gemma3"), given_press(0.5, streaming=True)
    cache = DynamicCache(config=model.config)
    handle = model.model.layers[2].mlp.register_forward_pre_hook(break_down(ArithmeticError()))
    classes = [type(layer) for layer in cache.layers]
    model.model.layers[2].self_attn.register_forward_pre_hook(break_down(ArithmeticError()))
    with pytest.raises(ArithmeticError), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    handle.remove()
    assert [type(layer) for layer in cache.layers] == classes
    assert cache.get_seq_length() == 0 and not any(x.is_initialized for x in cache.layers)


def test_a_layer_that_somebody_else_replaces_is_noticed() -> None:
    model, press, cache = deep_model(), given_press(0.75, streaming=True), DynamicCache()

    def replace(*_: Any) -> None:
        keys, values = cached_pairs(cache.layers[0])
        cache.layers[0] = type(cache.layers[0])()
        cache.layers[0].update(keys, values)

    model.model.layers[1].input_layernorm.register_forward_pre_hook(replace)
    with pytest.raises(RuntimeError, match="another hook has replaced layer 0"), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert stored_pairs(cache) == 0

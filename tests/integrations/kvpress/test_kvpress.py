"""MoERouterPress inside kvpress's wrappers and pipeline, against selections made by hand."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    ChunkPress,
    ComposedPress,
    DecodingPress,
    KeyRerotationPress,
    KnormPress,
    KVPressTextGenerationPipeline,
    PerLayerCompressionPress,
    PrefillDecodingPress,
)
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from word_tokenizer import word_tokenizer

from moekv import DecodingConfig, Expert, LayerView, MoERouterPress
from moekv.cache.ragged import RaggedLayer
from moekv.ops import ScoreKind
from moekv.press.press import find_layers

LENGTH = 100
MODELS = ["llama", "phi3", "qwen3"]


def make_press(ratio: float = 0.5, **options: Any) -> MoERouterPress:
    options = {"experts": ["conservative", "selective", "semantic", "temporal"]} | options
    return MoERouterPress(ratio, recent=5, window=12, **options)


class Spy(Expert):
    """Remembers the views."""

    name = "spy"
    kinds = (ScoreKind.ATTENTION,)

    def __init__(self) -> None:
        self.views: list[LayerView] = []

    def scores(self, view: LayerView) -> Tensor:
        self.views.append(view)
        return view.scores_of(ScoreKind.ATTENTION)


@dataclass
class Call:
    """What a hook of an attention layer gets, and the pairs as they are then."""

    module: nn.Module
    kwargs: dict[str, Any]
    keys: Tensor
    values: Tensor

    def score(self, press: MoERouterPress, part: slice = slice(None)) -> Tensor:
        hidden_states = self.kwargs["hidden_states"][:, part]
        keys, values = self.keys[:, :, part], self.values[:, :, part]
        return press.score(self.module, hidden_states, keys, values, None, self.kwargs)


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Call]]:
    calls: list[Call] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        calls.append(Call(module, kwargs, layer.keys.clone(), layer.values.clone()))

    _, layers = find_layers(model)
    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def queries_of(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Rotated queries of each layer in the last forward, as its attention gets them."""
    queries: dict[int, Tensor] = {}
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        queries[module.layer_idx] = query
        return attend(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
    try:
        yield queries
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend


def run(model: PreTrainedModel, press: BasePress) -> tuple[DynamicCache, list[Call]]:
    """Prefill with a press; also what the layers had before it acted."""
    with recorded(model) as calls, press(model):
        cache = prefill(model, tokens(2, LENGTH))
    return cache, calls


def best(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count, dim=-1).indices.sort(-1).values


def take(pairs: Tensor, positions: Tensor) -> Tensor:
    return pairs.gather(2, positions[..., None].expand(-1, -1, -1, pairs.shape[-1]))


@pytest.mark.parametrize("name", MODELS)
def test_alone_keeps_the_best_by_score(name: str) -> None:
    cache, calls = run(tiny_model(name), make_press(0.7, budget="uniform"))
    probe = make_press(0.7)
    for call, layer in zip(calls, cache.layers, strict=True):
        positions = best(call.score(probe), int(LENGTH * 0.3))
        assert torch.equal(layer.keys, take(call.keys, positions))
        assert torch.equal(layer.values, take(call.values, positions))


@pytest.mark.parametrize("name", MODELS)
def test_key_rerotation(name: str) -> None:
    model = tiny_model(name)
    if name == "phi3":
        model = tiny_model("llama_mha")  # kvpress rerotates whole heads only
    cache, calls = run(model, KeyRerotationPress(make_press()))
    probe = make_press()
    for call, layer in zip(calls, cache.layers, strict=True):
        positions = best(call.score(probe), LENGTH // 2)
        assert torch.equal(layer.values, take(call.values, positions))
        # The keys as if their tokens had stood next to each other from the beginning.
        theta = model.model.rotary_emb.inv_freq.repeat(2)
        angle = (torch.arange(LENGTH // 2) - positions)[..., None] * theta
        keys = take(call.keys, positions)
        left, right = keys.chunk(2, -1)
        turned = keys * angle.cos() + torch.cat([-right, left], -1) * angle.sin()
        torch.testing.assert_close(layer.keys, turned, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_adakv_moves_the_budget_between_heads(name: str) -> None:
    model = tiny_model(name)
    cache, calls = run(model, AdaKVPress(make_press(), alpha_safeguard=0.2))
    probe = make_press()
    for call, layer in zip(calls, cache.layers, strict=True):
        assert torch.equal(layer.keys, call.keys)  # masked, not removed
        scores = call.score(probe)
        batch, heads, length = scores.shape
        safe = scores.topk(LENGTH // 10, dim=-1).indices
        scores = scores.scatter(-1, safe, torch.inf).flatten(1)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept.scatter_(1, scores.topk(heads * length // 2, dim=1).indices, True)
        masked = torch.zeros(batch, heads, length, dtype=torch.bool)
        masked[call.module.masked_key_indices] = True
        assert torch.equal(~masked.flatten(1), kept)
        assert (~masked)[:, :, :4].all() and (~masked)[:, :, -5:].all()


@pytest.mark.parametrize("name", MODELS)
def test_chunks_are_scored_one_by_one(name: str) -> None:
    cache, calls = run(tiny_model(name), ChunkPress(make_press(), chunk_length=32))
    probe = make_press()
    for call, layer in zip(calls, cache.layers, strict=True):
        positions = []
        for begin in range(0, LENGTH, 32):
            part = slice(begin, min(begin + 32, LENGTH))
            count = (part.stop - begin) // 2
            positions.append(begin + call.score(probe, part).topk(count, dim=-1).indices)
        positions = torch.cat(positions, -1)
        assert layer.keys.shape[2] == 16 * 3 + 2
        assert torch.equal(layer.keys, take(call.keys, positions))
        assert torch.equal(layer.values, take(call.values, positions))


@pytest.mark.parametrize("name", MODELS)
def test_queries_of_a_chunk_stand_at_their_true_positions(name: str) -> None:
    model, spy = tiny_model(name), Spy()
    press = ChunkPress(make_press(experts=[spy], top_k=1), chunk_length=32)
    with queries_of(model) as queries, press(model):
        prefill(model, tokens(2, LENGTH))
    assert len(spy.views) == 2 * 4
    for number, view in enumerate(spy.views):
        end = min(32 * (number % 4 + 1), LENGTH)
        true = queries[view.module.layer_idx][:, :, end - view.queries.shape[2] : end]
        assert view.queries.shape[2] == min(12, view.keys.shape[2])
        torch.testing.assert_close(view.queries, true, atol=1e-5, rtol=1e-5)


def test_only_the_first_chunk_has_sinks_and_only_the_last_is_recent() -> None:
    _, calls = run(tiny_model(), ChunkPress(make_press(), chunk_length=25))
    probe = make_press(experts=["selective"], top_k=1)
    for call in calls:
        for begin in range(0, LENGTH, 25):
            order = call.score(probe, slice(begin, begin + 25)).argsort(-1, descending=True)
            if begin == 0:
                assert (order[..., :4] == torch.arange(4)).all()
            elif begin == 75:
                assert (order[..., :5] == torch.arange(24, 19, -1)).all()
            else:
                assert not (order[..., :4] == torch.arange(4)).all()
                assert not (order[..., :5] == torch.arange(24, 19, -1)).all()


def test_composed_with_a_press_after_it() -> None:
    cache, calls = run(tiny_model(), ComposedPress([make_press(0.4), KnormPress(0.5)]))
    probe = make_press(0.4)
    for call, layer in zip(calls, cache.layers, strict=True):
        positions = best(call.score(probe), 60)
        keys, values = take(call.keys, positions), take(call.values, positions)
        smallest = (-keys.norm(dim=-1)).topk(30, dim=-1).indices
        assert torch.equal(layer.keys, take(keys, smallest))
        assert torch.equal(layer.values, take(values, smallest))


def test_composed_after_a_press_that_cut_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="put MoERouterPress first"):
        run(tiny_model(), ComposedPress([KnormPress(0.5), make_press(0.4)]))


def test_per_layer_ratios() -> None:
    press = make_press()
    ratios = [0.2, 0.75]
    cache, calls = run(tiny_model(), PerLayerCompressionPress(press, ratios))
    for call, layer, ratio in zip(calls, cache.layers, ratios, strict=True):
        positions = best(call.score(make_press(ratio)), round(LENGTH * (1 - ratio)))
        assert torch.equal(layer.keys, take(call.keys, positions))
        assert torch.equal(layer.values, take(call.values, positions))
    assert press.compression_ratio == 0.5
    compression = press.get_stats()["compression"]
    assert compression["ratio"] == pytest.approx(1 - (80 + 25) / 200)
    assert compression["bytes_freed"] == compression["bytes_before"] * 95 // 200


@pytest.mark.parametrize("name", [*MODELS, "gemma3_multimodal"])
@pytest.mark.parametrize("buffer_size", [256, 3])
def test_decoding_compresses_every_few_steps(name: str, buffer_size: int) -> None:
    model, spy = tiny_model(name), Spy()
    press = DecodingPress(
        make_press(0, experts=[spy, "semantic"], cache_aware=False),
        compression_interval=10,
        target_size=60,
        hidden_states_buffer_size=buffer_size,
    )
    with torch.no_grad(), press(model):
        cache, fed = prefill(model, tokens(2, LENGTH)), {}
        layers = cache.layers[-2:]  # Gemma's first has a sliding window
        for step in range(20):
            position = torch.tensor([LENGTH + step])
            before = [layer.keys.shape[2] for layer in layers]
            with queries_of(model) as queries:
                model(tokens(2, 1, seed=step), past_key_values=cache, cache_position=position)
            fed = {i: torch.cat([fed[i], q], 2) if i in fed else q for i, q in queries.items()}
            if step % 10 < 9:
                assert [layer.keys.shape[2] for layer in layers] == [n + 1 for n in before]
                continue
            views, spy.views = spy.views, []
            assert len(views) == 2
            for view, layer in zip(views, layers, strict=True):
                assert view.keys.shape[2] == (LENGTH + 10 if step == 9 else 70)
                assert layer.keys.shape[2] == 60
                seen = min(10, buffer_size + 1)
                assert view.hidden_states.shape[1] == seen
                true = fed[view.module.layer_idx][:, :, -seen:]
                torch.testing.assert_close(view.queries, true, atol=1e-5, rtol=1e-5)
                ratio = 1 - 60.5 / view.keys.shape[2]  # rounded down
                probe = make_press(ratio, experts=[Spy(), "semantic"], cache_aware=False)
                scores = probe.score(
                    view.module, view.hidden_states, view.keys, view.values, None, view.kwargs
                )
                positions = best(scores, 60)
                assert torch.equal(layer.keys, take(view.keys, positions))
                assert torch.equal(layer.values, take(view.values, positions))


def test_prefill_and_decoding() -> None:
    model = tiny_model()
    press = PrefillDecodingPress(
        make_press(0.5), DecodingPress(make_press(0), compression_interval=4, target_size=30)
    )
    with press(model):
        out = model.generate(
            tokens(1, LENGTH), max_new_tokens=8, do_sample=False, return_dict_in_generate=True
        )
    # 50 after the prefill, 30 after the fourth step, and three steps more.
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [33, 33]


def test_pipeline() -> None:
    model, tokenizer = tiny_model(), word_tokenizer()
    pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    words = [f"w{i}" for i in tokens(1, LENGTH)[0].tolist()]
    cache = DynamicCache()
    answer = pipe(
        " ".join(words),
        question="w5 w6 w7",
        press=make_press(budget="uniform"),
        cache=cache,
        max_new_tokens=4,
    )["answer"]
    input_ids = tokenizer(f"<s> {' '.join(words)}", return_tensors="pt").input_ids
    with make_press(budget="uniform")(model):
        expected = prefill(model, input_ids)
    assert input_ids.shape[1] == LENGTH + 1
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert layer.keys.shape[2] == (LENGTH + 1) // 2
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)

    token, length, generated = torch.tensor([[5, 6, 7]]), LENGTH + 1, []
    for _ in range(4):
        position_ids = torch.arange(length, length + token.shape[1])[None]
        with torch.no_grad():
            logits = model(token, past_key_values=expected, position_ids=position_ids).logits
        length += token.shape[1]
        token = logits[:, -1:].argmax(-1)
        generated.append(token.item())
    assert answer == tokenizer.decode(generated)


@pytest.mark.parametrize("budget", ["uniform", "head", "model"])
@pytest.mark.parametrize("streaming", [False, True])
def test_pipeline_asks_several_questions_of_one_compressed_context(
    budget: str, streaming: bool
) -> None:
    """Each answer is the one that the question alone gets: nothing of the others is left."""
    model, tokenizer = tiny_model(), word_tokenizer()
    pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    context = " ".join(f"w{i}" for i in tokens(1, LENGTH)[0].tolist())
    questions = ["w5 w6 w7", "w8", "w9 w10 w11 w12"]

    def press() -> MoERouterPress:
        return make_press(0.7, budget=budget, streaming=streaming)

    cache = DynamicCache()
    answers = pipe(context, questions=questions, press=press(), cache=cache, max_new_tokens=12)[
        "answers"
    ]
    heads = 0
    for layer in cache.layers:
        ragged = isinstance(layer, RaggedLayer)
        assert ragged == (budget != "uniform")
        heads += sum(layer.stored_pairs) if ragged else layer.keys.shape[:3].numel()
        assert not ragged or layer.tail_length == 0
    assert heads == 4 * int((LENGTH + 1) * 0.3)
    alone = [
        pipe(context, question=q, press=press(), max_new_tokens=12)["answer"] for q in questions
    ]
    assert answers == alone and len(set(answers)) == 3


@pytest.mark.parametrize("budget", ["auto", "model"])
def test_pipeline_goes_on_compressing_while_it_answers(budget: str) -> None:
    """As the press does in a block of its own, over context, question and answer."""
    model, tokenizer = tiny_model(), word_tokenizer()
    pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    words = " ".join(f"w{i}" for i in tokens(1, LENGTH)[0].tolist())

    def press() -> MoERouterPress:
        decoding = DecodingConfig(target=40, interval=4)
        return make_press(0.5, budget=budget, decoding=decoding)

    cache, alone, used = DynamicCache(), DynamicCache(), press()
    with pytest.warns(UserWarning, match=f"first {LENGTH + 1} positions alone, got a cache"):
        answer = pipe(words, question="w5 w6 w7", press=used, cache=cache, max_new_tokens=30)
    input_ids = tokenizer(f"<s> {words}", return_tensors="pt").input_ids
    out = []
    with torch.no_grad(), press()(model):
        model(input_ids, past_key_values=alone)
        token = torch.tensor([[5, 6, 7]])
        for _ in range(30):
            token = model(token, past_key_values=alone).logits[:, -1:].argmax(-1)
            out.append(token.item())
    assert answer["answer"] == tokenizer.decode(out, skip_special_tokens=True)
    for layer, other in zip(cache.layers, alone.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length() == LENGTH + 1 + 3 + 29
        assert layer.count_pairs([0]) == other.count_pairs([0])
    held = sum(layer.count_pairs([0])[0] for layer in cache.layers)
    assert held < 2 * len(cache) * 44
    twin = pickle.loads(pickle.dumps(used))
    assert twin.decoding == used.decoding and isinstance(twin, PrefillDecodingPress)
    twin.decoding = None
    assert not isinstance(twin, PrefillDecodingPress) and isinstance(twin, MoERouterPress)

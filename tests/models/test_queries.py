"""The queries that experts see are the model's own, wherever they come from."""

import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from model_sweep import try_press
from tiny_models import VOCABULARY, prefill, tiny_model, tokens
from torch import Tensor, nn
from transformers import (
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    XGLMConfig,
    XGLMForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from moekv import DecodingConfig, Expert, LayerView, MoERouterPress
from moekv.models.habits import habits_of
from moekv.models.hooks import find_layers, rotary_in
from moekv.models.queries import _turns, logits_of
from moekv.models.watching import ask
from moekv.ops import ScoreKind

WINDOW = 13
LENGTH = 40


class Spy(Expert):
    name, kinds = "spy", (ScoreKind.MASS,)

    def __init__(self) -> None:
        self.seen: list[tuple[nn.Module, Tensor]] = []

    def scores(self, view: LayerView) -> Tensor:
        self.seen.append((view.module, view.queries.clone()))
        return view.scores_of(ScoreKind.MASS)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[nn.Module, list[Tensor]]:
    """All that attention functions are asked, seen beside moekv."""
    kind, seen = type(ALL_ATTENTION_FUNCTIONS), {}
    plain = kind.get_interface

    def get(self: Any, name: str, default: Any) -> Any:
        function = plain(self, name, default)

        def attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = function(module, query, *args, **kwargs)  # not where it was but asked
            seen.setdefault(module, []).append(query.detach().clone())
            return result

        return attention

    monkeypatch.setattr(kind, "get_interface", get)
    return seen


NAMES = ["llama", "smollm3", "stablelm", "hunyuan", "nanochat", "gpt2", "cohere", "glm"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*NAMES, "gpt_oss", "doge", "deepseek_v3"])
def test_queries_of_a_prefill(
    name: str, attention: str, asked: dict[nn.Module, list[Tensor]]
) -> None:
    model, spy = tiny_model(name, attention), Spy()
    with MoERouterPress(0.5, experts=[spy], top_k=1, window=WINDOW)(model):
        prefill(model, tokens(2, 40))
    assert spy.seen
    for layer, queries in spy.seen:
        torch.testing.assert_close(queries, asked[layer][-1][:, :, -WINDOW:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_queries_of_a_cache_that_is_compressed_again(
    name: str, attention: str, asked: dict[nn.Module, list[Tensor]]
) -> None:
    model, spy = tiny_model(name, attention), Spy()
    options = {"decoding": DecodingConfig(30, 4), "window": WINDOW, "backend": "torch"}
    press = MoERouterPress(0.0, experts=[spy], top_k=1, **options)
    with press(model):
        model.generate(tokens(1, 40), max_new_tokens=12, do_sample=False, pad_token_id=0)
    _, layers = find_layers(model)
    again = spy.seen[len(layers) :]
    assert len(again) >= 2 * len(layers)
    for layer, queries in again:
        _is_run_of(queries, torch.cat(asked[layer], 2))


def _is_run_of(queries: Tensor, whole: Tensor) -> None:
    runs = whole.unfold(2, queries.shape[2], 1).permute(2, 0, 1, 4, 3)
    assert min(float((run - queries).norm() / queries.norm()) for run in runs) < 1e-4


def test_queries_behind_an_image(asked: dict[nn.Module, list[Tensor]]) -> None:
    """Whose positions are no places in the text (M-RoPE), neither for the text behind it."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "rope_parameters": rope,
    }
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "embed_dim": 32, "hidden_size": 64}
    special = {"image_token_id": 120, "video_token_id": 121}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                text_config=text,
                vision_config=vision | {"mlp_ratio": 2},
                vision_start_token_id=122,
                vision_end_token_id=123,
                **special,
            )
        ).eval()
    model.generation_config.eos_token_id = None
    before, behind = tokens(1, 50).clamp(max=110).split([20, 30], 1)
    image = torch.tensor([[122, *[120] * 16, 123]])
    ids = torch.cat([before, image, behind], 1)
    inputs = {
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64, 96, generator=torch.Generator().manual_seed(7)),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == 120).int()
    spy = Spy()
    options = {"decoding": DecodingConfig(30, 4), "window": WINDOW, "budget": "uniform"}
    press = MoERouterPress(0.0, experts=[spy, "expected"], backend="torch", **options)
    with press(model):
        greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=ids, **inputs, **greedy)
    assert len(spy.seen) >= 6
    for layer, queries in spy.seen:
        _is_run_of(queries, torch.cat(asked[layer], 2))


@pytest.mark.parametrize(
    ("name", "hands_over", "mixes"),
    [
        ("llama", True, False),
        ("phi3", True, False),
        ("gpt2", True, False),
        ("gpt_oss", True, False),
        ("doge", False, True),
        ("diffllama", False, True),
    ],
)
def test_habits(name: str, hands_over: bool, mixes: bool) -> None:
    model = tiny_model(name)
    with MoERouterPress(0.5)(model):
        pass
    decoder, layers = find_layers(model)
    for layer in layers:
        habits = habits_of(layer, rotary_in(decoder))
        assert habits.is_seen
        assert (habits.hands_over, habits.mixes) == (hands_over, mixes)


@pytest.mark.parametrize("name", ["doge", "diffllama", "deepseek_v3"])
def test_heads_that_are_mixed_keep_the_same_tokens(name: str) -> None:
    """And a step over them is one over the cache cut by hand."""
    # Each token once: newer ones cache latents that know no positions.
    ids = torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(0))[None, :40] + 3
    model = tiny_model(name)
    with MoERouterPress(0.5)(model):
        cut = prefill(model, ids)
    full = prefill(model, ids)
    mixes = all(
        habits_of(layer, rotary_in(find_layers(model)[0])).mixes for layer in find_layers(model)[1]
    )
    for layer, whole in zip(cut.layers, full.layers, strict=True):
        if not mixes:
            continue
        keys = layer.keys
        assert keys.shape[2] == 20
        same = (keys[:, :, :, None] == whole.keys[:, :, None]).all(-1)
        assert (same.sum(-1) == 1).all()
        assert (same == same[:, :1]).all()
        at = same[0, 0].int().argmax(-1)
        whole.keys, whole.values = whole.keys[:, :, at], whole.values[:, :, at]
    if mixes:
        step = {"position_ids": torch.tensor([[40]])}
        with torch.no_grad():
            logits = [model(ids[:, :1], past_key_values=x, **step).logits for x in (cut, full)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_heads_that_are_folded_into_rows() -> None:
    """By layers that multiply by themselves; XGLM scales queries, GPT-NeoX-Japanese the product."""
    shape = {"vocab_size": 128, "num_layers": 2, "d_model": 64, "ffn_dim": 96, "attention_heads": 4}
    model = XGLMForCausalLM(XGLMConfig(**shape, init_std=0.2)).eval()
    layer, states = find_layers(model)[1][0], torch.randn(2, 5, 64)
    asked = ask(layer, states, {})
    queries = layer.q_proj(states).view(2, 5, 4, 16).transpose(1, 2)
    torch.testing.assert_close(asked.query * asked.scaling, queries / 4)
    assert try_press(model) == "works: 2 of 2 layers, without padding"
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    japanese = GPTNeoXJapaneseConfig(**shape, vocab_size=128, initializer_range=0.2)
    model = GPTNeoXJapaneseForCausalLM(japanese).eval()
    layer = find_layers(model)[1][0]
    turn = (torch.ones(1, 5, 16), torch.zeros(1, 5, 16))
    places = torch.zeros(1, 5).long()
    asked = ask(layer, states, {"position_embeddings": turn, "position_ids": places})
    queries = layer.query_key_value(states).view(2, 5, 4, 48)[..., :16].transpose(1, 2)
    torch.testing.assert_close(asked.query * asked.scaling, queries / 4)
    assert try_press(model) == "works: 2 of 2 layers, without padding"


def test_a_layer_that_is_asked_again_leaves_no_trace() -> None:
    model = tiny_model()
    _, layers = find_layers(model)
    states = torch.ones(1, 3, 64)
    turn = model.model.rotary_emb(states, torch.arange(3)[None])
    with MoERouterPress(0.5)(model):
        first = ask(layers[0], states, {"position_embeddings": turn})
        again = ask(layers[0], states, {"position_embeddings": turn})
        prefill(model, tokens(1, 40))
    assert first.query.shape == (1, 4, 3, 16)
    assert torch.equal(first.query, again.query)


def test_inputs_without_a_name_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    press = MoERouterPress()
    with press(model := tiny_model()):
        prefill(model, tokens(1, 40))
    assert press.get_stats()["compression"]["ratio"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_logits_of_large_products_are_numbers(dtype: torch.dtype, softcap: float) -> None:
    queries, keys = (torch.randn(2, 3, n, 64).mul(300).to(dtype) for n in (4, 5))
    logits = logits_of(queries, keys, scaling=0.001, softcap=softcap)
    products = queries.double() @ keys.double().mT
    assert products.abs().max() > torch.finfo(torch.float16).max
    expected = products * 0.001
    if softcap:
        expected = softcap * torch.tanh(expected / softcap)
    assert logits.dtype == torch.float32
    rough = 0.02 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(logits.double(), expected, atol=rough * 800, rtol=rough)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_embedding_for_longer_texts_stays_as_it_is(kind: str) -> None:
    """Its frequencies are those of the longest text so far: what is asked behind one is longer."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": LENGTH}
        rope |= {name: [1.0 + i] * 8 for i, name in enumerate(("short_factor", "long_factor"))}
    config = tiny_model().config.to_dict()
    config |= {"max_position_embeddings": LENGTH, "rope_parameters": rope}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    rotary = model.model.rotary_emb
    for count in (LENGTH, LENGTH + 1, LENGTH + 9):
        prefill(model, tokens(1, count))
        names, frequencies = set(rotary.__dict__), rotary.inv_freq.clone()
        with MoERouterPress(0.1, experts=["expected"])(model):
            prefill(model, tokens(1, count))
        assert set(rotary.__dict__) == names and torch.equal(rotary.inv_freq, frequencies)


def test_dropout_in_projections_is_left_out_of_what_is_asked_again() -> None:
    """And draws no numbers: with or without a block, a seed gives the same logits in train mode."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj, nn.Dropout(0.3))

    def run(press: MoERouterPress | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        with torch.no_grad(), nullcontext() if press is None else press(model):
            logits = model(tokens(1, 60)).logits
        return logits, torch.get_rng_state()

    model.train()
    for ratio in (0.0, 0.5):
        press = MoERouterPress(ratio, experts=["expected", "selective"], router=None)
        assert all(map(torch.equal, run(None), run(press)))
    assert all(module.training for module in model.modules())
    model.eval()
    trained = run(MoERouterPress(experts=["expected"]))
    _turns.clear()  # what has been learned of the layers
    assert all(map(torch.equal, trained, run(MoERouterPress(experts=["expected"]))))

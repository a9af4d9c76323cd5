"""Layers that attend to the pairs of others, and layers with states: nothing leaves too early."""

import copy
from typing import Any

import every_model
import pytest
import torch
from every_model import TEXT_MODELS, build
from tiny_models import tokens
from transformers import DynamicCache, PreTrainedModel, StaticCache

from moekv import DecodingConfig, MoERouterPress, prefill_in_chunks

LENGTH = 40
_KINDS = ["sliding_attention", "full_attention"]
SHARING = [name for name in ("gemma3n_text", "gemma4_text") if name in TEXT_MODELS]
WITH_STATES = {
    "jamba": {},
    "qwen3_next": {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}


@pytest.fixture
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A new model whose last layers have no pairs of their own."""
    if request.param == "gemma4_text":
        sizes = {"num_kv_shared_layers": 2, "layer_types": _KINDS * 3, "num_hidden_layers": 6}
        monkeypatch.setitem(every_model._OWN, request.param, sizes)
    model = build(request.param)
    assert any(getattr(x, "is_kv_shared_layer", False) for x in model.modules())
    return model


@pytest.mark.parametrize("sharing", SHARING, indirect=True)
@pytest.mark.parametrize("kind", ["auto", "uniform", "streaming", "static"])
def test_a_prompt_is_read_as_without_a_press(sharing: PreTrainedModel, kind: str) -> None:
    """The first one, too, when it is found out how queries are turned."""
    options: dict[str, Any] = {"auto": {}, "streaming": {"streaming": True}}
    press = MoERouterPress(0.5, **options.get(kind, {"budget": "uniform"}))
    ids = tokens(1, LENGTH).clamp(3, 99)

    def prompt() -> Any:
        if kind == "static":
            cache: Any = StaticCache(config=sharing.config, max_cache_len=LENGTH + 10)
        else:
            cache = DynamicCache(config=sharing.config)
        with torch.no_grad():
            return sharing(ids, past_key_values=cache).logits

    expected = prompt()
    with press(sharing):
        got = prompt()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert press.get_stats()["compression"]["ratio"] >= 0.5


@pytest.mark.parametrize(
    ("sharing", "options"),
    [(name, options) for name in SHARING for options in ({}, {"budget": "uniform"})]
    + [("gemma3n_text", {"pairs": "k8v8"})],  # Gemma 4 reads dense pairs
    indirect=["sharing"],
    ids=str,
)
def test_steps_that_compress_see_what_others_see(
    sharing: PreTrainedModel, options: dict[str, Any]
) -> None:
    press = MoERouterPress(0.5, decoding=DecodingConfig(16, 4), **options)
    cache = DynamicCache(config=sharing.config)
    with torch.no_grad():
        with press(sharing):
            sharing(tokens(1, LENGTH).clamp(3, 99), past_key_values=cache)
        for step in range(9):
            token, other = tokens(1, 1, step).clamp(3, 99), copy.deepcopy(cache)
            expected = sharing(token, past_key_values=other).logits
            with press(sharing):
                got = sharing(token, past_key_values=cache).logits
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    held = [layer for layer in cache.layers if hasattr(layer, "context_length")]
    assert held and all(layer.context_length > LENGTH for layer in held)


@pytest.mark.parametrize("sharing", ["gemma3n_text"], indirect=True)
def test_prompts_in_chunks_and_padded_rows(sharing: PreTrainedModel) -> None:
    ids = tokens(2, LENGTH).clamp(3, 99)
    out = prefill_in_chunks(MoERouterPress(0.5), sharing, ids, chunk_size=16)
    assert out.past_key_values.get_seq_length() == LENGTH
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with MoERouterPress(0.5, decoding=DecodingConfig(16, 4))(sharing):
        sharing.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)


@pytest.mark.parametrize("name", [name for name in WITH_STATES if name in TEXT_MODELS])
def test_rows_behind_layers_with_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real models begin with such a layer, which counts no tokens."""
    monkeypatch.setitem(every_model._OWN, name, every_model._OWN.get(name, {}) | WITH_STATES[name])
    model = build(name)
    try:
        layers = DynamicCache(config=model.config).layers
    except TypeError:
        layers = []
    if not layers or hasattr(layers[0], "get_seq_length"):
        pytest.skip("this transformers keeps states in a cache of the model's own")
    ids = tokens(2, LENGTH).clamp(3, 99)
    how: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    press = MoERouterPress(0.5, decoding=DecodingConfig(16, 4))
    with press(model):
        both = model.generate(ids, **how)
        alone = [model.generate(row[None], **how) for row in ids]
    assert torch.equal(both, torch.cat(alone))

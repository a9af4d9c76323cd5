"""Layers that attend to the pairs of others, and layers with states: nothing leaves too early."""

import contextlib
import copy
from typing import Any

import every_model
import pytest
import torch
from every_model import TEXT_MODELS, build
from tiny_models import tokens
from transformers import DynamicCache, PreTrainedModel, StaticCache

from moekv import DecodingConfig, MoERouterPress, prefill_in_chunks
from moekv.models.habits import why_dense
from moekv.models.hooks import find_layers, rotary_in

LENGTH = 40
SHARING = [name for name in ("gemma3n_text", "gemma4_text") if name in TEXT_MODELS]
WITH_STATES = {
    "jamba": {},
    "qwen3_next": {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}


@pytest.fixture
def sharing(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A new model whose last layers have no pairs of their own."""
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
    [(name, x) for name in SHARING for x in ({}, {"budget": "uniform"}, {"pairs": "k8v8"})],
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


@pytest.mark.parametrize("sharing", SHARING, indirect=True)
def test_heads_may_hold_different_numbers(
    sharing: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Layers that leave their pairs for others are seen to hand over what their cache returns."""
    _, layers = find_layers(sharing)
    config = sharing.config.get_text_config(decoder=True)
    press = MoERouterPress(0.5)
    with press(sharing), torch.no_grad():
        sharing(tokens(1, LENGTH).clamp(3, 99), past_key_values=DynamicCache(config=config))
    assert all(why_dense(layer, rotary_in(sharing.model)) is None for layer in layers)
    assert press.get_stats()["budget"] == {"asked": "auto", "used": "model"}
    assert not caplog.records


@pytest.mark.parametrize("sharing", SHARING, indirect=True)
def test_prompts_in_chunks_and_padded_rows(sharing: PreTrainedModel) -> None:
    ids = tokens(2, LENGTH).clamp(3, 99)
    out = prefill_in_chunks(MoERouterPress(0.5), sharing, ids, chunk_size=16)
    assert out.past_key_values.get_seq_length() == LENGTH
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with MoERouterPress(0.5, decoding=DecodingConfig(16, 4))(sharing):
        sharing.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)


@pytest.fixture(params=[name for name in WITH_STATES if name in TEXT_MODELS])
def hybrid(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """As real ones it begins with a layer of states, which counts no tokens."""
    name = request.param
    monkeypatch.setitem(every_model._OWN, name, every_model._OWN.get(name, {}) | WITH_STATES[name])
    model = build(name)
    try:
        layers = DynamicCache(config=model.config).layers
    except TypeError:
        layers = []
    if not layers or hasattr(layers[0], "get_seq_length"):
        pytest.skip("this transformers keeps states in a cache of the model's own")
    return model


@pytest.mark.parametrize("grows", [False, True])
def test_several_answers_from_a_filled_cache_with_states(
    hybrid: PreTrainedModel, grows: bool
) -> None:
    """Models read states before they give a cache new ones: it is prepared with the mask."""
    press = MoERouterPress(0.5, decoding=DecodingConfig(16, 4) if grows else None)
    ids, cache = tokens(1, LENGTH).clamp(3, 99), DynamicCache(config=hybrid.config)
    with press(hybrid), torch.no_grad():
        hybrid(ids[:, :-1], past_key_values=cache)
    how: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    block = press(hybrid) if grows else contextlib.nullcontext()
    with block:
        alone = hybrid.generate(ids, past_key_values=copy.deepcopy(cache), **how)
    block = press(hybrid) if grows else contextlib.nullcontext()
    with block:
        options = how | {"num_return_sequences": 3, "do_sample": True, "top_k": 1}
        rows = hybrid.generate(ids, past_key_values=cache, **options)
    assert torch.equal(rows, alone.expand(3, -1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (4, r"cache\.reorder_cache\(torch\.arange\(2\)\.repeat_interleave\(2\)\)"),
        (3, "tokens of 2 rows for this cache, got 3"),
    ],
)
def test_rows_of_a_cache_with_states_that_are_not_repeated(
    hybrid: PreTrainedModel, rows: int, message: str
) -> None:
    ids, cache = tokens(2, LENGTH).clamp(3, 99), DynamicCache(config=hybrid.config)
    token = tokens(2, 1, 5).clamp(3, 99)
    with torch.no_grad():
        with MoERouterPress(0.5)(hybrid):
            hybrid(ids, past_key_values=cache)
        expected = hybrid(token, past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(ValueError, match=message):
            hybrid(token[:1].expand(rows, -1), past_key_values=cache)
        cache.reorder_cache(torch.arange(2).repeat_interleave(2))  # as it says; nothing has run
        got = hybrid(token.repeat_interleave(2, 0), past_key_values=cache).logits
    torch.testing.assert_close(got, expected.repeat_interleave(2, 0), atol=1e-4, rtol=1e-3)


def test_rows_behind_layers_with_states(hybrid: PreTrainedModel) -> None:
    model = hybrid
    ids = tokens(2, LENGTH).clamp(3, 99)
    how: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    press = MoERouterPress(0.5, decoding=DecodingConfig(16, 4))
    with press(model):
        both = model.generate(ids, **how)
        alone = [model.generate(row[None], **how) for row in ids]
    assert torch.equal(both, torch.cat(alone))

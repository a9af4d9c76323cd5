"""The oracle: does it see what later tokens attend to?"""

import dataclasses
import math

import pytest
import torch
from calibration_cases import SMALL, text
from tiny_models import tiny_model
from transformers import DynamicCache, PreTrainedTokenizerFast

from moekv.calibration import oracle as oracle_module
from moekv.calibration.oracle import Oracle


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("exponent", [1.0, 2.0, math.inf])
def test_the_oracle_sees_the_attention_of_the_second_reading(
    name: str, exponent: float, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle_module, "_TILE", 24)  # a tile, and part of one
    config = dataclasses.replace(SMALL, exponent=exponent)
    model = tiny_model(name, attention="eager")
    oracle = Oracle(model, tokenizer, config)
    words = text(70)
    reading = oracle.read(words, as_turn=False)
    body = oracle.encode(words)
    cache = DynamicCache()
    ids = torch.tensor([[*body, *oracle.repeat, *body]])
    with torch.no_grad():
        model(ids[:, : len(body)], past_key_values=cache)
        out = model(ids[:, len(body) :], past_key_values=cache, output_attentions=True)
    assert reading.target.shape == (len(oracle.layers), model.config.num_key_value_heads, len(body))
    for row, layer in enumerate(oracle.layers):
        attention = out.attentions[layer.layer_idx][0, :, :, : len(body)].double()
        attention = attention.unflatten(0, (model.config.num_key_value_heads, -1)).flatten(1, 2)
        if math.isinf(exponent):
            wanted = attention.amax(1)
        else:
            wanted = attention.pow(exponent).mean(1).pow(1 / exponent)
        torch.testing.assert_close(
            reading.target[row].double(), wanted.clamp(min=1e-6).log(), atol=2e-3, rtol=1e-3
        )


def test_products_beyond_float16_are_read(tokenizer: PreTrainedTokenizerFast) -> None:
    """Their logits are numbers of float16, and attention is that of the same model in float32."""
    models = [tiny_model() for _ in range(2)]
    for model in models:
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.data = (projection.weight.data * 150).half().to(model.dtype)
    half, wide, words = models[0].half(), models[1], text(70)
    found, expected = (Oracle(m, tokenizer, SMALL).read(words, as_turn=False) for m in (half, wide))
    assert found.target.isfinite().all()
    # The first layer's inputs differ by rounding alone.
    torch.testing.assert_close(found.target[0], expected.target[0], atol=0.5, rtol=0.1)


def test_a_turn_of_a_chat_is_read_between_its_marks(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "w1 w2 {{ messages[0]['content'] }} w3"
    oracle = Oracle(tiny_model(), tokenizer, SMALL)
    assert oracle.before == oracle.encode("w1 w2")
    assert oracle.repeat[-1:] == oracle.encode("w3")
    assert oracle.read(text(70), as_turn=True).hidden.shape[1] == 72
    assert oracle.read(text(200), as_turn=False).hidden.shape[1] == SMALL.length

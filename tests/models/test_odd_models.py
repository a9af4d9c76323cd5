"""Models that lack what others have, or count otherwise."""

import pytest
import torch
from every_model import build
from model_sweep import try_press
from refusals import LENGTH
from tiny_models import tokens
from transformers import DynamicCache

from moekv import DecodingConfig, MoERouterPress
from moekv.models.hooks import find_layers


@pytest.mark.parametrize("name", ["gpt_neox_japanese", "trocr", "xglm"])
def test_a_model_whose_layers_have_no_config(name: str) -> None:
    model = build(name)
    assert not any(hasattr(layer, "config") for layer in find_layers(model)[1])
    assert try_press(model) == "works: 4 of 4 layers, without padding"


def test_a_model_that_counts_from_one() -> None:
    """PaliGemma's first token is at position 1, so that its last is not beyond the prompt."""
    model, ids = build("paligemma"), tokens(1, LENGTH)
    press = MoERouterPress(0.5, decoding=DecodingConfig(16, 4))
    with press(model):
        model.generate(ids, max_new_tokens=9, do_sample=False)
        where, cache = torch.arange(2, LENGTH + 2)[None], DynamicCache(config=model.config)
        with pytest.raises(RuntimeError, match="positions below 41 for the last of 40"):
            model(ids, position_ids=where, past_key_values=cache)
    assert press.get_stats()["compression"]["ratio"] > 0.5

"""The block of a press: the models it serves, and that they are left as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from press_probes import LENGTH, compress, make_press
from tiny_models import prefill, tiny_model, tokens
from transformers import DynamicCache

from moekv import MoERouterPress
from moekv.models.hooks import find_layers, looks_up


def test_model_is_left_as_it_was() -> None:
    model = tiny_model()
    _, layers = find_layers(model)
    names = [name for name, _ in model.named_modules()]
    with make_press()(model):
        assert all(layer._forward_hooks for layer in layers)
        prefill(model, tokens(1, 20))
    assert [name for name, _ in model.named_modules()] == names
    assert not any(layer._forward_hooks for layer in layers)
    assert not model.model._forward_pre_hooks


def test_prefill_that_records_gradients() -> None:
    model = tiny_model()
    cache = DynamicCache()
    with make_press(budget="uniform")(model):
        logits = model(tokens(1, LENGTH), past_key_values=cache).logits
    assert cache.get_seq_length() == LENGTH
    logits.sum().backward()  # what backward saved is whole
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None


@pytest.mark.parametrize("make", [lambda m: m, lambda m: m.model])
def test_with_or_without_a_head(make: Callable[[Any], Any]) -> None:
    model = make(tiny_model())
    cache = DynamicCache()
    with make_press(budget="uniform")(model), torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 10 and cache.get_seq_length() == 20


def test_model_with_attention_of_its_own_keeps_dense_layers() -> None:
    model, input_ids = tiny_model("nemotron"), tokens(1, LENGTH)
    if looks_up(model.model.layers[0].self_attn):
        pytest.skip("in this transformers its attention is that of all")
    cache = compress(MoERouterPress(0.5), model, input_ids)
    assert [layer.keys.shape[2] for layer in cache.layers] == [LENGTH // 2] * 2
    with torch.no_grad():
        model(input_ids[:, :1], past_key_values=cache)
    for options in ({"budget": "model"}, {"budget": "head"}):
        with pytest.raises(ValueError, match="NemotronSdpaAttention, which reads dense caches"):
            compress(MoERouterPress(0.5, **options), model, input_ids)

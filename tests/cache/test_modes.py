"""Whatever mode and dtype tokens come in: a compressed cache takes what a `DynamicCache` takes."""

import contextlib
from typing import Any

import pytest
import torch
from growth_cases import EXPERTS
from random_router import random_router
from tiny_models import prefill, tiny_model, tokens
from transformers import DynamicCache
from whole_caches import keep_all

from moekv import DecodingConfig, MoERouterPress

LENGTH = 30


def plain() -> Any:
    return torch.no_grad()


def autocast() -> Any:
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
    stack.enter_context(torch.no_grad())
    return stack


MODES = {"plain": plain, "autocast": autocast, "inference": torch.inference_mode}

PRESSES: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"budget": "uniform"},
    "routed": {"num_experts": 6, "router_type": "pikv", "cache_aware": True},
    "streaming": {"streaming": True, "budget": "model"},
    "decoding": {"experts": EXPERTS, "decoding": DecodingConfig(12, 2)},
    "decoding, ragged": {"experts": EXPERTS, "decoding": DecodingConfig(12, 2), "budget": "head"},
    "calibrated": {"decoding": DecodingConfig(12, 2)},
    "quantised": {"experts": EXPERTS, "decoding": DecodingConfig(12, 2), "pairs": "k8v8"},
}


def make_press(name: str, model: Any) -> MoERouterPress:
    options = dict(PRESSES[name])
    if name == "calibrated":
        options["router"] = random_router(model)
    return MoERouterPress(0.5, **options)


def feed(model: Any, cache: DynamicCache, count: int) -> torch.Tensor:
    begin = cache.get_seq_length()
    position = torch.arange(begin, begin + count)[None]
    return model(tokens(1, count, begin), past_key_values=cache, position_ids=position).logits


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("modes", ["autocast autocast", "plain autocast", "autocast plain"])
def test_logits_and_dtypes_are_those_of_a_dynamic_cache(ragged: bool, modes: str) -> None:
    model, (first, then) = tiny_model(), modes.split()
    logits, dtypes = [], []
    for compresses in (False, True):
        cache = DynamicCache()
        with MODES[first]():
            model(tokens(1, LENGTH), past_key_values=cache)
        if compresses:
            keep_all(cache, ragged)
        with MODES[then]():
            logits.append(torch.cat([feed(model, cache, count) for count in (1, 1, 3)], 1))
        last = cache.layers[-1]
        dtypes.append((last.keys.dtype, last.values.dtype))
    # Autocast may leave rotated keys wider than values; ragged layers have one dtype.
    assert dtypes[1] in (dtypes[0], (torch.promote_types(*dtypes[0]),) * 2)
    scale = logits[0].abs().max()
    torch.testing.assert_close(logits[1] / scale, logits[0] / scale, atol=0.03, rtol=0)


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("modes", ["inference plain", "plain inference"])
def test_inference_mode_for_a_part_of_a_text(name: str, modes: str) -> None:
    """Pairs, notes, states and statistics that were begun in either mode go on in the other."""
    model, outs = tiny_model(), []
    for first, then in (("plain", "plain"), modes.split()):
        press, cache = make_press(name, model), DynamicCache()
        with press(model):
            with MODES[first]():
                model(tokens(1, LENGTH), past_key_values=cache)
            for step in range(5):
                with MODES[then if step % 2 else first]():
                    feed(model, cache, 1)
            with MODES[then]():
                model(tokens(1, LENGTH), past_key_values=DynamicCache())
        with MODES[then]():
            outs.append((feed(model, cache, 2).clone(), repr(press.get_stats())))
    assert torch.equal(outs[0][0], outs[1][0]) and outs[0][1] == outs[1][1]


@pytest.mark.parametrize("name", PRESSES)
def test_presses_under_autocast(name: str) -> None:
    model, outs = tiny_model(), []
    for mode in (plain, autocast):
        press, cache = make_press(name, model), DynamicCache()
        with press(model), mode():
            model(tokens(1, LENGTH), past_key_values=cache)
            for _ in range(4):
                feed(model, cache, 1)
        outs.append(press.get_stats()["compression"]["ratio"])
        with mode():
            assert feed(model, cache, 2).isfinite().all()
    assert outs[0] == outs[1] > 0


@pytest.mark.parametrize("name", ["default", "uniform"])
def test_other_default_dtypes(name: str) -> None:
    model, outs = tiny_model(), []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        press = MoERouterPress(0.5, **PRESSES[name])
        torch.set_default_dtype(dtype)
        try:
            with press(model):
                cache = prefill(model, tokens(1, LENGTH))
            with torch.no_grad():
                logits = feed(model, cache, 2)
        finally:
            torch.set_default_dtype(torch.float32)
        outs.append((logits, press.get_stats()["compression"]))
    for logits, compression in outs[1:]:
        torch.testing.assert_close(logits, outs[0][0])
        assert compression == outs[0][1]


@pytest.mark.parametrize("name", PRESSES)
def test_other_default_devices(name: str) -> None:
    """What is made stands where the model is, whatever the caller's default is."""
    model, logits = tiny_model(), []
    ids, rows = tokens(1, LENGTH), torch.tensor([1, 0])
    for default in ("cpu", "meta"):
        cache: Any = DynamicCache()
        press = make_press(name, model)
        with torch.no_grad(), torch.device(default):
            with press(model):
                model(ids, past_key_values=cache)
                out = [model(ids[:, :1], past_key_values=cache).logits for _ in range(4)]
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(rows)
            cache.crop(LENGTH + 3)
            out.append(model(ids[:, :2].repeat(2, 1), past_key_values=cache).logits)
            press.get_stats()
        logits.append(torch.cat([x[:1] for x in out], 1))
    assert torch.equal(*logits)


def test_values_that_are_wider_than_keys() -> None:
    """Then keys are copied to be read, and the cache is still known to be the same."""
    model, cache = tiny_model(), DynamicCache()

    def narrow(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = cache.layers[module.layer_idx]
        layer.keys = layer.keys.bfloat16()

    handles = [
        block.self_attn.register_forward_hook(narrow, with_kwargs=True)
        for block in model.model.layers
    ]
    with MoERouterPress(0.5)(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    for handle in handles:
        handle.remove()
    assert sum(sum(layer.stored_pairs) for layer in cache.layers) == 2 * 2 * (LENGTH // 2)
    assert all(layer.stored_keys.dtype == torch.float32 for layer in cache.layers)


@pytest.mark.parametrize("how", ["masks over the context", "gradients"])
def test_products_beyond_float16(how: str) -> None:
    """Queries and keys whose products float16 cannot hold, unlike the logits made of them."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 150
        layer.self_attn.k_proj.weight.data *= 150
    model.half()
    with MoERouterPress(0.5, router=None)(model):
        cache = prefill(model, tokens(1, LENGTH))
    full = prefill(model, tokens(1, LENGTH))
    mask = torch.ones(1, LENGTH + 1, dtype=torch.long)
    mask[:, 3:6] = int(how == "gradients")
    embedded = model.get_input_embeddings()(tokens(1, 1, 1)).detach()
    embedded.requires_grad_(how == "gradients")
    for each in (full, cache):
        logits = model(
            inputs_embeds=embedded,
            past_key_values=each,
            attention_mask=mask,
            position_ids=torch.tensor([[LENGTH]]),
        ).logits
        assert logits.isfinite().all()
    layer: Any = cache.layers[0]
    assert layer.is_ragged
    largest = (full.layers[0].keys.float() ** 2).sum(-1).amax()
    assert largest > torch.finfo(torch.float16).max

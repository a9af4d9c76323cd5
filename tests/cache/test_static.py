"""Compression inside static caches: equal to masks on a full cache, and compiled only once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from growth_cases import EXPERTS, make_press
from masked_reference import Lockstep
from tiny_models import prefill, tiny_model, tokens
from transformers import StaticCache
from transformers.generation import CompileConfig

from moekv import MoERouterPress
from moekv.cache.static import CompactStaticLayer

SLOTS = 64


def static_cache(model: Any) -> StaticCache:
    return StaticCache(model.config, max_cache_len=SLOTS)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "llama_mha"])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_equals_masks_on_a_full_cache(name: str, batch: int) -> None:
    cache = static_cache(tiny_model(name))
    both = Lockstep(name, padding=(0,) * batch, cache=cache)
    press = make_press(0.6, experts=EXPERTS)
    with press(both.model):
        both.feed(tokens(batch, 50))
        buffers = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        assert (both.pairs() == 20).all()
        for step in range(40):  # 50 + 40 tokens: more than there are slots
            both.feed(tokens(batch, 1, seed=step))
    assert buffers == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    assert (both.pairs() == 60).all()
    compression = press.get_stats()["compression"]
    assert compression["ratio"] == 0.6 and compression["bytes_freed"] == 0


def test_static_layers_keep_what_growing_ones_keep() -> None:
    model = tiny_model()
    with make_press(0.5, experts=EXPERTS, budget="uniform")(model):
        growing = prefill(model, tokens(2, 50))
    cache = static_cache(model)
    # A press of its own: a history of hit rates moves what is kept of a second prompt.
    with make_press(0.5, experts=EXPERTS, budget="uniform")(model), torch.no_grad():
        model(tokens(2, 50), past_key_values=cache)
    for layer, other in zip(cache.layers, growing.layers, strict=True):
        torch.testing.assert_close(layer.keys[:, :, :25], other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values[:, :, :25], other.values, atol=1e-4, rtol=1e-4)
        assert not layer.keys[:, :, 25:].any()


def test_a_hybrid_cache() -> None:
    """Sliding layers of a static cache stay as they are."""
    model = tiny_model("gemma3")
    press, input_ids = make_press(0.5, experts=EXPERTS), tokens(1, 40)
    outs = []
    for cache in (static_cache(model), None):
        with press(model):
            outs.append(
                model.generate(
                    input_ids,
                    past_key_values=cache,
                    max_new_tokens=12,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            )
        press.reset_stats()
    torch.testing.assert_close(
        torch.stack(outs[0].logits), torch.stack(outs[1].logits), atol=1e-3, rtol=1e-3
    )
    kinds = [type(layer).__name__ for layer in outs[0].past_key_values.layers]
    assert kinds == ["StaticSlidingWindowLayer"] + ["CompactStaticLayer"] * 2


@pytest.fixture
def no_recompiles() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_compiled_steps_are_compiled_once(
    inside: bool, with_mask: bool, no_recompiles: None
) -> None:
    """One graph for all prompts, ratios and presses, in the block or outside of it."""
    model = tiny_model()
    cache = static_cache(model)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.__call__, fullgraph=True, dynamic=False, backend=count)

    def step(input_ids: torch.Tensor, **inputs: Any) -> Any:
        if with_mask:  # as ``generate`` makes it, outside of the graph
            length = cache.get_mask_sizes(inputs["cache_position"], 0)
            places = torch.arange(length[0]) + length[1]
            inputs["attention_mask"] = (places <= inputs["cache_position"][:, None])[None, None]
        else:
            inputs.pop("attention_mask")
        return compiled(input_ids, **inputs)

    for length, ratio in [(20, 0.0), (40, 0.5), (33, 0.75), (50, 0.1)]:
        cache.reset()
        both = Lockstep(cache=cache)
        both.model = both.forward = model

        def decode(both: Lockstep = both) -> None:
            both.forward = step
            for n in range(7):
                both.feed(tokens(1, 1, seed=n))

        with make_press(ratio, experts=EXPERTS)(model):
            both.feed(tokens(1, length))
            if inside:
                decode()
        if not inside:
            decode()
    assert len(graphs) == 1


def test_generate_compiles_once(no_recompiles: None) -> None:
    model = tiny_model()
    cache = static_cache(model)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    for length, ratio in [(40, 0.5), (30, 0.7)]:
        outs = []
        cache.reset()
        for past, options in [(None, {}), (cache, {"compile_config": config})]:
            with make_press(ratio, experts=EXPERTS, budget="uniform")(model):
                outs.append(
                    model.generate(
                        tokens(2, length),
                        past_key_values=past,
                        max_new_tokens=15,
                        do_sample=False,
                        return_dict_in_generate=True,
                        output_logits=True,
                        **options,
                    )
                )
        assert torch.equal(outs[0].sequences, outs[1].sequences)
        torch.testing.assert_close(
            torch.stack(outs[0].logits), torch.stack(outs[1].logits), atol=1e-3, rtol=1e-3
        )
    assert all(isinstance(layer, CompactStaticLayer) for layer in cache.layers)
    assert model._last_compile_config is config


def test_defaults_serve_a_cache_implementation() -> None:
    model, press = tiny_model(), MoERouterPress()
    with press(model):
        out = model.generate(
            tokens(1, 40), cache_implementation="static", max_new_tokens=4, do_sample=False
        )
    with MoERouterPress()(model):
        assert torch.equal(out, model.generate(tokens(1, 40), max_new_tokens=4, do_sample=False))
    assert press.get_stats()["compression"]["ratio"] == 0.5


def test_gradients_of_a_prefill_are_not_those_of_other_pairs() -> None:
    """Pairs move in place: none of later tokens reaches the context, as in other caches."""
    model, ids = tiny_model(), tokens(1, 40)
    grads = []
    for cache in (static_cache(model), None):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.zero_grad()
        with make_press(0.5, experts=EXPERTS, budget="uniform")(model):
            out = model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        past = {"past_key_values": out.past_key_values, "cache_position": torch.tensor([40])}
        model(tokens(1, 1, seed=1), **past).logits.sum().backward(retain_graph=True)
        assert embeddings.grad is None
        grads.append({name: x.grad.clone() for name, x in model.named_parameters()})
        model.zero_grad()
        out.logits.sum().backward()  # the prefill's own are as they were
        grads[-1]["prefill"] = embeddings.grad
    for name, own in grads[0].items():
        torch.testing.assert_close(own, grads[1][name], atol=1e-3, rtol=1e-3)

"""Forms of the press at work, on the device of its inputs; each returns logits."""

from collections.abc import Callable
from typing import Any

import torch
from peers import peer
from random_router import random_router
from tiny_models import tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import moekv
from moekv import DecodingConfig, MoERouterPress, prefill_in_chunks

LENGTH, NUM_NEW = 44, 4


def prompt() -> Tensor:
    return tokens(1, LENGTH)


def press_for(input_ids: Tensor, **options: Any) -> MoERouterPress:
    """Every expert that serves growing caches and has a kernel of its own, and every statistic."""
    own = {"num_experts": 6, "top_k": 2, "router_type": "pikv", "cache_aware": True}
    options = own | options
    return MoERouterPress(backend=input_ids.device.type, **options)


def generate(model: PreTrainedModel, input_ids: Tensor, cache: Any, **options: Any) -> Tensor:
    """Logits of the new tokens."""
    output = model.generate(
        input_ids,
        past_key_values=cache,
        max_new_tokens=NUM_NEW,
        do_sample=False,
        pad_token_id=0,
        disable_compile=True,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(output.logits)


def compressed(**options: Any) -> Callable[[PreTrainedModel, Tensor], Tensor]:
    def run(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        with press_for(input_ids, **options)(model):
            return generate(model, input_ids, DynamicCache())

    return run


def quantised(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """In 16 bits, which quantised pairs ask of queries on a GPU. The best format is this one."""
    model = model.to(torch.float16)
    press = MoERouterPress(pairs="auto", fold=False, backend=input_ids.device.type)
    with press(model):
        cache = DynamicCache()
        logits = generate(model, input_ids, cache)
    assert {layer.rows.pairs for layer in cache.layers} == {"k8v4"}
    return logits.float()


def padded(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    input_ids = input_ids.repeat(2, 1)
    mask = torch.ones_like(input_ids)
    mask[0, :20] = 0
    with press_for(input_ids, budget="model")(model):
        return generate(model, input_ids, DynamicCache(), attention_mask=mask)


def beams(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    with press_for(input_ids, budget="model")(model):
        return generate(model, input_ids, DynamicCache(), num_beams=2)


def in_chunks(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    growing = DecodingConfig(target=24, interval=4)
    return chunks_by(press_for(input_ids, budget="model", decoding=growing), model, input_ids)


def calibrated(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    growing, backend = DecodingConfig(target=24, interval=4), input_ids.device.type
    press = MoERouterPress(router=random_router(model), decoding=growing, backend=backend)
    return chunks_by(press, model, input_ids)


def chunks_by(press: MoERouterPress, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    filled = prefill_in_chunks(press, model, input_ids[:, :-1], chunk_size=32)
    with press(model):
        return generate(model, input_ids, filled.past_key_values)


def static(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + NUM_NEW)
    with press_for(input_ids)(model):
        return generate(model, input_ids, cache)


def second_prompt(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    cache = DynamicCache()
    with press_for(input_ids, budget="model")(model):
        model(input_ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    logits: Tensor = model(input_ids[:, :9].repeat(2, 1), past_key_values=cache).logits
    return logits


def another_press(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    with moekv.ragged(peer("AdaKVPress")(peer("KnormPress")(0.5)))(model):
        return generate(model, input_ids, DynamicCache())


# Those in 16 bits, whose sums are rounded after each layer.
ROUNDED = {"quantised pairs"}

CASES = {
    "uniform": compressed(),
    "over heads": compressed(budget="head"),
    "over the model": compressed(budget="model"),
    "expected attention": compressed(num_experts=6, shared="expected"),
    "streaming": compressed(budget="model", streaming=True),
    "one expert rules": compressed(policy="dominant"),
    "grouped experts": compressed(router_type="hierarchical", cache_aware=None),
    "a dense cache that grows": compressed(decoding=DecodingConfig(target=20, interval=4)),
    "quantised pairs": quantised,
    "left padding": padded,
    "beams": beams,
    "in chunks": in_chunks,
    "a calibrated router, in chunks": calibrated,
    "a static cache": static,
    "a second prompt": second_prompt,
    "a press of kvpress": another_press,
}

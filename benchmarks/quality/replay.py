"""Prefill a context once, compress it many times.

A press acts after a layer's attention, on that layer's cache, and changes nothing that the prefill
itself computes. So attention and MLP outputs are recorded in one prefill, and every later prefill
recalls them: the model's own code runs, norms, hooks and cache included, but its expensive modules
return what they returned before. A press cannot tell the difference; its result is the same to the
bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from kvpress import BasePress
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from moekv.cache.attention import install
from moekv.cache.caches import storage_bytes
from moekv.cache.ragged import RaggedLayer
from moekv.models.watching import Asked, report, watched


@dataclass
class LayerTape:
    """What one decoder layer computed during the prefill."""

    keys: Tensor  # [B, H, T, D]
    values: Tensor  # [B, H, T, Dv]
    attention: Tensor  # [B, T, hidden]
    mlp: Tensor  # [B, T, hidden]
    asked: Asked  # its queries [B, Hq, T, D] and how they are used


@dataclass
class Recording:
    """One prefilled context."""

    input_ids: Tensor  # [B, T]
    layers: list[LayerTape]


@dataclass
class Footprint:
    """What a cache holds, counted on its tensors."""

    kept: int  # pairs that attention can see
    pairs: int  # pairs of the full cache
    bytes: int  # of the storages under keys and values


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return getattr(model.model, "language_model", model.model).layers


@torch.no_grad()
def record(model: PreTrainedModel, input_ids: Tensor) -> Recording:
    """Prefill `input_ids` [B, T] and keep what the layers computed."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[module] = output[0] if isinstance(output, tuple) else output

    modules = [m for layer in decoder_layers(model) for m in (layer.self_attn, layer.mlp)]
    asked: dict[nn.Module, Asked] = {}

    def hear(module: nn.Module, what: Asked) -> None:
        asked[module] = replace(what, key=None, value=None)

    hooks = [module.register_forward_hook(keep) for module in modules]
    cache = DynamicCache()
    install()
    try:
        with watched([layer.self_attn for layer in decoder_layers(model)], hear):
            model.model(input_ids=input_ids, past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    tapes = [
        LayerTape(
            cached.keys,
            cached.values,
            outputs[layer.self_attn],
            outputs[layer.mlp],
            asked[layer.self_attn],
        )
        for layer, cached in zip(decoder_layers(model), cache.layers, strict=True)
    ]
    return Recording(input_ids, tapes)


@contextmanager
def recalling(model: PreTrainedModel, recording: Recording) -> Iterator[None]:
    """Make the model's attention and MLP modules return what they returned for the recording."""

    def recall(attention: nn.Module, tape: LayerTape) -> None:
        own = attention.forward

        def forward(
            hidden_states: Tensor, *args: Any, past_key_values: Cache, **kwargs: Any
        ) -> Any:
            if hidden_states.shape[1] != recording.input_ids.shape[1]:  # a press asks the layer
                return own(hidden_states, *args, past_key_values=past_key_values, **kwargs)
            told = {"scaling": tape.asked.scaling, "softcap": tape.asked.softcap}
            report(attention, tape.asked.query, tape.keys, tape.values, told)
            # kvpress forgets the last context's masks here, in its attention function.
            attention.masked_key_indices = None
            past_key_values.update(tape.keys.clone(), tape.values.clone(), attention.layer_idx)
            return tape.attention, None

        attention.forward = forward

    layers = decoder_layers(model)
    try:
        for layer, tape in zip(layers, recording.layers, strict=True):
            recall(layer.self_attn, tape)
            layer.mlp.forward = lambda hidden_states, tape=tape: tape.mlp
        yield
    finally:
        for layer in layers:
            vars(layer.self_attn).pop("forward", None)
            vars(layer.mlp).pop("forward", None)


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Let the model attend in another way, and as before afterwards, whatever a press has set."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: Tensor, press: BasePress | None) -> Cache:
    """Prefill as a user would: the whole model runs, under the press."""
    cache = DynamicCache()
    for layer in decoder_layers(model):  # kvpress does so where it wraps attention: not in eager
        layer.self_attn.masked_key_indices = None
    with press(model) if press is not None else nullcontext():
        model.model(input_ids=input_ids, past_key_values=cache)
    return cache


@torch.no_grad()
def replay(model: PreTrainedModel, recording: Recording, press: BasePress | None) -> Cache:
    """Prefill from a recording under a press; the cache equals that of :func:`prefill`.

    Leaving the press' context runs the real model again, for presses that go on after the prefill.
    """
    cache = DynamicCache()
    with (
        press(model) if press is not None else nullcontext(),
        recalling(model, recording),
    ):
        model.model(input_ids=recording.input_ids, past_key_values=cache)
    return cache


@torch.no_grad()
def answer_logits(
    model: PreTrainedModel, cache: Cache, context_length: int, question: Tensor, answer: Tensor
) -> Tensor:
    """Logits `[answer tokens, vocabulary]` that predict each answer token, in fp32.

    The question `[1, Q]` and the answer `[1, A]` follow the context at their true positions. The
    cache is used up.
    """
    input_ids = torch.cat([question, answer[:, :-1]], dim=1)
    return _feed(model, cache, context_length, input_ids, answer.shape[1]).float()


@torch.no_grad()
def write(
    model: PreTrainedModel, cache: Cache, context_length: int, question: Tensor, most: int
) -> list[int]:
    """Continue the question `[1, Q]` greedily by at most `most` tokens; the cache is used up.

    The token that ends the model's turn ends the text, and is not returned.
    """
    ends = model.generation_config.eos_token_id
    ends = [ends] if ends is None or isinstance(ends, int) else ends
    written: list[int] = []
    given, position = question, context_length
    while True:
        (logits,) = _feed(model, cache, position, given, 1)
        token = int(logits.argmax())
        if token in ends:
            return written
        written.append(token)
        if len(written) == most:
            return written
        position += given.shape[1]
        given = torch.tensor([[token]], device=question.device)


def _feed(
    model: PreTrainedModel, cache: Cache, first: int, input_ids: Tensor, count: int
) -> Tensor:
    """Feed tokens `[1, N]` from a position on; return the last logits `[count, vocabulary]`."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + first
    lengths = {layer.get_seq_length() for layer in cache.layers}
    # transformers builds one mask for all layers: where their lengths differ, tokens go one by one.
    step = input_ids.shape[1] if len(lengths) == 1 else 1
    logits = []
    for i in range(0, input_ids.shape[1], step):
        output = model(
            input_ids=input_ids[:, i : i + step],
            past_key_values=cache,
            position_ids=positions[:, i : i + step],
            logits_to_keep=count if step > 1 else 1,
        )
        logits.append(output.logits[0])
    return torch.cat(logits)[-count:]


def footprint(model: PreTrainedModel, cache: Cache, recording: Recording) -> Footprint:
    """Count the pairs and bytes of a cache just after compression."""
    kept = num_bytes = 0
    for layer, cached in zip(decoder_layers(model), cache.layers, strict=True):
        if isinstance(cached, RaggedLayer):
            kept += int((cached.end - cached.begin).sum())
            num_bytes += cached.nbytes
            continue
        kept += cached.keys.shape[:3].numel()
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is not None:
            kept -= len({(int(b), int(h), int(t)) for b, h, t in zip(*masked, strict=True)})
        num_bytes += storage_bytes(cached.keys, cached.values)
    pairs = sum(tape.keys.shape[:3].numel() for tape in recording.layers)
    return Footprint(kept, pairs, num_bytes)

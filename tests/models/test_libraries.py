"""Weights as libraries store them: each that is installed is tried.

``pip install --no-deps torchao optimum-quanto bitsandbytes`` beside what `make test` has; all run
on CPUs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_sweep import try_press
from random_router import random_router
from tiny_models import tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekv import MoERouterPress
from moekv.models.fingerprint import TOLERANCE, distance, fingerprint
from moekv.models.hooks import CACHE_NAMES


def _model() -> PreTrainedModel:
    """A tiny model with biases, and norms that are not all ones."""
    model = tiny_model("qwen2")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def _replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    for module in list(model.model.layers.modules()):
        for name, inner in list(module.named_children()):
            if isinstance(inner, nn.Linear):
                setattr(module, name, make(inner))
    return model


def _torchao(model: Any, config: str) -> Any:
    ao = importlib.import_module("torchao.quantization")
    ao.quantize_(model, getattr(ao, config)())
    return model


def _quanto(model: Any, kind: str) -> Any:
    quanto = importlib.import_module("optimum.quanto")
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    return model


def _bitsandbytes(model: Any, bits: int) -> Any:
    layers: Any = importlib.import_module("bitsandbytes").nn

    def make(linear: nn.Linear) -> nn.Module:
        shape, bias = (linear.in_features, linear.out_features), linear.bias
        if bits == 8:
            layer = layers.Linear8bitLt(*shape, bias=bias is not None, has_fp16_weights=False)
            layer.weight = layers.Int8Params(linear.weight.data, False, has_fp16_weights=False)
        else:
            layer = layers.Linear4bit(
                *shape, bias=bias is not None, compute_dtype=torch.float32, quant_type="nf4"
            )
            layer.weight = layers.Params4bit(linear.weight.data, False, quant_type="nf4")
        layer.bias = bias
        return layer.to("cpu")

    return _replaced(model, make)


def _adapted(model: Any) -> Any:
    peft: Any = importlib.import_module("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"])
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return adapted.eval()


def _offloaded(model: Any, folder: Path, **where: Any) -> Any:
    model.save_pretrained(folder / "saved")
    return AutoModelForCausalLM.from_pretrained(
        folder / "saved", offload_folder=folder / "offloaded", **where
    )


ON_DISK = dict.fromkeys(
    ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
) | {"model.layers.1": "disk"}

STORED: dict[str, tuple[tuple[str, ...], Callable[[Any, Path], Any]]] = {
    "torchao, int8": (("torchao",), lambda m, _: _torchao(m, "Int8WeightOnlyConfig")),
    "torchao, float8": (("torchao",), lambda m, _: _torchao(m, "Float8WeightOnlyConfig")),
    "quanto, int8": (("optimum.quanto",), lambda m, _: _quanto(m, "qint8")),
    "quanto, int4": (("optimum.quanto",), lambda m, _: _quanto(m, "qint4")),
    "bitsandbytes, 8 bits": (("bitsandbytes",), lambda m, _: _bitsandbytes(m, 8)),
    "bitsandbytes, 4 bits": (("bitsandbytes",), lambda m, _: _bitsandbytes(m, 4)),
    "LoRA": (("peft",), lambda m, _: _adapted(m)),
    "LoRA on quanto": (("peft", "optimum.quanto"), lambda m, _: _adapted(_quanto(m, "qint8"))),
    "dynamically quantised": (
        (),
        lambda m, _: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8),
    ),
    "a device map": (("accelerate",), lambda m, path: _offloaded(m, path, device_map="auto")),
    "a device map with a disk": (
        ("accelerate",),
        lambda m, path: _offloaded(m, path, device_map=ON_DISK),
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_weights_as_libraries_store_them(name: str, tmp_path: Path) -> None:
    """Their router is found, and a press does what it does to the plain model."""
    packages, make = STORED[name]
    for package in packages:
        pytest.importorskip(package)
    plain = _model()
    wanted, router = fingerprint(plain), random_router(plain)
    model = make(plain, tmp_path)
    assert distance(wanted, fingerprint(model)) < TOLERANCE
    press = MoERouterPress(0.5, router=router, window=8)
    with torch.no_grad(), press(model):
        model.generate(input_ids=tokens(1, 60), max_new_tokens=4, do_sample=False)
    # A layer that has run may store its weight in another way.
    assert distance(wanted, fingerprint(model)) < TOLERANCE
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert try_press(inner) == "works: 2 of 2 layers"


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_learned_prompts(kind: str) -> None:
    """Virtual tokens are compressed with the others, or the first forward is refused."""
    peft: Any = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model, ids = peft.get_peft_model(_model(), config).eval(), tokens(1, 60)
    how: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    press = MoERouterPress(0.5)
    prepare = peft.PeftModelForCausalLM.prepare_inputs_for_generation
    if CACHE_NAMES[0] not in prepare.__code__.co_consts:
        with pytest.raises(RuntimeError, match="feeds its virtual tokens again"), press(model):
            model.generate(**how)
        assert not press.get_stats()["forward_count"]
        return
    plain = model.generate(**how)
    with MoERouterPress(0.0)(model):
        assert torch.equal(model.generate(**how), plain)
    with press(model):
        model.generate(**how)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    pair = cache.layers[0].keys[0, 0, 0].nbytes * 2
    assert press.get_stats()["compression"]["bytes_before"] == 2 * 2 * 65 * pair

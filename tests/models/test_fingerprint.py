"""Fingerprints: near for the same weights however they are stored, far for others."""

from __future__ import annotations

import copy
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import moekv.calibration.router as router_module
import moekv.models.fingerprint as fingerprints
from moekv import MoERouterPress
from moekv.models.fingerprint import TOLERANCE, distance, fingerprint, short
from moekv.models.hooks import find_layers
from moekv.models.weights import read_weight
from tests.helpers.random_router import random_router
from tests.helpers.tiny_models import prefill, tiny_model, tokens


def trained(name: str = "llama") -> PreTrainedModel:
    """A tiny model whose norms are not all ones."""
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def to_four_bits(weight: Tensor) -> Tensor:
    blocks = weight.reshape(-1, 32)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-12)  # a padding token's row is all zeros
    return (((blocks - low) / step).round() * step + low).view_as(weight)


class FourBits(nn.Module):
    """A layer of some library that keeps its weight in four bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed, self.bias = linear.weight.data, linear.bias

    def dequantize(self) -> Tensor:
        return to_four_bits(self.packed)


def far(one: Any, other: Any) -> float:
    return distance(fingerprint(one), fingerprint(other))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3"])
def test_round_trips_are_near(name: str) -> None:
    model = trained(name)
    assert fingerprint(model) == fingerprint(trained(name))
    for dtype in (torch.bfloat16, torch.float16):
        assert far(model, copy.deepcopy(model).to(dtype)) < 0.1
    quantized = copy.deepcopy(model)
    for parameter in quantized.parameters():
        if parameter.dim() == 2:
            parameter.data = to_four_bits(parameter.data)
    assert 0.1 < far(model, quantized) <= TOLERANCE
    packed = copy.deepcopy(model)
    for layer in packed.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for child, linear in list(module.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(module, child, FourBits(linear))
    assert 0.1 < far(model, packed) <= TOLERANCE


def test_other_models_are_far() -> None:
    model = trained()
    assert far(model, tiny_model("qwen2")) == float("inf")
    other = trained()
    for parameter in other.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.roll(1, 0)
    assert far(model, other) > 4 * TOLERANCE  # by their matrices alone; norms tell far more
    shuffled = trained()  # another tokenizer
    shuffled.model.embed_tokens.weight.data = shuffled.model.embed_tokens.weight.data.roll(1, 0)
    assert far(model, shuffled) > 2 * TOLERANCE
    tuned = trained()  # a step of the size that a fine-tune makes, on norms alone
    for parameter in tuned.parameters():
        if parameter.dim() == 1:
            parameter.data += 1e-3 * parameter.data.sign()
            parameter.data[::2] -= 2e-3
    assert far(model, tuned) > 5 * TOLERANCE
    config = type(model.config)(**model.config.to_dict() | {"vocab_size": 9000})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        large = LlamaForCausalLM(config)  # strongly tuned, but for its norms
    strong, packed = copy.deepcopy(large), copy.deepcopy(large)
    strong.model.embed_tokens.weight.data += 0.05 * torch.randn(64)
    packed.model.embed_tokens.weight.data = to_four_bits(packed.model.embed_tokens.weight.data)
    assert far(large, packed) < TOLERANCE < far(large, strong) / 5


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "deepseek_v3"])
def test_models_of_other_makes(name: str) -> None:
    """Whose blocks, sizes and weights are called otherwise."""
    model, other = trained(name), trained(name)
    assert far(model, copy.deepcopy(model).to(torch.bfloat16)) < 0.1
    for parameter in other.parameters():
        if parameter.dim() == 1:
            parameter.data += 1e-3 * parameter.data.sign()
            parameter.data[::2] -= 2e-3
    assert far(model, other) > TOLERANCE


def test_weights_that_are_no_numbers_are_near_to_none() -> None:
    model = trained()
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    assert far(model, model) == far(model, trained()) == float("inf")


def test_what_must_be_equal() -> None:
    model = tiny_model()
    for change in (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rms_norm_eps": 1e-5},
    ):
        other = LlamaForCausalLM(type(model.config)(**model.config.to_dict() | change))
        other.load_state_dict(model.state_dict())
        assert far(model, other) == float("inf")
    same = {"rms_norm_eps": 1.0000000001e-6, "pad_token_id": 5, "use_cache": False}
    other = LlamaForCausalLM(type(model.config)(**model.config.to_dict() | same))
    other.load_state_dict(model.state_dict())
    assert far(model, other) == 0 == far(model, model.model)


def test_texts_of_a_model_are_no_paths() -> None:
    model = tiny_model()
    model.config.model_type = "../../../tmp/x\n"
    assert fingerprint(model).startswith("_________tmp_x_-")
    assert len(short(fingerprint(model))) < 64
    for text in (
        "",
        "llama",
        "a-b-c",
        "../..-0123456789abcdef-AAAA",
        fingerprint(model)[:-4],
        None,
    ):
        assert distance(text, fingerprint(model)) == float("inf")  # type: ignore[arg-type]


def test_nothing_is_remembered_and_no_number_is_drawn() -> None:
    model = trained()
    before, state = fingerprint(model), torch.random.get_rng_state()
    for layer in model.model.layers:
        layer.input_layernorm.weight.data += 0.01  # counts no version
    assert distance(before, fingerprint(model)) > 5 * TOLERANCE
    assert torch.equal(torch.random.get_rng_state(), state)


def test_offloaded_to_memory_and_disk(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    wanted = fingerprint(trained())
    model = trained()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert fingerprint(model) == wanted
    model = trained()
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert fingerprint(model) == wanted


def test_dynamically_quantised_layers() -> None:
    model = trained("qwen2")  # whose projections have biases
    wanted = fingerprint(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantized.model.layers[0].self_attn.q_proj.weight, Tensor)
    assert 0 < distance(wanted, fingerprint(quantized)) < TOLERANCE


class EightBits(nn.Module):
    """A layer like those of bitsandbytes, which keeps rows and scales in its state once it ran."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scales = linear.weight.data.abs().amax(1)
        rows = (linear.weight.data / scales[:, None] * 127).round().char()
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.state = types.SimpleNamespace(CB=rows, SCB=scales)
        self.bias = linear.bias


def test_layers_that_keep_their_numbers_in_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    model = trained("qwen2")  # whose projections have biases
    wanted = fingerprint(model)
    for module in list(model.model.layers.modules()):
        for name, inner in list(module.named_children()):
            if isinstance(inner, nn.Linear):
                setattr(module, name, EightBits(inner))
    layer = model.model.layers[0].self_attn.q_proj
    assert read_weight(layer, "bias") is not None and read_weight(layer, "bias").dim() == 1
    assert 0 < distance(wanted, fingerprint(model)) < TOLERANCE / 10


def test_adapters_are_a_part_of_the_weights() -> None:
    peft = pytest.importorskip("peft")
    wanted = fingerprint(trained())
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(trained(), config)
    assert fingerprint(model) == wanted  # B begins with zeros
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert distance(fingerprint(model), wanted) > TOLERANCE
    with model.disable_adapter():
        assert fingerprint(model) == wanted
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    read = read_weight(layer)
    merged = model.merge_and_unload()
    torch.testing.assert_close(read, merged.model.layers[0].self_attn.q_proj.weight)


def test_presses_on_wrapped_models() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_model(), config).eval()
    ids, router = tokens(1, 40), random_router(tiny_model())
    outputs = []
    for target in (model, model.base_model.model):
        press = MoERouterPress(0.5, router=router)
        with press(target):
            outputs.append(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False))
        assert press.get_stats()["compression"]["ratio"] == 0.5
    assert torch.equal(*outputs)


# --- Routers --------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that comes with the package."""
    random_router(trained()).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(router_module, "SHIPPED", tmp_path)


def name_of_router(model: PreTrainedModel, press: MoERouterPress | None = None) -> str:
    press = press or MoERouterPress(0.5)
    with press(model):
        prefill(model, tokens(1, 40))
    return str(press.get_stats()["router"])


def test_the_router_that_fits_is_found(shipped: None, caplog: pytest.LogCaptureFixture) -> None:
    model = trained()
    assert name_of_router(model) == "calibrated for a tiny model"
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = to_four_bits(parameter.data)
    assert "tiny model, whose weights are at a distance of 0." in name_of_router(model)
    assert name_of_router(tiny_model("qwen2")) == "none, not calibrated"
    assert not caplog.records
    # A fine-tune of the same object, in the same process.
    with torch.no_grad():
        model.model.norm.weight += 0.1
        for layer in model.model.layers:
            layer.input_layernorm.weight += 0.01 * torch.randn(64)
    with caplog.at_level(logging.WARNING, "moekv"):
        assert name_of_router(model) == "none, not calibrated"
    assert "is left out" in caplog.text and "other weights" in caplog.text
    with pytest.raises(
        ValueError, match="the model that the router was calibrated for.*other weig"
    ):
        name_of_router(model, MoERouterPress(0.5, router=random_router(trained())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sketch_that_is_remembered_is_that_of_the_weights(dtype: torch.dtype) -> None:
    """Whatever writes to one of the weights that it reads: as if nothing were remembered."""
    model = trained().to(dtype)
    decoder, attention = find_layers(model)
    read = [getattr(x.leaf, x.name) for x in fingerprints._weights(decoder, attention)]
    assert fingerprint(model) == fingerprint(model)

    def add_noise(weight: Tensor) -> None:
        weight.data += 0.1 * torch.randn_like(weight)  # counts no version

    def change_one(weight: Tensor) -> None:
        weight.view(-1)[len(weight.view(-1)) // 3] += 2

    for weight in read:
        for write in (add_noise, change_one):
            before = fingerprint(model)
            with torch.no_grad():
                write(weight)
            after = fingerprint(model)
            fingerprints._remembered.clear()
            assert fingerprint(model) == after
            assert before != after or write is change_one  # of rows that it leaves out


def test_a_weight_that_is_replaced_is_read_again() -> None:
    model = trained()
    before = fingerprint(model)
    layer = model.model.layers[0].self_attn.q_proj
    old = layer.weight
    layer.weight = torch.nn.Parameter(old.detach().roll(1, 0))
    assert fingerprint(model) != before
    layer.weight = old
    assert fingerprint(model) == before

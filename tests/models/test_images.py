"""Prompts with an image in them, as families take it in: what the sweep holds for text alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_model import IMAGE_MODELS, TEXT_MODELS, build
from model_sweep import LENGTH, try_press
from torch import Tensor

from moekv import MoERouterPress

TOKEN = 120


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _qwen(model: Any) -> tuple[int, dict[str, Any]]:
    """Eight patches by eight, two by two a token, whose places are M-RoPE's."""
    is_image = torch.zeros(1, LENGTH, dtype=torch.int)
    is_image[:, 20:36] = 1
    return 16, {
        "pixel_values": _noise(64, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": is_image,
    }


def _tiles(model: Any) -> tuple[int, dict[str, Any]]:
    side = 56 // 14 // model.config.scale_factor
    return side**2, {"pixel_values": _noise(1, 1, 3, 56, 56)}


def _crossed(model: Any) -> tuple[int, dict[str, Any]]:
    """Pairs of a cross attention, which are in the cache and not of the text."""
    return 0, {"cross_attention_states": _noise(1, 9, 64)}


FAMILIES: dict[str, tuple[Callable[[Any], tuple[int, dict[str, Any]]], str]] = {
    "qwen2_vl": (_qwen, "4 of 4"),
    "qwen2_5_vl": (_qwen, "4 of 4"),
    "qwen3_vl": (_qwen, "4 of 4"),
    "qwen3_vl_moe": (_qwen, "4 of 4"),
    "smolvlm": (_tiles, "4 of 4"),
    "idefics3": (_tiles, "4 of 4"),
    "mllama": (_crossed, "3 of 4"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_in_the_prompt(name: str) -> None:
    """At .5 decoding is that over the full cache with pairs masked; at 0 nothing changes."""
    if name not in (*TEXT_MODELS, *IMAGE_MODELS):
        pytest.skip(f"this transformers has no {name}")
    see, layers = FAMILIES[name]
    model = build(name)
    model.config.image_token_id = TOKEN
    count, inputs = see(model)
    assert try_press(model, (TOKEN,) * count, **inputs) == f"works: {layers} layers"


def test_the_text_model_that_generate_calls_for_an_image() -> None:
    """Kosmos-2's own forward wants the image at each step, so steps are its text model's."""
    model = build("kosmos-2")
    is_image = torch.zeros(1, LENGTH, dtype=torch.bool)
    is_image[:, 20:36] = True
    inputs = {"image_embeds": _noise(1, 16, 64), "image_embeds_position_mask": is_image}
    assert try_press(model.text_model, (TOKEN,) * 16, **inputs) == "works: 4 of 4 layers"
    count, size = model.config.latent_query_num, model.config.vision_config.image_size
    mask = torch.zeros(1, count + 30, dtype=torch.bool)
    mask[:, 1 : 1 + count] = True
    given = {
        "input_ids": torch.arange(3, 3 + mask.shape[1])[None] % 90 + 3,
        "attention_mask": torch.ones_like(mask, dtype=torch.long),
        "pixel_values": _noise(1, 3, size, size),
        "image_embeds_position_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
    }
    expected = model.generate(**given)
    for ratio in (0.0, 0.5):
        press = MoERouterPress(ratio)
        with press(model):
            got = model.generate(**given)
        assert torch.equal(got[:, : count + 31], expected[:, : count + 31])  # and all, at 0
        assert ratio or torch.equal(got, expected)
        assert press.get_stats()["compression"]["ratio"] == pytest.approx(ratio, abs=0.01)

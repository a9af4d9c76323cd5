"""The options of a press: defaults, copies, and the experts they name."""

import dataclasses
from typing import Any

import pytest
import torch
from peers import HAS_KVPRESS, peer
from press_probes import ALL, LENGTH, Fixed, compress, make_press
from tiny_models import tiny_model, tokens

from moekv import MoERouterPress


def test_defaults_are_those_of_the_readme() -> None:
    press = MoERouterPress(num_experts=4, top_k=2, router_type="pikv", cache_aware=True)
    if HAS_KVPRESS:
        assert isinstance(press, peer("ScorerPress"))
    assert (press.compression_ratio, press.policy, press.budget) == (0.5, "mixture", "auto")
    compress(press, tiny_model(), tokens(1, 9))
    names = press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"]
    assert list(names) == ["expected", "aggressive", "moderate", "conservative", "selective"]


@pytest.mark.parametrize(
    ("model", "top_k", "number"),
    [("llama", 1, 2), ("llama", 4, 4), ("llama_mha", 2, 3), ("gemma3", 2, 2)],
)
def test_automatic_number_of_experts(model: str, top_k: int, number: int) -> None:
    # 2 layers of 2, 2 layers of 4 and 3 layers of 2 KV heads.
    press = make_press(num_experts="auto", top_k=top_k)
    compress(press, tiny_model(model), tokens(1, 20))
    layer = max(press.get_stats()["layer_stats"].items())[1]
    assert list(layer["router_stats"]["expert_usage_count"]) == ["expected", *ALL[:number]]


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"experts": ["semantic", "selective"]}])
def test_replace_makes_a_press_of_the_same_options(options: dict[str, Any]) -> None:
    press = MoERouterPress(0.5, **options)
    other = dataclasses.replace(press, compression_ratio=0.25)
    assert other == MoERouterPress(0.25, **options)
    model, input_ids = tiny_model(), tokens(1, LENGTH)
    compress(other, model, input_ids)
    alike = MoERouterPress(0.25, **options)
    compress(alike, model, input_ids)
    assert str(other.get_stats()) == str(alike.get_stats())  # some are NaN


def test_experts_of_every_kind_at_once() -> None:
    model = tiny_model()
    press = make_press(
        experts=[
            "selective",
            peer("KnormPress")(),
            peer("ExpectedAttentionPress")(n_sink=0),
            Fixed("mine", torch.arange(LENGTH)[:, None].expand(-1, 1).T.float()),
        ],
        router_type="eplb",
        top_k=1,
    )
    compress(press, model, tokens(1, LENGTH))
    count = press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"]
    assert count == dict.fromkeys(
        ["selective", "KnormPress", "ExpectedAttentionPress", "mine"], LENGTH // 4
    )


def test_a_press_shows_what_differs_from_the_defaults() -> None:
    assert repr(MoERouterPress()) == "MoERouterPress()"
    press = MoERouterPress(0.75, experts=["semantic"], streaming=True)
    shown = "MoERouterPress(compression_ratio=0.75, experts=['semantic'], streaming=True)"
    assert repr(press) == shown and eval(shown) == press

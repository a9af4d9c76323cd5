"""Options that a press refuses, when it is made or when they are set."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import LENGTH, num_hooks, refuse, refuse_block
from tiny_models import prefill, tiny_model, tokens
from transformers import DynamicCache

from moekv import DecodingConfig, MoERouterPress, PiKVMoERouter, TopKBalancedRouter
from moekv.ops import available_backends, backends


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_compression_ratio_out_of_range(ratio: float) -> None:
    message = r"compression_ratio in \[0, 1\).*got"
    with pytest.raises(ValueError, match=message):
        MoERouterPress(ratio)
    model, press = tiny_model(), MoERouterPress()
    press.compression_ratio = ratio
    refuse(ValueError, message, model, press)
    with press(model):
        press.compression_ratio = ratio
        with pytest.raises(ValueError, match=message):
            prefill(model, tokens(1, LENGTH))


@pytest.mark.parametrize("ratio", ["a", None, [0.5]], ids=str)
def test_ratio_that_is_no_number(ratio: Any) -> None:
    with pytest.raises(TypeError, match="expected compression_ratio a number, got"):
        MoERouterPress(ratio)


@pytest.mark.parametrize("options", [{"num_experts": 2}, {"experts": ["semantic"]}, {"top_k": 99}])
def test_more_experts_per_token_than_experts(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected top_k <= num_experts"):
        MoERouterPress(**{"top_k": 3} | options)
    with pytest.raises(ValueError, match="expected top_k an integer >= 1, got 0"):
        MoERouterPress(top_k=0)


@pytest.mark.parametrize("number", [0, -1, 2.5, True, 10_000, "many"])
def test_number_of_experts(number: Any) -> None:
    with pytest.raises(ValueError, match="expected num_experts"):
        MoERouterPress(num_experts=number, top_k=1)


@pytest.mark.parametrize(
    ("make", "option", "value", "choices"),
    [
        (MoERouterPress, "router_type", "best", "hierarchical"),
        (MoERouterPress, "policy", "best", "mixture, dominant"),
        (MoERouterPress, "budget", "best", "auto, uniform, layer, head, model"),
        (MoERouterPress, "experts", ["selective", "best"], "temporal"),
        (functools.partial(TopKBalancedRouter, 64, 4), "balance_mode", "best", "entropy"),
    ],
)
def test_unknown_choices(make: Callable[..., Any], option: str, value: Any, choices: str) -> None:
    with pytest.raises(ValueError, match=f"{choices}.*, got 'best'"):
        make(**{option: value})


@pytest.mark.parametrize("option", ["ratio", "balance_mode"])
def test_option_that_there_is_not(option: str) -> None:
    press = MoERouterPress()
    with pytest.raises(AttributeError, match=f"an option among compression_ratio, .*'{option}'"):
        setattr(press, option, 1)
    assert not hasattr(press, option)
    with pytest.raises(TypeError, match=option):
        MoERouterPress(**{option: 1})


def test_ragged_budgets_and_the_dominant_policy() -> None:
    with pytest.raises(ValueError, match="'uniform' with policy 'dominant'.*got 'model'"):
        MoERouterPress(policy="dominant", budget="model")


def test_what_excludes_streaming() -> None:
    with pytest.raises(ValueError, match="policy 'mixture' with streaming, got 'dominant'"):
        MoERouterPress(policy="dominant", streaming=True)
    press = MoERouterPress(budget="model", streaming=True)
    with pytest.raises(ValueError, match="budget other than 'layer' with streaming"):
        MoERouterPress(budget="layer", streaming=True)
    message = "expected streaming or context_length, got both"
    refuse_block(ValueError, message, tiny_model(), press, context_length=100)


@pytest.mark.parametrize("name", ["doge", "llama"])
def test_dense_layers_whose_masks_cannot_be_fitted(name: str) -> None:
    model = tiny_model(name, attention="flex_attention" if name == "llama" else "sdpa")
    message = "get their attention function by name.*for budget 'layer'.*use budget='uniform'"
    refuse_block(ValueError, message, model, MoERouterPress(budget="layer"))


@pytest.mark.parametrize("number", [0, -1, 2.5, True, None])
def test_decoding_options(number: Any) -> None:
    for name in ("target", "interval"):
        with pytest.raises(ValueError, match=f"expected {name} an integer >= 1, got {number}"):
            DecodingConfig(**{name: number})
    with pytest.raises(TypeError, match="decoding a moekv.DecodingConfig, got 2048"):
        MoERouterPress(decoding=2048)
    if number is not None:
        message = f"expected context_length an integer >= 1, got {number}"
        refuse_block(ValueError, message, tiny_model(), MoERouterPress(), context_length=number)


@pytest.mark.parametrize(
    ("options", "block"),
    [({"decoding": DecodingConfig()}, {}), ({}, {"context_length": LENGTH})],
)
def test_compression_that_goes_on_and_the_dominant_policy(
    options: dict[str, Any], block: dict[str, Any]
) -> None:
    message = "'mixture' where compression goes on.*got 'dominant'"
    with (
        pytest.raises(ValueError, match=message),
        MoERouterPress(policy="dominant", **options)(tiny_model(), **block),
    ):
        pytest.fail("the block began")


@pytest.mark.parametrize("name", ["cache_aware", "streaming"])
def test_flags_that_are_none(name: str) -> None:
    with pytest.raises(TypeError, match=f"expected {name} True or False, got 'no'"):
        MoERouterPress(**{name: "no"})


def test_press_of_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="auto, cpu, cuda, torch, got 'tpu'"):
        MoERouterPress(backend="tpu")


def test_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = available_backends() | {"cuda": "no device; plug one in"}
    monkeypatch.setattr(backends, "available_backends", lambda: reasons)
    with pytest.raises(RuntimeError, match="'cuda' is not available: no device; plug one in"):
        MoERouterPress(backend="cuda")


@pytest.mark.parametrize("value", [-1, 1.5, None])
@pytest.mark.parametrize(
    ("make", "option"),
    [
        (MoERouterPress, "sinks"),
        (MoERouterPress, "recent"),
        (MoERouterPress, "window"),
        (functools.partial(PiKVMoERouter, 64, 4), "cache_update_interval"),
    ],
)
def test_counts(make: Callable[..., Any], option: str, value: Any) -> None:
    message = f"expected {option} (an integer )?>= [01], got {value}"
    with pytest.raises(ValueError, match=message):
        make(**{option: value})


@pytest.mark.parametrize("option", ["sinks", "recent", "window"])
def test_counts_beyond_64_bits(option: str) -> None:
    with pytest.raises(ValueError, match=f"expected {option} an integer of 64 bits, got 9223"):
        MoERouterPress(**{option: 2**63})
    with MoERouterPress(**{option: 2**63 - 1})(model := tiny_model()):
        prefill(model, tokens(1, LENGTH))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "as many experts as there are, 4, got one of 3"),
        ({"num_experts": "auto"}, "as many as the model asks for, got one of 3"),
        ({"experts": ["semantic", "temporal", "selective"], "top_k": 2}, "top_k = 1.* got 2"),
        (
            {"num_experts": 3, "cache_aware": True},
            "cache_aware=True with a router that has a history, .* got TopKBalancedRouter",
        ),
    ],
    ids=str,
)
def test_router_that_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoERouterPress(router_type=TopKBalancedRouter(64, 3, 1), **options)
    model, press = tiny_model(), MoERouterPress(router_type=TopKBalancedRouter(32, 4))
    with pytest.raises(ValueError, match=r"\[batch, tokens, 32\], got \[1, 40, 64\]"), press(model):
        prefill(model, tokens(1, LENGTH))
    assert not num_hooks(model)


@pytest.mark.parametrize(
    "change",
    [
        {"experts": ["semantic", "temporal"]},
        {"router_type": "eplb"},
        {"top_k": 1},
        {"router": None},
    ],
    ids=str,
)
def test_experts_that_change_after_a_rating(change: dict[str, Any]) -> None:
    model, press, cache = tiny_model(), MoERouterPress(), DynamicCache()
    ((option, value),) = change.items()
    before, message = getattr(press, option), r"got others: call reset_stats\(\) first"
    with press(model):
        prefill(model, tokens(1, LENGTH))
        setattr(press, option, value)
        with pytest.raises(RuntimeError, match=message), torch.no_grad():
            model(tokens(1, LENGTH), past_key_values=cache)
        assert not cache.layers  # nothing has run
    refuse_block(RuntimeError, message, model, press)
    assert press.get_stats()["forward_count"] == 1
    setattr(press, option, before)
    with press(model):
        prefill(model, tokens(1, LENGTH))
    setattr(press, option, value)
    press.reset_stats()
    with press(model):
        prefill(model, tokens(1, LENGTH))
    assert press.get_stats()["forward_count"] == 1

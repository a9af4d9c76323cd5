"""What a press refuses as a part of one of kvpress's wrappers."""

from collections.abc import Callable
from typing import Any

import pytest
from kvpress import BlockPress, ComposedPress, DecodingPress, KnormPress
from refusals import LENGTH, assert_untouched, num_hooks, padded
from tiny_models import prefill, tiny_model, tokens
from transformers import DynamicCache

from moekv import DecodingConfig, MoERouterPress


def composed(press: MoERouterPress) -> ComposedPress:
    return ComposedPress([press])


def decoding(press: MoERouterPress) -> DecodingPress:
    return DecodingPress(press, compression_interval=4, target_size=12)


@pytest.mark.parametrize("budget", ["head", "model"])
def test_ragged_budgets_in_a_wrapper(budget: str) -> None:
    model, press = tiny_model(), composed(MoERouterPress(budget=budget))
    message = "inside a kvpress wrapper, whose layers are dense"
    with pytest.raises(ValueError, match=message), press(model):
        prefill(model, tokens(1, LENGTH))


@pytest.mark.parametrize("wrap", [composed, decoding])
def test_compression_that_goes_on_in_a_wrapper(wrap: Callable[[MoERouterPress], Any]) -> None:
    model, press = tiny_model(), MoERouterPress(decoding=DecodingConfig())
    message = "expected no decoding inside a kvpress wrapper"
    with pytest.raises(ValueError, match=message), wrap(press)(model):
        model.generate(tokens(1, LENGTH), max_new_tokens=8, do_sample=False)
    assert not num_hooks(model)


def test_left_padding_in_a_wrapper() -> None:
    model, press = tiny_model(), composed(MoERouterPress())
    message = r"inside a kvpress wrapper, got \[0, 7\] padding"
    with pytest.raises(ValueError, match=message), press(model):
        model(tokens(2, LENGTH), attention_mask=padded(), past_key_values=DynamicCache())


def test_cache_already_cut() -> None:
    model, press = tiny_model(), MoERouterPress()
    both = ComposedPress([KnormPress(0.5), press])
    with pytest.raises(ValueError, match="put MoERouterPress first"), both(model):
        prefill(model, tokens(1, LENGTH))
    assert_untouched(model, press)


def test_reordered_hidden_states() -> None:
    model, press = tiny_model(), MoERouterPress()
    with pytest.raises(ValueError, match="in order"), BlockPress(press, block_size=10)(model):
        prefill(model, tokens(1, LENGTH))
    assert_untouched(model, press)

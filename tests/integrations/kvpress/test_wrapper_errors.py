"""What a press refuses as a part of one of kvpress's wrappers."""

from typing import Any

import pytest
import torch
from kvpress import (
    BlockPress,
    ComposedPress,
    DMSPress,
    KnormPress,
    KVPressTextGenerationPipeline,
)
from refusals import LENGTH, assert_untouched, num_hooks, padded
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor, nn
from transformers import DynamicCache
from word_tokenizer import word_tokenizer
from wrapping import WRAPPERS

from moekv import DecodingConfig, Expert, LayerView, MoERouterPress
from moekv.ops import ScoreKind


def run(model: nn.Module, name: str, press: MoERouterPress, mask: Tensor | None = None) -> None:
    """Let a press act inside a wrapper: in a prefill, and in four steps after it."""
    batch, cache = (1 if mask is None else len(mask)), DynamicCache()
    with torch.no_grad(), WRAPPERS[name](press)(model):
        model(tokens(batch, LENGTH), attention_mask=mask, past_key_values=cache)
        for _ in range(4):
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
            model(tokens(batch, 1), attention_mask=mask, past_key_values=cache)


def refuse(name: str, press: MoERouterPress, message: str, mask: Tensor | None = None) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        run(model, name, press, mask)
    assert not num_hooks(model)
    stats = press.get_stats()
    assert stats["forward_count"] == 0 and stats["compression"]["bytes_before"] == 0


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("budget", ["uniform", "head", "model"])
def test_budgets_in_a_wrapper(name: str, budget: str) -> None:
    message = rf"expected budget='auto' inside {name}, .*, got '{budget}'"
    refuse(name, MoERouterPress(budget=budget), message)


@pytest.mark.parametrize("name", WRAPPERS)
def test_compression_that_goes_on_in_a_wrapper(name: str) -> None:
    decoding = DecodingConfig()
    message = rf"expected decoding=None inside {name}, .*, got DecodingConfig"
    refuse(name, MoERouterPress(decoding=decoding), message)
    with pytest.raises(TypeError, match="context_length"):
        WRAPPERS[name](MoERouterPress())(tiny_model(), context_length=LENGTH)
    with pytest.raises(ValueError, match="context_length where a block begins"):
        MoERouterPress(context_length=LENGTH)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", WRAPPERS)
def test_quantised_pairs_in_a_wrapper(name: str) -> None:
    refuse(name, MoERouterPress(pairs="k8v4"), f"expected pairs='16' inside {name}, .*'k8v4'")


@pytest.mark.parametrize("name", WRAPPERS)
def test_folding_in_a_wrapper(name: str) -> None:
    press = MoERouterPress(pairs="auto", fold=True)
    refuse(name, press, f"expected fold='auto' inside {name}, .* without biases, got True")


@pytest.mark.parametrize("name", WRAPPERS)
def test_streaming_in_a_wrapper(name: str) -> None:
    refuse(name, MoERouterPress(streaming=True), f"expected streaming=False inside {name}, .*True")


class Reader(Expert):
    """Reads which experts the model chose."""

    name, kinds, reads_choice = "reader", (ScoreKind.MASS,), True

    def scores(self, view: LayerView) -> Tensor:
        return view.scores_of(ScoreKind.MASS)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_models_own_experts_in_a_wrapper(name: str) -> None:
    refuse(name, MoERouterPress(experts=[Reader()]), "no expert or router that reads which experts")


def test_recent_pairs_and_a_sliding_window_of_the_wrapper() -> None:
    message = "expected recent=16 inside DMSPress, .*, got 8"
    refuse("DMSPress", MoERouterPress(recent=8), message)


@pytest.mark.parametrize("name", WRAPPERS)
def test_left_padding_in_a_wrapper(name: str) -> None:
    message = rf"without padding inside {name}, got \[0, \d+\] padding"
    refuse(name, MoERouterPress(), message, padded())


class Offloaded(DynamicCache):
    """Says that it is, once a layer has its pairs."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.offloading = False
        pairs = super().update(*args, **kwargs)
        self.offloading = True
        return pairs


def test_an_offloaded_cache_in_a_wrapper() -> None:
    model, press = tiny_model(), MoERouterPress(0.5)
    message = "got an offloaded Offloaded, whose layers come and go, for kvpress's wrappers"
    with pytest.raises(TypeError, match=message), ComposedPress([press])(model):
        model(tokens(1, LENGTH), past_key_values=Offloaded())
    assert not num_hooks(model)


@pytest.mark.parametrize(
    "options", [{"budget": "auto"}, {"decoding": None}, {"recent": 16}, {"pairs": "auto"}]
)
def test_what_is_the_default_anyway_is_served(options: dict[str, Any]) -> None:
    model, press = tiny_model(), MoERouterPress(**options)
    with DMSPress(press, threshold=0.0)(model):
        prefill(model, tokens(1, LENGTH))
    assert press.get_stats()["forward_count"] == 1


def test_several_questions_and_decoding() -> None:
    press = MoERouterPress(decoding=DecodingConfig(target=20, interval=4))
    pipe = KVPressTextGenerationPipeline(model=tiny_model(), tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match="multiple questions"):
        pipe("w5 w6 w7", questions=["w8", "w9"], press=press)


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

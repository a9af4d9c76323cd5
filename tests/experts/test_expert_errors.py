"""Experts that are none, that raise, or whose scores are of no use."""

from typing import Any

import pytest
import torch
from growth_cases import decode
from peers import peer
from refusals import (
    LENGTH,
    Failing,
    Given,
    assert_holds,
    assert_untouched,
    lengths,
    refuse_block,
)
from tiny_models import prefill, tiny_model, tokens
from transformers import DynamicCache

from moekv import DecodingConfig, Expert, LayerView, MoERouterPress, register_expert
from moekv.ops import ScoreKind

NAN, INF = float("nan"), float("inf")


class Scorer:
    """Looks like a press of kvpress."""

    def score(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("experts", "error"),
    [
        ([object(), "selective"], TypeError),
        ("selective", TypeError),
        ([], ValueError),
        (["selective", "selective"], ValueError),
        ([Scorer(), Scorer()], ValueError),
    ],
)
def test_experts_that_are_none(experts: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        MoERouterPress(experts=experts)


def test_expert_name_that_is_taken() -> None:
    with pytest.raises(ValueError, match="got 'selective', which is registered"):
        register_expert("selective", Failing)


def test_nan_and_infinite_scores_of_an_expert() -> None:
    scores = torch.arange(float(LENGTH))
    scores[20:30], scores[5], scores[35] = NAN, INF, -INF
    model, expert = tiny_model(), Given(scores)
    press = MoERouterPress(0.5, experts=[expert], top_k=1, sinks=0, recent=0)
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
    # +inf at 5, and the highest 19 of the numbers; neither -inf at 35 nor a NaN.
    kept = [5, *range(10, 20), *range(30, 35), *range(36, 40)]
    assert_holds(cache, prefill(model, tokens(1, LENGTH)), kept)


@pytest.mark.parametrize(
    "scores",
    [
        torch.arange(40.0).double() * 1e40,
        torch.arange(40.0).double() * 8e306 - 1.6e308,
        torch.arange(40.0).double() + 2e8,
        torch.arange(40.0).double() * 1e-9 + 1,
        torch.arange(40.0).double() * 1e-50,
    ],
    ids=["large", "largest", "far", "near", "small"],
)
def test_scores_of_float64_keep_their_order(scores: torch.Tensor) -> None:
    model, given = tiny_model(), Given(scores)
    press = MoERouterPress(0.5, experts=[given], top_k=1, budget="uniform", sinks=0, recent=0)
    full = prefill(model, tokens(1, LENGTH))
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert torch.equal(layer.keys, whole.keys[:, :, LENGTH // 2 :])


@pytest.mark.parametrize("extreme", [1e4, 1e9, 1e12, 1e20, torch.finfo(torch.float32).max, INF])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("budget", ["uniform", "head"])
def test_extreme_scores_leave_the_order_of_others(extreme: float, sign: int, budget: str) -> None:
    """As what stands for "never" or "always" in an expert's scores."""
    scores = torch.rand(LENGTH, generator=torch.Generator().manual_seed(1))
    scores[[2, 9, 30]] = sign * extreme
    model, given = tiny_model(), Given(scores)
    press = MoERouterPress(0.5, experts=[given], top_k=1, budget=budget, sinks=0, recent=0)
    full = prefill(model, tokens(1, LENGTH))
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
    best = scores.topk(LENGTH // 2).indices.sort().values
    keys, _ = cache.layers[0].held_pairs()
    assert torch.equal(keys, full.layers[0].keys[:, :, best])


def test_all_scores_may_be_large() -> None:
    model = tiny_model()
    given = Given(torch.arange(float(LENGTH)) * 1e36)
    press = MoERouterPress(0.5, experts=[given], top_k=1, budget="uniform", sinks=0, recent=0)
    full = prefill(model, tokens(1, LENGTH))
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
    assert torch.equal(cache.layers[0].keys, full.layers[0].keys[:, :, LENGTH // 2 :])


@pytest.mark.parametrize("kind", ScoreKind)
def test_kinds_of_scores_that_nobody_has_declared(kind: ScoreKind) -> None:
    class Undeclared(Expert):
        name = "undeclared"

        def scores(self, view: LayerView) -> torch.Tensor:
            return view.scores_of(kind)

    with (
        pytest.raises(
            ValueError, match=f"an expert declares, got <ScoreKind.{kind.name}: .* kinds ="
        ),
        MoERouterPress(experts=[Undeclared()], top_k=1)(model := tiny_model()),
    ):
        prefill(model, tokens(1, LENGTH))


@pytest.mark.parametrize("count", [None, "5", NAN, torch.tensor(7), 3.7, 0, -1, True])
def test_counts_of_an_expert_that_are_none(count: Any) -> None:
    expert = Given(torch.arange(float(LENGTH)))
    expert.kept = lambda length, ratio: count  # type: ignore[method-assign]
    press = MoERouterPress(0.5, policy="dominant", experts=[expert], top_k=1)
    with (
        pytest.raises(ValueError, match=r"kept\(\) of expert 'given' an integer >= 1, got"),
        press(model := tiny_model()),
    ):
        prefill(model, tokens(1, LENGTH))


def test_scores_of_float64_that_are_to_be_compared() -> None:
    expert = Given(torch.arange(40.0).double() * 1e40)
    expert.comparable = True
    press = MoERouterPress(0.5, experts=[expert], top_k=1)
    with (
        pytest.raises(ValueError, match="'given', which are compared over heads, within float32"),
        press(model := tiny_model()),
    ):
        prefill(model, tokens(1, LENGTH))


def test_scores_of_an_expert_of_another_shape() -> None:
    model, expert = tiny_model(), Given(torch.zeros(1, 2, LENGTH - 1))
    press = MoERouterPress(experts=[expert], top_k=1)
    cache = DynamicCache()
    message = r"scores \[1, 2, 40\] on cpu from expert 'given', got torch.float32 \[1, 2, 39\]"
    with pytest.raises(ValueError, match=message), torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    expert.given = torch.rand(1, 2, LENGTH)
    assert_untouched(model, press, cache)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("policy", ["mixture", "dominant"])
def test_exception_in_an_expert(layer: int, policy: str) -> None:
    model, expert, cache = tiny_model(), Failing(layer), DynamicCache()
    press = MoERouterPress(experts=[expert, "semantic"], policy=policy)
    with pytest.raises(ArithmeticError, match="out of luck"), torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert lengths(cache) == [LENGTH] * (layer + 1)
    assert not press.get_stats()["layer_stats"]
    expert.layer = None
    assert_untouched(model, press, cache)


@pytest.mark.parametrize("budget", ["uniform", "model"])
def test_exception_in_an_expert_while_decoding(budget: str) -> None:
    model, expert, cache = tiny_model(), Failing(), DynamicCache()
    press = MoERouterPress(experts=[expert], top_k=1, budget=budget, decoding=DecodingConfig(20, 1))
    expert.layer = None

    def pairs() -> torch.Tensor:
        if budget == "uniform":
            return torch.tensor(lengths(cache))
        return torch.stack([layer.to_dense()[2] for layer in cache.layers])

    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        before = pairs()
        expert.layer = 1
        with pytest.raises(ArithmeticError, match="out of luck"):
            decode(model, cache, LENGTH)
        assert torch.equal(pairs(), before + 1)
        expert.layer = None
        cache.crop(-1)
        decode(model, cache, LENGTH)
    assert press.get_stats()["forward_count"] == 2
    assert pairs().float().mean() == 20


def test_experts_that_need_hidden_states_in_growing_caches() -> None:
    model, message = tiny_model(), "works without hidden states.*got expected"
    with pytest.raises(ValueError, match=message):
        MoERouterPress(experts=["expected"], top_k=1, decoding=DecodingConfig(20, 5))
    alone = MoERouterPress(experts=["expected"], top_k=1)
    refuse_block(ValueError, message, model, alone, context_length=100)
    press = peer("DecodingPress")(alone, compression_interval=4, target_size=12)
    with pytest.raises(ValueError, match=message), press(model):
        model.generate(tokens(1, LENGTH), max_new_tokens=8, do_sample=False)


def test_experts_that_can_do_without_hidden_states_have_the_say() -> None:
    model, caches = tiny_model(), []
    for experts in (["expected", "semantic"], ["semantic"]):
        press = MoERouterPress(
            0.0, experts=experts, top_k=1, budget="uniform", decoding=DecodingConfig(20, 5)
        )
        caches.append(DynamicCache())
        with press(model), torch.no_grad():
            model(tokens(1, 20), past_key_values=caches[-1])
            for step in range(5):
                model(tokens(1, 1, seed=step), past_key_values=caches[-1])
    assert lengths(caches[0]) == [20, 20]
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.keys, other.keys)

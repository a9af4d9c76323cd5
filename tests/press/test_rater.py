"""Ratings: how scores are mixed, by which routers, and that padding takes no part."""

import math
from typing import Any

import pytest
import torch
from peers import HAS_KVPRESS
from press_probes import ALL, LENGTH, Fixed, Routed, compress, kept_positions, make_press
from random_router import random_router
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from moekv import MoERouterPress
from moekv.models.hooks import cache_of, find_layers
from moekv.press import prefill as prefill_module
from moekv.press import rater
from moekv.routing.registry import ROUTERS


def ranks(scores: list[float]) -> list[float]:
    """From 1, the best first, ties to the lower place; what says nothing never has its turn."""
    places = sorted(range(len(scores)), key=lambda t: (-scores[t], t))
    return [places.index(t) + 1 if scores[t] > -math.inf else math.inf for t in range(len(scores))]


def test_mixture_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """For given router weights: each expert's order, shares, sinks, recent ones and the best."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(3, 2, LENGTH, generator=generator).exp()  # [E, H, T]
    raw[2] *= 100
    weights = torch.rand(LENGTH, 2, generator=generator)
    weights = weights / weights.sum(-1, keepdim=True)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(LENGTH)])
    router = Routed(torch.full((LENGTH, 3), 1 / 3), weights, chosen)
    monkeypatch.setattr(rater, "make_router", lambda *_, **__: router)
    experts = [Fixed(f"e{i}", raw[i]) for i in range(3)]
    press = make_press(0.6, experts=experts, recent=6, budget="uniform")
    model, input_ids = tiny_model(), tokens(1, LENGTH)
    cache, full = compress(press, model, input_ids), prefill(model, input_ids)

    gates = [[0.0] * LENGTH for _ in range(3)]
    for t in range(LENGTH):
        for slot in range(2):
            gates[int(chosen[t, slot])][t] = float(weights[t, slot])
    shares = [sum(row) / LENGTH for row in gates]
    expected = []
    removed, ruled = [0.0] * 3, [0.0] * 3
    for head in range(2):
        turn = [math.inf] * LENGTH
        for e in range(3):
            row = raw[e, head].double()
            standard = ((row - row.mean()) / row.std(correction=0)).tolist()
            own = [
                standard[t] + math.log(gates[e][t] / shares[e]) if gates[e][t] else -math.inf
                for t in range(LENGTH)
            ]
            turn = [min(x, r / shares[e]) for x, r in zip(turn, ranks(own), strict=True)]
        always = {0, 1, 2, 3, *range(LENGTH - 6, LENGTH)}
        others = sorted(set(range(LENGTH)) - always, key=lambda t: turn[t])
        kept = always | set(others[: 32 - len(always)])
        expected.append(sorted(kept))
        for t in range(LENGTH):
            for e in range(3):
                ruled[e] += gates[e][t]
                removed[e] += gates[e][t] * (t not in kept)
    for index in range(2):
        assert kept_positions(cache, full, index)[0].tolist() == expected
        stats = press.get_stats()["layer_stats"][index]["expert_compression_stats"]
        for e in range(3):
            ratio = stats["compression_ratios"][f"e{e}"]
            assert ratio == pytest.approx(removed[e] / ruled[e], abs=1e-5)
            usage = stats["expert_usage"][f"e{e}"]
            assert usage == pytest.approx(ruled[e] / sum(ruled), abs=1e-5)


@pytest.mark.parametrize("router_type", list(ROUTERS))
@pytest.mark.parametrize("policy", ["mixture", "dominant"])
def test_every_router_gives_the_same_bits_again(router_type: str, policy: str) -> None:
    model, input_ids = tiny_model(), tokens(2, LENGTH)

    def run() -> tuple[DynamicCache, dict[str, Any]]:
        press = make_press(experts=ALL, router_type=router_type, policy=policy, budget="uniform")
        return compress(press, model, input_ids), press.get_stats()

    (cache, stats), (again, stats_again) = run(), run()
    for layer, other in zip(cache.layers, again.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
    assert repr(stats) == repr(stats_again)
    decisions = stats["layer_stats"][0]["router_stats"]
    assert decisions["total_tokens"] == 2 * LENGTH
    assert sum(decisions["expert_usage_count"].values()) == decisions["routing_decisions"] > 0


def test_routers_live_where_their_layers_do() -> None:
    model, press = tiny_model().bfloat16(), make_press(num_experts=4)
    compress(press, model, tokens(1, 20))
    assert press._statistics.layers
    for index in press._statistics.layers:
        router = press._rater.routers[index]
        assert router.gate.weight.dtype == torch.bfloat16
        assert not router.training
        assert not any(p.requires_grad for p in router.parameters())


def left_padded(lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    width = max(lengths)
    input_ids, mask = (
        torch.zeros(len(lengths), width, dtype=torch.long),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        input_ids[row, width - length :] = tokens(1, length, seed=row)
        mask[row, width - length :] = 1
    return input_ids, {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def scores_of(
    press: MoERouterPress, model: PreTrainedModel, input_ids: Tensor, **inputs: Any
) -> list[Tensor]:
    """What the press's `score` gives for every layer of a prefill."""
    if not HAS_KVPRESS:
        pytest.skip("kvpress is not installed")
    scores = []

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = cache_of(kwargs).layers[module.layer_idx]
        hidden_states = kwargs["hidden_states"]
        scores.append(press.score(module, hidden_states, layer.keys, layer.values, None, kwargs))

    _, layers = find_layers(model)
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    prefill(model, input_ids, **inputs)
    for handle in handles:
        handle.remove()
    return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("router_type", list(ROUTERS))
def test_padded_rows_score_as_they_do_alone(attention: str, router_type: str) -> None:
    model = tiny_model(attention=attention)
    lengths = [60, 33, 12]
    input_ids, inputs = left_padded(lengths)
    options = {"experts": ALL, "router_type": router_type}
    press = make_press(**options)
    together = scores_of(press, model, input_ids, **inputs)
    rates = []
    for row, length in enumerate(lengths):
        single = make_press(**options)
        alone = scores_of(single, model, tokens(1, length, seed=row))
        for layer, other in zip(together, alone, strict=True):
            real = layer[row : row + 1, :, 60 - length :]
            torch.testing.assert_close(real, other, atol=1e-4, rtol=1e-4)
            padding = layer[row, :, : 60 - length]
            assert (padding < real.amin()).all()
        rates.append(single._statistics.layers[0].hit_rates)
    stats = press.get_stats()["layer_stats"][0]
    assert stats["router_stats"]["total_tokens"] == sum(lengths)
    measured = list(stats["expert_compression_stats"]["cache_hit_rates"].values())
    assert measured == pytest.approx(torch.stack(rates).mean(0).tolist(), abs=1e-5)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_layers_rated_together_are_rated_as_alone(
    calibrated: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    input_ids, inputs = left_padded([50, 31]) if padded else (tokens(2, 50), {})
    results = []
    for together in (1, 2, prefill_module.TOGETHER):
        monkeypatch.setattr(prefill_module, "TOGETHER", together)
        options = {"router": random_router(model)} if calibrated else {"router": None}
        press = MoERouterPress(0.5, **options)
        with press(model):
            cache = prefill(model, input_ids, **inputs)
        pairs = [x for layer in cache.layers for x in layer.to_dense()]
        results.append((pairs, press.get_stats()))
    for pairs, stats in results[1:]:
        torch.testing.assert_close(pairs, results[0][0], atol=0, rtol=0)
        assert _flat(stats) == pytest.approx(_flat(results[0][1]), rel=1e-5, nan_ok=True)


def _flat(stats: Any) -> list[float]:
    if isinstance(stats, dict):
        return [number for value in stats.values() for number in _flat(value)]
    return [float(stats)] if isinstance(stats, int | float) else []


def test_padded_batches_are_measured_where_nothing_leaves() -> None:
    model, press = tiny_model(), make_press(0.0)
    input_ids, inputs = left_padded([50, 20])
    cache = compress(press, model, input_ids, **inputs)
    assert cache.get_seq_length() == 50
    assert press.get_stats()["layer_stats"][1]["router_stats"]["total_tokens"] == 70

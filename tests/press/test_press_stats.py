"""What a press says of its prefills: hit rates, sums, and the routers' history."""

from typing import Any

import pytest
import torch
from press_probes import ALL, LENGTH, Spy, compress, kept_positions, make_press
from tiny_models import prefill, tiny_model, tokens

from moekv import MoERouterPress, PiKVMoERouter
from moekv.press.routing import ROUTED_EXPERTS, SHARED_EXPERT


def test_hit_rate_is_the_attention_on_what_the_expert_alone_keeps() -> None:
    model, input_ids = tiny_model(), tokens(2, LENGTH)
    full = prefill(model, input_ids)
    press = make_press(0.7, experts=ALL, window=10)
    compress(press, model, input_ids)
    stats = press.get_stats()["layer_stats"]
    for name in ALL:
        spy = Spy()
        compress(make_press(0.7, experts=[spy], window=10), model, input_ids)
        alone = make_press(0.7, experts=[name], window=10, budget="uniform")
        cache = compress(alone, model, input_ids)
        for index, mass in enumerate(spy.mass):
            kept = kept_positions(cache, full, index)
            expected = mass.gather(2, kept).sum(-1).mean()
            rate = stats[index]["expert_compression_stats"]["cache_hit_rates"][name]
            assert rate == pytest.approx(float(expected), abs=1e-6)
            assert 0 < rate < 1


def test_hit_rates_without_an_expert_of_attention_are_of_eight_queries() -> None:
    model, input_ids = tiny_model(), tokens(2, LENGTH)

    def rate(*experts: Any, window: int) -> float:
        press = make_press(0.7, experts=["semantic", *experts], top_k=1, window=window)
        compress(press, model, input_ids)
        layer: dict[str, Any] = press.get_stats()["layer_stats"][1]
        return layer["expert_compression_stats"]["cache_hit_rates"]["semantic"]

    assert rate("temporal", window=20) == rate("temporal", window=8) == rate(Spy(), window=8)
    assert rate("temporal", window=20) != rate(Spy(), window=20)
    assert rate("temporal", window=5) == rate(Spy(), window=5)


def test_hit_rate_of_a_dominant_policy_is_for_what_each_would_keep() -> None:
    model, input_ids, spy = tiny_model(), tokens(1, LENGTH), Spy()
    press = make_press(0.7, experts=["aggressive", "conservative", spy], policy="dominant")
    compress(press, model, input_ids)
    stats = press.get_stats()["layer_stats"]
    for index, mass in enumerate(spy.mass):
        rates = stats[index]["expert_compression_stats"]["cache_hit_rates"]
        few, many = mass.mean((0, 1)), mass.mean((0, 1))
        assert rates["aggressive"] == pytest.approx(float(few[:16].sum() + few[72:].sum()))
        assert rates["conservative"] == pytest.approx(float(many[:40].sum() + many[56:].sum()))
        assert rates["spy"] == pytest.approx(float(mass.topk(24).values.sum(-1).mean()))


def test_stats_of_two_prefills_and_a_reset() -> None:
    model, press = tiny_model(), make_press(experts=ROUTED_EXPERTS, shared=SHARED_EXPERT)
    with press(model):
        prefill(model, tokens(1, LENGTH))
        prefill(model, tokens(1, 40, seed=1))
    stats = press.get_stats()
    assert list(stats) == [
        "total_aux_loss",
        "avg_aux_loss",
        "forward_count",
        "router",
        "budget",
        "pairs",
        "fold",
        "never_chosen",
        "compression",
        "cache",
        "layer_stats",
    ]
    assert stats["forward_count"] == 2
    assert stats["avg_aux_loss"] == stats["total_aux_loss"] / 2 > 0
    assert list(stats["layer_stats"]) == [0, 1]
    for layer in stats["layer_stats"].values():
        assert layer["router_stats"]["total_tokens"] == LENGTH + 40
        usage = layer["expert_compression_stats"]["expert_usage"]
        assert list(usage) == [SHARED_EXPERT, *ROUTED_EXPERTS]
        assert sum(usage.values()) == pytest.approx(1)
    press.reset_stats()
    empty = press.get_stats()
    assert empty["forward_count"] == empty["total_aux_loss"] == empty["avg_aux_loss"] == 0
    assert empty["compression"] == dict.fromkeys(stats["compression"], 0)
    assert empty["layer_stats"] == {}


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": "auto"},
        {"experts": ALL, "router_type": "pikv"},
        {"pairs": "auto", "fold": True},
        {"budget": "uniform", "pairs": "16"},
    ],
    ids=["experts", "history", "formats", "uniform"],
)
def test_a_reset_press_is_a_new_one(options: dict[str, Any]) -> None:
    """All that is said of a model, and what its sizes made of ``"auto"``, goes with it."""
    first, then = tiny_model(), tiny_model("qwen3")

    def use(press: Any, model: Any, seed: int) -> tuple[dict[str, Any], list[torch.Tensor]]:
        torch.manual_seed(0)  # of routers' weights
        with press(model):
            cache = prefill(model, tokens(1, LENGTH, seed))
            with torch.no_grad():
                model(tokens(1, 1, seed), past_key_values=cache)
        held = [x for layer in cache.layers for x in layer.held_pairs()]
        return press.get_stats(), held

    used, new = (MoERouterPress(0.5, **options) for _ in range(2))
    unused = new.get_stats()
    for seed in (3, 4):
        stats, _ = use(used, first, seed)
    assert all(stats[name] != unused[name] for name in ("compression", "layer_stats"))
    used.reset_stats()
    assert used.get_stats() == unused
    assert used.summary() == new.summary()
    expected, got = use(new, then, 5), use(used, then, 5)
    assert str(got[0]) == str(expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True))


def test_history_follows_the_hit_rates_every_few_calls() -> None:
    model = tiny_model()
    press, ignorant = (
        make_press(
            experts=ALL,
            router_type=PiKVMoERouter(64, len(ALL), 2, cache_aware=aware, cache_update_interval=3),
        )
        for aware in (True, False)
    )
    for call in range(1, 8):
        for each in (press, ignorant):
            compress(each, model, tokens(1, LENGTH, seed=call))
        router = press._rater.routers[0]
        assert router.history_bias.any()
        if call in (1, 3, 6):
            rates = press._statistics.layers[0].hit_rates
            torch.testing.assert_close(router.history_bias, rates - rates.mean())
    assert not ignorant._rater.routers[0].history_bias.any()
    press.reset_stats()
    assert press._rater is None

import math

import pytest
import torch

from moekv.press.stats import LayerStats, Observation, Statistics

NAMES = ["a", "b", "c"]
TENSORS = ("load", "entropy", "aux_loss", "shares", "hit_rates")


def observation(**changes: object) -> Observation:
    shares = torch.zeros(1, 1, 4, 3)
    shares[0, 0, :, 0] = torch.tensor([1.0, 0.5, 0.0, 0.0])
    shares[0, 0, :, 1] = torch.tensor([0.0, 0.5, 1.0, 1.0])
    fields: dict[str, object] = {
        "num_tokens": 4,
        "load": torch.tensor([[2, 3, 0]]),
        "entropy": torch.tensor([2.0]),
        "aux_loss": torch.tensor([0.25]),
        "shares": shares,
        "hit_rates": torch.tensor([[0.5, 0.25, 1.0]]),
        "silent": torch.tensor([False, False, True]),
    }
    return Observation(**fields | changes)


def record(
    stats: Statistics, seen: Observation, kept: torch.Tensor | None = None, first: int = 0
) -> None:
    stats.observe(range(first, first + len(seen.load)), seen, kept)


def layer(stats: Statistics) -> LayerStats:
    return stats.layers[0]


def test_nothing_measured() -> None:
    report = LayerStats(3, torch.device("cpu")).report(NAMES)
    assert report["router_stats"] == {
        "expert_usage_ratios": dict.fromkeys(NAMES, 0.0),
        "expert_usage_count": dict.fromkeys(NAMES, 0),
        "total_tokens": 0,
        "routing_decisions": 0,
        "router_entropy": 0.0,
        "history_bias": {},
    }
    assert report["expert_compression_stats"]["expert_usage"] == dict.fromkeys(NAMES, 0.0)
    ratios = report["expert_compression_stats"]["compression_ratios"]
    assert all(map(math.isnan, ratios.values()))


def test_sums_and_shares() -> None:
    stats = Statistics()
    record(stats, observation())
    record(stats, observation())
    report = layer(stats).report(NAMES)
    assert report["router_stats"] == {
        "expert_usage_ratios": pytest.approx({"a": 0.4, "b": 0.6, "c": 0.0}),
        "expert_usage_count": {"a": 4, "b": 6, "c": 0},
        "total_tokens": 8,
        "routing_decisions": 10,
        "router_entropy": 0.5,
        "history_bias": {},
    }
    usage = report["expert_compression_stats"]["expert_usage"]
    assert usage == pytest.approx({"a": 1.5 / 4, "b": 2.5 / 4, "c": 0.0})
    assert float(layer(stats).aux_loss) == 0.5 and layer(stats).num_calls == 2


def test_hit_rates_are_a_moving_average() -> None:
    stats = Statistics()
    record(stats, observation(hit_rates=torch.tensor([[0.5, 0.0, 1.0]])))
    first = layer(stats).report(NAMES)["expert_compression_stats"]["cache_hit_rates"]
    assert first == {"a": 0.5, "b": 0.0, "c": 1.0}
    record(stats, observation(hit_rates=torch.tensor([[1.0, 1.0, 0.0]])))
    second = layer(stats).report(NAMES)["expert_compression_stats"]["cache_hit_rates"]
    assert second == pytest.approx({"a": 0.55, "b": 0.1, "c": 0.9})


def test_later_hit_rates_are_one_as_well_and_begin_with_the_first() -> None:
    stats = Statistics()
    stats.observe_later(0, torch.ones(3))  # of a layer that nobody has rated
    record(stats, observation())

    def later() -> list[float]:
        report = layer(stats).report(NAMES)["expert_compression_stats"]
        return list(report["later_hit_rates"].values())

    assert all(map(math.isnan, later()))
    (index,) = stats.layers
    stats.observe_later(index, torch.tensor([0.5, 0.0, math.nan]))
    stats.observe_later(index, torch.tensor([1.0, math.nan, 1.0]))
    assert later() == pytest.approx([0.55, 0.0, 1.0])


def test_ratio_of_an_expert_is_that_of_the_pairs_it_rated() -> None:
    stats = Statistics()
    # a rated position 0 alone and half of 1; b the other half, 2 and 3.
    record(stats, observation(), torch.tensor([[[1.0, 0.5, 0.0, 0.25]]]))
    ratios = layer(stats).report(NAMES)["expert_compression_stats"]["compression_ratios"]
    assert ratios["a"] == pytest.approx(0.5 * 0.5 / 1.5)
    assert ratios["b"] == pytest.approx((0.5 * 0.5 + 1 + 0.75) / 2.5)
    assert math.isnan(ratios["c"])


def test_layers_are_recorded_together_as_alone() -> None:
    first, second = observation(), observation(load=torch.tensor([[1, 1, 3]]))
    second.shares = second.shares.flip(-1)
    kept = torch.tensor([[[1.0, 0.5, 0.0, 0.25]], [[0.0, 1.0, 1.0, 0.5]]])
    fields = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in TENSORS}
    both = Observation(num_tokens=4, silent=first.silent, **fields)
    together, alone = Statistics(), Statistics()
    for _ in range(2):
        record(together, both, kept)
        record(alone, first, kept[:1])
        record(alone, second, kept[1:], first=1)
    for index in (0, 1):
        for name in ("load", "sums", "hit_rates"):
            one, other = (getattr(x.layers[index], name) for x in (together, alone))
            torch.testing.assert_close(one, other)
    assert not torch.equal(together.layers[0].sums, together.layers[1].sums)

"""Where nothing asks for routing, the shared expert scores alone, and others stand in for it."""

from typing import Any

import pytest
import torch
from growth_cases import decode
from press_probes import make_press
from tiny_models import prefill, tiny_model, tokens

from moekv import DecodingConfig
from moekv.press.routing import ROUTED_EXPERTS, SHARED_EXPERT

LENGTH = 200


def _after_a_prefill(**options: Any) -> tuple[Any, Any]:
    press, model = make_press(0.6, **options), tiny_model()
    with press(model):
        cache = prefill(model, tokens(2, LENGTH))
    return press, cache


def _kept(cache: Any) -> list[torch.Tensor]:
    dense = [x.to_dense() if hasattr(x, "to_dense") else (x.keys, x.values) for x in cache.layers]
    return [x for layer in dense for x in layer]


@pytest.mark.parametrize("budget", ["auto", "head", "layer", "uniform"])
@pytest.mark.parametrize("streaming", [False, True])
def test_without_options_the_shared_expert_scores_alone(budget: str, streaming: bool) -> None:
    if streaming and budget == "layer":
        budget = "model"
    how = {"budget": budget, "streaming": streaming}
    press, cache = _after_a_prefill(**how)
    alone, same = _after_a_prefill(experts=[SHARED_EXPERT], shared=None, **how)
    for got, expected in zip(_kept(cache), _kept(same), strict=True):
        assert torch.equal(got, expected)
    stats = press.get_stats()
    assert stats["router"] == "none, not calibrated"
    assert stats["never_chosen"] == []
    for index, layer in stats["layer_stats"].items():
        experts = layer["expert_compression_stats"]
        assert experts["expert_usage"] == {SHARED_EXPERT: 1} | dict.fromkeys(ROUTED_EXPERTS, 0)
        rates = experts["cache_hit_rates"]
        other = alone.get_stats()["layer_stats"][index]["expert_compression_stats"]
        assert rates[SHARED_EXPERT] == other["cache_hit_rates"][SHARED_EXPERT]
        assert all(rates[name] != rates[name] for name in ROUTED_EXPERTS)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_experts": 2},
        {"top_k": 1},
        {"router_type": "base"},
        {"router_type": "pikv"},
        {"cache_aware": True},
        {"cache_aware": False},
        {"experts": list(ROUTED_EXPERTS), "shared": SHARED_EXPERT},
    ],
)
def test_whatever_asks_for_routing_gets_it(asked: dict[str, Any]) -> None:
    press, cache = _after_a_prefill(**asked)
    _, alone = _after_a_prefill()
    pairs = list(zip(_kept(cache), _kept(alone), strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
    usage = press.get_stats()["layer_stats"][0]["expert_compression_stats"]["expert_usage"]
    assert usage[SHARED_EXPERT] == pytest.approx(0.9)


def test_others_stand_in_where_a_cache_grows(caplog: pytest.LogCaptureFixture) -> None:
    press, model = make_press(0.5, decoding=DecodingConfig(20, 6)), tiny_model()
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
        before = press.get_stats()["layer_stats"][0]["expert_compression_stats"]
        for step in range(8):
            decode(model, cache, LENGTH + step)
    after = press.get_stats()["layer_stats"][0]["expert_compression_stats"]
    assert before["expert_usage"][SHARED_EXPERT] == 1
    for name in ROUTED_EXPERTS:
        assert after["expert_usage"][name] > 0
        assert 0 < after["cache_hit_rates"][name] <= 1
    assert not caplog.records


def test_a_shared_expert_by_name_scores_alone() -> None:
    _, cache = _after_a_prefill(shared="temporal", budget="uniform")
    _, alone = _after_a_prefill(experts=["temporal"], budget="uniform")
    for got, expected in zip(_kept(cache), _kept(alone), strict=True):
        assert torch.equal(got, expected)


def test_without_a_shared_expert_the_others_are_routed() -> None:
    press, _ = _after_a_prefill(shared=None)
    assert press.get_stats()["router"] == "pikv, not calibrated"
    usage = press.get_stats()["layer_stats"][0]["expert_compression_stats"]["expert_usage"]
    assert list(usage) == list(ROUTED_EXPERTS)


def test_the_summary_names_those_that_acted(capsys: pytest.CaptureFixture[str]) -> None:
    press, _ = _after_a_prefill()
    press.summary()
    out = capsys.readouterr().out
    assert "none, not calibrated" in out and "expected 100.0%" in out
    assert not any(name in out for name in ROUTED_EXPERTS)
    assert "nan" not in out


@pytest.mark.parametrize(
    ("options", "is_used"),
    [({}, False), ({"experts": ["selective"]}, True), ({"num_experts": 2}, True)],
)
def test_a_window_that_nobody_looks_through_is_named(
    options: dict[str, Any], is_used: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _after_a_prefill(**options)
    assert not caplog.records
    _after_a_prefill(window=20, **options)
    named = [x.message for x in caplog.records if "window=20 was not used" in x.message]
    assert len(named) == (0 if is_used else 1)


def test_a_window_is_used_where_a_cache_grows(caplog: pytest.LogCaptureFixture) -> None:
    _after_a_prefill(window=20, decoding=DecodingConfig(20, 6))
    assert not caplog.records

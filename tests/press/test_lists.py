"""What is asked for is what acts: lists of experts, the shared one, numbers of experts."""

from typing import Any

import pytest
import torch
from peers import HAS_KVPRESS, peer
from press_probes import Fixed, Spy, compress, make_press
from tiny_models import tiny_model, tokens
from torch import Tensor

from moekv import BaseMoERouter, MoERouterPress, expert_names
from moekv.experts.registry import build_experts
from moekv.routing.registry import ROUTERS

LONG = 60
SCORERS = ("KnormPress", "TOVAPress", "KeyDiffPress")


def kept(press: MoERouterPress, model: Any = None) -> list[Tensor]:
    """Pairs that each layer holds in the end."""
    cache = compress(press, model or tiny_model(), tokens(1, LONG))
    return [
        layer.to_dense()[0] if hasattr(layer, "to_dense") else layer.keys for layer in cache.layers
    ]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def everyone() -> list[Any]:
    scorers = [peer(name)() for name in SCORERS] if HAS_KVPRESS else []
    return [*expert_names()[:7], *scorers]


BUDGETS = ("uniform", "head", "model")


@pytest.mark.parametrize(
    ("router_type", "budget"),
    [(name, BUDGETS[i % 3]) for i, name in enumerate(ROUTERS)]
    + [
        ("pikv", budget)
        for budget in BUDGETS
        if list(ROUTERS).index("pikv") % 3 != BUDGETS.index(budget)
    ],
)
def test_an_expert_in_a_list_changes_what_is_kept(router_type: str, budget: str) -> None:
    model = tiny_model()
    options: dict[str, Any] = {"router_type": router_type, "budget": budget, "recent": 4}
    for number, expert in enumerate(everyone()):
        others = [name for name in ("selective", "semantic", "temporal") if name != expert][:2]
        without = kept(make_press(0.6, experts=others, **options), model)
        place = number % 3
        listed = [*others[:place], expert, *others[place:]]
        assert not same(kept(make_press(0.6, experts=listed, **options), model), without), listed


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_expert_acts_wherever_it_stands(place: int) -> None:
    model = tiny_model()
    without = kept(make_press(0.6, experts=["selective", "temporal"]), model)
    for expert in ("semantic", "aggressive", "expected"):
        listed: list[Any] = ["selective", "temporal"]
        listed.insert(place, expert)
        press = make_press(0.6, experts=listed)
        assert not same(kept(press, model), without)
        usage = press.get_stats()["layer_stats"][0]["expert_compression_stats"]["expert_usage"]
        assert list(usage) == listed and min(usage.values()) > 0.05


def test_the_order_of_a_list_decides_nothing() -> None:
    model = tiny_model()
    for top_k in (1, 2, 3):
        one, other = (
            kept(make_press(0.6, experts=listed, top_k=top_k, router_type="base"), model)
            for listed in (
                ["selective", "temporal", "semantic"],
                ["semantic", "selective", "temporal"],
            )
        )
        assert same(one, other)


def test_a_list_of_one_needs_no_top_k() -> None:
    press = make_press(0.6, experts=["semantic"])
    kept(press)
    assert list(press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"]) == [
        "semantic"
    ]


def test_the_shared_expert_stays() -> None:
    """Beside four routed ones by default, any other by name, none with None."""
    model = tiny_model()
    seen = {}
    for shared in ("auto", "expected", "semantic", None):
        press = make_press(0.6, num_experts=4, shared=shared)
        seen[shared] = kept(press, model)
        names = list(press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"])
        first = {"auto": ["expected"], None: []}.get(shared, [shared])
        assert names == [*first, "aggressive", "moderate", "conservative", "selective"]
    assert same(seen["auto"], seen["expected"])
    assert not same(seen["auto"], seen["semantic"]) and not same(seen["auto"], seen[None])


def test_a_shared_expert_beside_a_list() -> None:
    model = tiny_model()
    plain = kept(make_press(0.6, experts=["semantic"]), model)
    press = make_press(0.6, experts=["semantic"], shared=Fixed("mine", torch.arange(60.0)))
    assert not same(kept(press, model), plain)
    usage = press.get_stats()["layer_stats"][1]["expert_compression_stats"]["expert_usage"]
    assert usage == pytest.approx({"mine": 0.9, "semantic": 0.1})


def test_numbers_skip_the_shared_expert() -> None:
    most = len(expert_names()) - 1
    with pytest.raises(ValueError, match=f"num_experts <= {most} .*expected being shared"):
        make_press(num_experts=most + 1)
    make_press(num_experts=most + 1, shared=None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"experts": ["semantic", "semantic"]}, ValueError, "different names"),
        ({"experts": ["semantic"], "top_k": 2}, ValueError, "top_k <= num_experts = 1, got 2"),
        ({"experts": ["semantic"], "shared": "semantic"}, ValueError, "'semantic' in both"),
        ({"experts": [Spy]}, TypeError, r"instance, got the class: Spy\(\) makes one"),
        ({"shared": Spy}, TypeError, r"instance, got the class: Spy\(\) makes one"),
        ({"shared": "nobody"}, ValueError, "among .*got 'nobody'"),
        ({"policy": "dominant", "shared": "semantic"}, ValueError, "no shared expert with policy"),
        ({"cache_aware": True, "router_type": "base"}, ValueError, "has a history.*got base"),
    ],
    ids=str,
)
def test_lists_that_cannot_be_meant(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_press(**options)


def test_an_expert_without_a_name() -> None:
    nameless = Fixed("", torch.zeros(4))
    with pytest.raises(ValueError, match="an expert with a name, got Fixed without"):
        build_experts([nameless])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router_type", sorted(set(ROUTERS) - {"eplb", "hierarchical"}))
@pytest.mark.parametrize("scores", [0.0, torch.nan, torch.inf])
def test_an_expert_that_says_nothing_costs_nothing(
    scores: float, router_type: str, top_k: int
) -> None:
    """Unless a router balances loads or groups, whatever is said."""
    model, options = tiny_model(), {"budget": "model", "router_type": router_type}
    alone = kept(make_press(0.6, experts=["semantic"], **options), model)
    silent = Fixed("silent", torch.full((LONG,), scores))
    press = make_press(0.6, experts=[silent, "semantic"], top_k=top_k, **options)
    assert same(alone, kept(press, model))


@pytest.mark.parametrize("scores", [0.5, torch.nan, torch.inf])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 1}, {"router_type": "eplb", "top_k": 1}, {"shared": "semantic"}],
    ids=str,
)
def test_an_expert_with_constant_scores_is_named(
    scores: float, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    silent = Fixed("silent", torch.full((LONG,), scores))
    listed = ["temporal", silent] if "shared" in options else ["semantic", silent]
    kept(make_press(0.6, experts=listed, **options))
    (record,) = caplog.records
    assert "silent was not counted: expected scores that differ" in record.message
    caplog.clear()
    kept(make_press(0.6, experts=["semantic"], shared=silent))
    kept(make_press(0.6, experts=[silent]))
    assert [x.message[:22] for x in caplog.records] == ["silent was not counted"] * 2
    caplog.clear()
    once = Fixed("once", torch.zeros(LONG).index_fill(0, torch.tensor([30]), 1.0))
    kept(make_press(0.6, experts=["semantic", once]))
    assert not caplog.records


def test_an_expert_that_was_never_chosen_is_named(caplog: pytest.LogCaptureFixture) -> None:
    router = BaseMoERouter(64, 2, 1, prior=[0.0, -99.0])
    press = make_press(0.6, experts=["semantic", "temporal"], router_type=router)
    kept(press)
    assert press.get_stats()["never_chosen"] == ["temporal"]
    assert "no token was routed to temporal" in caplog.text
    caplog.clear()
    kept(make_press(0.6, experts=["semantic", "selective"]))
    assert not caplog.records


def test_a_budget_that_falls_back_says_why(caplog: pytest.LogCaptureFixture) -> None:
    press = make_press(0.6)
    assert press.get_stats()["budget"] == {"asked": "auto", "used": None}
    kept(press)
    assert press.get_stats()["budget"] == {"asked": "auto", "used": "model"}
    assert not caplog.records
    eager = make_press(0.6)
    kept(eager, tiny_model(attention="eager"))
    assert eager.get_stats()["budget"] == {"asked": "auto", "used": "layer"}
    (record,) = caplog.records
    assert "'auto' is 'layer'" in record.message and "eager" in record.message

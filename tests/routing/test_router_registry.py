"""Routers by name, and settings that they refuse."""

import math

import pytest
from router_cases import HIDDEN

from moekv.routing.base import BaseMoERouter
from moekv.routing.eplb import EPLBRouter
from moekv.routing.hierarchical import HierarchicalRouter
from moekv.routing.pikv import PiKVMoERouter
from moekv.routing.registry import ROUTERS, make_router
from moekv.routing.topk_balanced import TopKBalancedRouter


def test_registry_builds_every_router():
    # The press's options and stored configurations name these.
    assert {"base", "topk_balanced", "adaptive", "pikv", "eplb", "hierarchical"} <= set(ROUTERS)
    for name, cls in ROUTERS.items():
        assert type(make_router(name, HIDDEN, 4, 2)) is cls


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make_router("mlp", HIDDEN, 4), "router_type among base, topk_balanced, .*'mlp'"),
        (lambda: BaseMoERouter(0, 4), "hidden_size >= 1, got 0"),
        (lambda: BaseMoERouter(HIDDEN, 0, 1), "num_experts between 1 and 256, got 0"),
        (lambda: BaseMoERouter(HIDDEN, 257, 1), "num_experts between 1 and 256, got 257"),
        (lambda: BaseMoERouter(HIDDEN, 4, 5), "top_k between 1 and num_experts = 4, got 5"),
        (lambda: BaseMoERouter(HIDDEN, 4, 0), "top_k between 1 and num_experts = 4, got 0"),
        (lambda: BaseMoERouter(HIDDEN, 4, temperature=0.0), "temperature > 0, got 0"),
        (lambda: BaseMoERouter(HIDDEN, 4, temperature=math.nan), "temperature > 0, got nan"),
        (lambda: BaseMoERouter(HIDDEN, 4, aux_loss_weight=-1.0), "aux_loss_weight >= 0, got -1"),
        (lambda: BaseMoERouter(HIDDEN, 4, prior=[0.0]), r"prior of 4 finite numbers, got \[0.0\]"),
        (lambda: BaseMoERouter(HIDDEN, 2, prior=[0.0, math.inf]), "prior of 2 finite numbers"),
        (
            lambda: TopKBalancedRouter(HIDDEN, 4, balance_mode="std"),
            "balance_mode among entropy, variance, gini, got 'std'",
        ),
        (
            lambda: PiKVMoERouter(HIDDEN, 4, cache_update_interval=0),
            "cache_update_interval an integer >= 1, got 0",
        ),
        (lambda: PiKVMoERouter(HIDDEN, 4, history_decay=1.0), r"history_decay in \[0, 1\), got 1"),
        (lambda: PiKVMoERouter(HIDDEN, 4, history_weight=-1.0), "history_weight >= 0, got -1"),
        (lambda: EPLBRouter(HIDDEN, 4, balance_rounds=-1), "balance_rounds >= 0, got -1"),
        (lambda: HierarchicalRouter(HIDDEN, 4, num_groups=3), "num_groups to divide .* 4, got 3"),
        (
            lambda: HierarchicalRouter(HIDDEN, 6, 4, num_groups=3, top_groups=1),
            "top_groups between 2 and 3 .* got 1",
        ),
    ],
)
def test_bad_configuration_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()

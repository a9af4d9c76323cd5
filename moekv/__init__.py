"""Mixture-of-experts compression of KV caches."""

from moekv.experts import Expert, expert_names, register_expert
from moekv.press import MoERouterPress
from moekv.routers import (
    AdaptiveRouter,
    BaseMoERouter,
    EPLBRouter,
    HierarchicalRouter,
    PiKVMoERouter,
    RouterOutput,
    TopKBalancedRouter,
)
from moekv.view import LayerView

__version__ = "0.1.0"

__all__ = [
    "AdaptiveRouter",
    "BaseMoERouter",
    "EPLBRouter",
    "Expert",
    "HierarchicalRouter",
    "LayerView",
    "MoERouterPress",
    "PiKVMoERouter",
    "RouterOutput",
    "TopKBalancedRouter",
    "expert_names",
    "register_expert",
]

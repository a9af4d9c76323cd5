"""Routers by name."""

from __future__ import annotations

from typing import Any, Literal

from moekv.routing.adaptive import AdaptiveRouter
from moekv.routing.base import BaseMoERouter
from moekv.routing.eplb import EPLBRouter
from moekv.routing.hierarchical import HierarchicalRouter
from moekv.routing.pikv import PiKVMoERouter
from moekv.routing.topk_balanced import TopKBalancedRouter

RouterType = Literal["base", "topk_balanced", "adaptive", "pikv", "eplb", "hierarchical"]
ROUTERS: dict[str, type[BaseMoERouter]] = {
    "base": BaseMoERouter,
    "topk_balanced": TopKBalancedRouter,
    "adaptive": AdaptiveRouter,
    "pikv": PiKVMoERouter,
    "eplb": EPLBRouter,
    "hierarchical": HierarchicalRouter,
}


def make_router(
    router_type: str, hidden_size: int, num_experts: int, top_k: int = 2, **options: Any
) -> BaseMoERouter:
    """Build a router by name.

    Parameters
    ----------
    router_type : str
        A key of `ROUTERS`.
    hidden_size, num_experts, top_k
        As in `BaseMoERouter`.
    **options
        Keyword arguments of the router's class.

    Returns
    -------
    BaseMoERouter

    Raises
    ------
    ValueError
        If the name is unknown or an argument is out of its range.
    """
    if router_type not in ROUTERS:
        raise ValueError(f"expected router_type among {', '.join(ROUTERS)}, got {router_type!r}")
    return ROUTERS[router_type](hidden_size, num_experts, top_k, **options)

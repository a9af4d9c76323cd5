"""Options on experts and routers: which experts rate, and how tokens are routed to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moekv.calibration.router import CalibratedRouter
from moekv.experts.base import Expert
from moekv.experts.registry import build_experts, expert_names
from moekv.press.checks import check_choice, check_count
from moekv.routing.base import BaseMoERouter
from moekv.routing.registry import ROUTERS
from moekv.units import kind

SHARED_EXPERT, ROUTED_EXPERTS = "expected", ("selective", "semantic")
"""Experts of a press without options and without a calibrated router. ``expected`` scores after a
prefill, when the hidden states of all pairs are known; where a cache grows, the others stand in."""


@dataclass(frozen=True)
class Routing:
    """Experts and how tokens are routed to them: what routers and statistics depend on.

    Attributes
    ----------
    experts : tuple of Expert, or None
        The routed ones. None: ``num_experts="auto"``, as many as the model's shape gives.
    shared : Expert or None
        The one that all tokens share, unless a calibrated router is found.
    router_type : str or BaseMoERouter
        A key of ``ROUTERS``, or a router of which every layer gets a copy.
    top_k : int
    cache_aware : bool
    calibrated : CalibratedRouter, str or None
        A name is looked up when a block begins; ``"auto"``: the model's own, if there is one.
    own_choice : bool
        Whether options ask for routing, so that routed experts act beside shared ones.
    backend : str
    asked : tuple
        The options that the experts were built from; while these are the same, experts are reused.
    """

    experts: tuple[Expert, ...] | None
    shared: Expert | None
    router_type: str | BaseMoERouter
    top_k: int
    cache_aware: bool
    calibrated: CalibratedRouter | str | None
    own_choice: bool
    backend: str
    asked: tuple[Any, ...]

    @property
    def router_name(self) -> str:
        """Name of the router's type."""
        router = self.router_type
        return router if isinstance(router, str) else type(router).__name__


def routing_of(given: Mapping[str, Any], known: Sequence[Routing]) -> Routing:
    """Check what a press was given of experts and routers, and build the experts.

    Parameters
    ----------
    given : mapping
        Of every option of the press.
    known : sequence of Routing
        Whose experts are not built again where they are the same.

    Raises
    ------
    ValueError, TypeError
        See ``MoERouterPress``.
    """
    names = ("num_experts", "top_k", "router_type", "cache_aware", "experts")
    chosen = [name for name in names if given[name] is not None]
    chosen += ["policy"] if given["policy"] == "dominant" else []
    calibrated = _calibrated(given)
    router_type = "pikv" if given["router_type"] is None else given["router_type"]
    _check_no_class(router_type)
    if not isinstance(router_type, BaseMoERouter):
        check_choice("router_type", router_type, tuple(ROUTERS))
    listed = given["experts"]
    listed = tuple(listed) if isinstance(listed, list) else listed
    asked = bool(chosen), listed, given["num_experts"], given["shared"], calibrated is None
    same = [routing for routing in known if routing.asked == asked]
    if same:
        experts, shared = same[0].experts, same[0].shared
    else:
        shared = _shared(given)
        experts = _experts(given, shared, bool(chosen))
    most = len(expert_names()) - (shared is not None) if experts is None else len(experts)
    top_k = given["top_k"]
    if top_k is None:
        top_k = min(2, most) if listed is None else most
    else:
        check_count("top_k", top_k, 1)
    if isinstance(router_type, BaseMoERouter):
        top_k = _top_k_of(router_type, experts, given["top_k"])
    if top_k > most:
        raise ValueError(f"expected top_k <= num_experts = {most}, got {top_k}")
    return Routing(
        experts=experts,
        shared=shared,
        router_type=router_type,
        top_k=top_k,
        cache_aware=_cache_aware(given["cache_aware"], router_type),
        calibrated=calibrated,
        own_choice=bool(chosen),
        backend=given["backend"],
        asked=asked,
    )


def _check_no_class(router: object) -> None:
    if isinstance(router, type) and issubclass(router, BaseMoERouter):
        raise TypeError(
            f"expected a router's instance, got the class: {router.__name__}(hidden_size, "
            "num_experts) makes one"
        )


def _cache_aware(asked: bool | None, router_type: str | BaseMoERouter) -> bool:
    """Return whether routers follow their history."""
    has_history = router_type == "pikv" or getattr(router_type, "cache_aware", False)
    if asked and not has_history:
        name = router_type if isinstance(router_type, str) else type(router_type).__name__
        raise ValueError(
            "expected cache_aware=True with a router that has a history, 'pikv' or "
            f"PiKVMoERouter(..., cache_aware=True), got {name}"
        )
    return has_history if asked is None else asked


def _calibrated(given: Mapping[str, Any]) -> CalibratedRouter | str | None:
    """Return the calibrated router that takes the shared expert's place, if any."""
    router, shared = given["router"], given["shared"]
    if router not in (None, "auto"):
        if not isinstance(router, CalibratedRouter | str):
            raise TypeError(
                'expected router a moekv.CalibratedRouter, a name, "auto" or None, got '
                f"{kind(router)}"
            )
        if given["policy"] == "dominant":
            raise ValueError(
                "expected no calibrated router with policy 'dominant', in which one expert decides "
                "a layer alone, got one; or router=None"
            )
        if shared != "auto":
            raise ValueError(
                "expected no shared beside a calibrated router, which takes its place, "
                f"got {shared!r}; or router=None"
            )
        return router
    by_itself = shared == "auto" and given["experts"] is None and given["policy"] == "mixture"
    return router if by_itself else None


def _shared(given: Mapping[str, Any]) -> Expert | None:
    """Build the shared expert for models without a calibrated router."""
    shared = given["shared"]
    if given["policy"] == "dominant":
        if shared not in ("auto", None):
            raise ValueError(
                "expected no shared expert with policy 'dominant', in which one expert decides "
                f"a layer alone, got {shared!r}"
            )
        return None
    if shared == "auto":
        shared = SHARED_EXPERT if given["experts"] is None else None
    return None if shared is None else build_experts([shared])[0]


def _experts(
    given: Mapping[str, Any], shared: Expert | None, chosen: bool
) -> tuple[Expert, ...] | None:
    """Build the routed experts."""
    wanted: Sequence[Any]
    own = None if shared is None else shared.name
    if given["experts"] is not None:
        experts = build_experts(given["experts"])
        if own in [expert.name for expert in experts]:
            raise ValueError(
                f"expected the shared expert beside those that are routed, got {own!r} in both"
            )
        return tuple(experts)
    num_experts = 4 if given["num_experts"] is None else given["num_experts"]
    names = [name for name in expert_names() if name != own]
    if not chosen:
        wanted = [name for name in ROUTED_EXPERTS if name != own]
    elif num_experts == "auto":
        return None
    else:
        if isinstance(num_experts, str):
            raise ValueError(f'expected num_experts a number or "auto", got {num_experts!r}')
        check_count("num_experts", num_experts, 1)
        if num_experts > len(names):
            beside = "" if own is None else f", {own} being shared"
            raise ValueError(
                f"expected num_experts <= {len(names)} ({', '.join(names)}{beside}), "
                f"got {num_experts}; register_expert adds more"
            )
        wanted = names[:num_experts]
    return tuple(build_experts(wanted))


def _top_k_of(router: BaseMoERouter, experts: Sequence[Expert] | None, given: int | None) -> int:
    """Experts per token of a router that was passed as an instance, which has to fit."""
    if experts is None or router.num_experts != len(experts):
        count = "as many as the model asks for" if experts is None else len(experts)
        raise ValueError(
            f"expected a router of as many experts as there are, {count}, got one of "
            f"{router.num_experts}"
        )
    if given is not None and given != router.top_k:
        raise ValueError(f"expected top_k = {router.top_k}, the router's own, got {given}")
    return router.top_k


def check_able(experts: Sequence[Expert], able: bool | None = None) -> None:
    """Raise ``ValueError`` unless an expert works without hidden states."""
    if able is None:
        able = not all(expert.needs_hidden_states for expert in experts)
    if not able:
        raise ValueError(
            "expected an expert that works without hidden states, which are not kept where a cache "
            f"is compressed again, got {', '.join(expert.name for expert in experts)}"
        )

"""What a press was asked for: a frozen, checked record, which knows nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moekv import ops
from moekv.budget import BUDGETS, check_ratio
from moekv.calibration.router import CalibratedRouter
from moekv.experts.base import Expert
from moekv.experts.registry import build_experts, expert_names
from moekv.routing.base import BaseMoERouter
from moekv.routing.registry import ROUTERS

POLICIES = ("mixture", "dominant")

SHARED_EXPERT, ROUTED_EXPERTS = "expected", ("selective", "semantic")
"""What rates a model that nobody calibrated, unless options choose something else."""


@dataclass(frozen=True)
class DecodingConfig:
    """Compress during decoding.

    Tokens are added until a head holds ``target + interval`` pairs; then pairs leave until it holds
    ``target``. With a budget over the heads of a layer or of the model these are averages over
    them, and exact as such. So decoding token by token never holds more than ``target +
    interval``, however long it goes on. A prefill, too, leaves at most ``target``.

    Parameters
    ----------
    target : int
        Pairs of a head after each compression; at least 1.
    interval : int
        Tokens between two compressions; at least 1. The more, the less a token pays for them, and
        the more queries (at most the press's ``window``) have a say.

    Raises
    ------
    ValueError
        If one is no integer or less than 1.
    """

    target: int = 2048
    interval: int = 512

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("target", "interval"):
            check_count(name, getattr(self, name), 1)


@dataclass(frozen=True)
class Routing:
    """Which experts rate, and how they are chosen: what routers and statistics depend on.

    Attributes
    ----------
    experts : tuple of Expert, or None
        None: ``num_experts="auto"``, as many as the model's shape asks for.
    router_type : str or BaseMoERouter
        A key of ``ROUTERS``, or a router that every layer gets a copy of.
    top_k : int
    cache_aware : bool
    calibrated : CalibratedRouter, str or None
        A name is looked up when a block begins; ``"auto"``: the model's own, if there is one.
    own_choice : bool
        Whether options choose experts or routers; else the default's do.
    backend : str
    asked : tuple
        What the experts were built of: as long as it is the same, they are.
    """

    experts: tuple[Expert, ...] | None
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


@dataclass(frozen=True)
class Options:
    """Options of ``MoERouterPress``, see there, checked one by one and against each other.

    Attributes
    ----------
    routing : Routing
        What was said of experts and routers.
    """

    routing: Routing
    compression_ratio: float
    policy: str
    budget: str
    backend: str
    sinks: int
    recent: int
    window: int
    decoding: DecodingConfig | None
    streaming: bool

    @classmethod
    def of(cls, given: Mapping[str, Any], known: Sequence[Routing] = ()) -> Options:
        """Check what a press was given.

        Parameters
        ----------
        given : mapping
            Of every option of the press.
        known : sequence of Routing
            Whose experts are not built again where they are the same.

        Raises
        ------
        ValueError, TypeError, RuntimeError
            See ``MoERouterPress``.
        """
        check_ratio(given["compression_ratio"])
        check_choice("policy", given["policy"], POLICIES)
        check_choice("budget", given["budget"], BUDGETS)
        ops.check_backend(given["backend"])
        for name, least in (("sinks", 0), ("recent", 0), ("window", 1)):
            check_count(name, given[name], least)
        for name in ("cache_aware", "streaming"):
            check_flag(name, given[name])
        decoding = given["decoding"]
        if decoding is not None and not isinstance(decoding, DecodingConfig):
            raise TypeError(f"expected decoding a moekv.DecodingConfig, got {decoding!r}")
        if given["policy"] == "dominant":
            _check_dominant(given)
        routing = _routing(given, known)
        if decoding is not None and routing.experts is not None:
            check_able(routing.experts)
        own = {field.name for field in fields(cls)} - {"routing"}
        return cls(routing, **{name: given[name] for name in own})

    @property
    def evicts(self) -> bool:
        """Whether pairs may leave at all."""
        by_ratio = self.compression_ratio > 0
        return by_ratio or self.policy == "dominant" or self.decoding is not None


def _check_dominant(given: Mapping[str, Any]) -> None:
    if given["budget"] not in ("auto", "uniform"):
        raise ValueError(
            "expected budget 'uniform' with policy 'dominant', in which an expert says how much "
            f"each head keeps, got {given['budget']!r}"
        )
    if given["streaming"]:
        raise ValueError(
            "expected policy 'mixture' with streaming, got 'dominant', whose layers may turn out "
            "to differ in length only when the last has been rated"
        )
    if given["decoding"] is not None:
        raise ValueError(
            "expected policy 'mixture' where compression goes on during decoding or between "
            "chunks, got 'dominant', which has no budget to come back to"
        )


def _routing(given: Mapping[str, Any], known: Sequence[Routing]) -> Routing:
    names = ("num_experts", "top_k", "router_type", "experts")
    chosen = [name for name in names if given[name] is not None]
    chosen += ["policy"] if given["policy"] == "dominant" else []
    calibrated = given["router"]
    if calibrated not in (None, "auto"):
        if chosen:
            raise ValueError(
                f"expected no {' or '.join(chosen)} beside a calibrated router, which brings its "
                "own experts and gates; or router=None"
            )
        if not isinstance(calibrated, CalibratedRouter | str):
            raise TypeError(
                'expected router a moekv.CalibratedRouter, a name, "auto" or None, got '
                f"{type(calibrated).__name__}"
            )
    router_type = "pikv" if given["router_type"] is None else given["router_type"]
    top_k = 2 if given["top_k"] is None else given["top_k"]
    if not isinstance(router_type, BaseMoERouter):
        check_choice("router_type", router_type, tuple(ROUTERS))
    check_count("top_k", top_k, 1)
    listed = given["experts"]
    listed = tuple(listed) if isinstance(listed, list) else listed
    asked = bool(chosen), listed, given["num_experts"]
    same = [routing.experts for routing in known if routing.asked == asked]
    experts = same[0] if same else _experts(given, bool(chosen))
    most = len(expert_names() if experts is None else experts)
    if isinstance(router_type, BaseMoERouter):
        top_k = _top_k_of(router_type, experts, given["top_k"])
        if given["cache_aware"] and not getattr(router_type, "cache_aware", False):
            raise ValueError(
                "expected cache_aware=False beside a router of one's own without a history, got "
                "True: PiKVMoERouter(..., cache_aware=True) has one"
            )
    if top_k > most:
        raise ValueError(f"expected top_k <= num_experts = {most}, got {top_k}")
    return Routing(
        experts=experts,
        router_type=router_type,
        top_k=top_k,
        cache_aware=given["cache_aware"],
        calibrated=None if chosen else calibrated,
        own_choice=bool(chosen),
        backend=given["backend"],
        asked=asked,
    )


def _experts(given: Mapping[str, Any], chosen: bool) -> tuple[Expert, ...] | None:
    wanted: Sequence[Any]
    names = expert_names()
    num_experts = 4 if given["num_experts"] is None else given["num_experts"]
    if not chosen:
        wanted = [SHARED_EXPERT, *ROUTED_EXPERTS]
    elif given["experts"] is not None:
        wanted = given["experts"]
    elif num_experts == "auto":
        return None
    else:
        if isinstance(num_experts, str):
            raise ValueError(f'expected num_experts a number or "auto", got {num_experts!r}')
        check_count("num_experts", num_experts, 1)
        if num_experts > len(names):
            raise ValueError(
                f"expected num_experts <= {len(names)} ({', '.join(names)}), "
                f"got {num_experts}; register_expert adds more"
            )
        wanted = names[:num_experts]
    return tuple(build_experts(wanted))


def _top_k_of(router: BaseMoERouter, experts: Sequence[Expert] | None, given: int | None) -> int:
    """Experts per token of a router that is one's own, which has to fit."""
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
    """Raise ``ValueError`` unless an expert can do without hidden states."""
    if able is None:
        able = not all(expert.needs_hidden_states for expert in experts)
    if not able:
        raise ValueError(
            "expected an expert that can do without hidden states, which are gone where a cache is "
            f"compressed again, got {', '.join(expert.name for expert in experts)}"
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless a value is among the choices."""
    if value not in choices:
        raise ValueError(f"expected {name} among {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: object, least: int) -> None:
    """Raise ``ValueError`` unless a value is an integer that is large enough."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected {name} an integer >= {least}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise ``TypeError`` unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} True or False, got {value!r}")

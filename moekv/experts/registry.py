"""Experts by name.

====== ================ =========================================================
order  name             scores a pair by
====== ================ =========================================================
0      ``aggressive``   closeness to the ends, in shares of 20 % and 10 %
1      ``moderate``     closeness to the ends, in shares of 30 % and 20 %
2      ``conservative`` closeness to the ends, in shares of 50 % and 30 %
3      ``selective``    attention of the last window of queries
4      ``semantic``     how unlike the other keys its key is
5      ``temporal``     spread of its channels against what follows, and recency
6      ``expected``     attention of the text's own queries, repeated after it
====== ================ =========================================================

(``learned``, of calibrated routers, needs their weights: see ``moekv.experts.learned``.)
"""

from collections.abc import Callable, Sequence
from typing import Any

from moekv.experts.aggressive import AggressiveExpert
from moekv.experts.base import Expert
from moekv.experts.conservative import ConservativeExpert
from moekv.experts.expected import ExpectedExpert
from moekv.experts.moderate import ModerateExpert
from moekv.experts.scorer import PressExpert
from moekv.experts.selective import SelectiveExpert
from moekv.experts.semantic import SemanticExpert
from moekv.experts.temporal import TemporalExpert

_REGISTRY: dict[str, Callable[[], Expert]] = {
    "aggressive": AggressiveExpert,
    "moderate": ModerateExpert,
    "conservative": ConservativeExpert,
    "selective": SelectiveExpert,
    "semantic": SemanticExpert,
    "temporal": TemporalExpert,
    "expected": ExpectedExpert,
}


def expert_names() -> tuple[str, ...]:
    """Names in the registry, in its order."""
    return tuple(_REGISTRY)


def register_expert(name: str, factory: Callable[[], Expert]) -> None:
    """Add an expert to the end of the registry.

    Parameters
    ----------
    name : str
        For ``MoERouterPress(experts=[name])``.
    factory : callable without arguments
        Builds the expert; called once per press.

    Raises
    ------
    ValueError
        If the name is taken.
    TypeError
        If the factory cannot be called.
    """
    if name in _REGISTRY:
        raise ValueError(f"expected a new expert name, got {name!r}, which is registered")
    if not callable(factory):
        raise TypeError(f"expected a factory that returns an Expert, got {type(factory).__name__}")
    _REGISTRY[name] = factory


def build_experts(items: Sequence[Any]) -> list[Expert]:
    """Build experts from names, experts and kvpress scorers.

    Parameters
    ----------
    items : sequence
        Each a name in the registry, an :class:`Expert` or a ``kvpress.ScorerPress``.

    Returns
    -------
    list of Expert

    Raises
    ------
    ValueError
        A name is unknown, two experts share a name, or there are none.
    TypeError
        An item is none of the above.
    """
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise TypeError(f"expected experts to be a list, got {items!r}")
    experts = [_build(item) for item in items]
    names = [expert.name for expert in experts]
    if not experts or len(set(names)) < len(names):
        raise ValueError(f"expected one or more experts of different names, got {names}")
    return experts


def fitted_experts(names: Sequence[str]) -> list[Expert]:
    """Build the experts of a calibrated router, beside ``learned``.

    Parameters
    ----------
    names : sequence of str
        As of :func:`build_experts`; ``expected`` gives its scores as they are, as the router has
        offsets that are fitted to them.

    Returns
    -------
    list of Expert
    """
    return [
        ExpectedExpert(bounded=False) if name == ExpectedExpert.name else _build(name)
        for name in names
    ]


def _build(item: Any) -> Expert:
    if isinstance(item, type):
        raise TypeError(
            f"expected an expert's instance, got the class: {item.__name__}() makes one"
        )
    if isinstance(item, Expert):
        if not isinstance(getattr(item, "name", None), str) or not item.name:
            raise ValueError(f"expected an expert with a name, got {type(item).__name__} without")
        return item
    if callable(getattr(item, "score", None)):
        return PressExpert(item)
    if not isinstance(item, str):
        raise TypeError(
            "expected an expert to be a name, a moekv.Expert or a kvpress.ScorerPress, "
            f"got {type(item).__name__}"
        )
    if item not in _REGISTRY:
        raise ValueError(f"expected an expert among {', '.join(_REGISTRY)}, got {item!r}")
    expert = _REGISTRY[item]()
    if not isinstance(expert, Expert):
        raise TypeError(
            f"expected the factory of {item!r} to return an Expert, got {type(expert).__name__}"
        )
    return expert

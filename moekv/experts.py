"""Experts: strategies that rate the pairs of a layer, and the registry that names them.

====== ================ ========================================================= =========
order  name             rates a pair by                                           prior
====== ================ ========================================================= =========
0      ``aggressive``   closeness to the first 20 % and the last 10 %             -2
1      ``moderate``     closeness to the first 30 % and the last 20 %             -1
2      ``conservative`` closeness to the first 50 % and the last 30 %             0
3      ``selective``    attention that the last window of queries pays            2
4      ``semantic``     how unlike the other keys its key is                      2
5      ``temporal``     spread of its channels against what follows, and recency  1
6      ``expected``     attention that the text's own queries would pay behind it 3
====== ================ ========================================================= =========

The prior is the log-preference that a router starts with where nothing has been learned: strategies
that look at the keys come before those that look at positions alone. An expert of the user's
own has 1, the middle of what it competes with. (``learned``, of calibrated routers, needs their
weights: see ``moekv.calibrated``.)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kvpress import ScorerPress
from torch import Tensor

from moekv.budget import kept_pairs
from moekv.ops import ScoreKind
from moekv.view import LAG, LayerView


class Expert(ABC):
    """A strategy that rates the cached pairs of a layer.

    Attributes
    ----------
    name : str
        How statistics call it.
    kinds : tuple of ScoreKind
        What :meth:`scores` takes from ``view.scores_of``. All experts share one pass over the
        keys.
    prior : float
        Log-preference of a router that has learned nothing.
    comparable : bool
        Whether the scores of different heads and layers are on one scale already (an estimate of
        the log of the attention that a key will receive), so that they are taken as they are.
    finite : bool
        Whether real pairs never score infinitely (NaN aside), so that nobody has to look.
    needs_hidden_states : bool
        Whether it rates only where the hidden states of all pairs are at hand, as after a prefill.
        Where a cache goes on growing its say goes to the others.
    waits : bool
        Whether :meth:`scores` needs neither hidden states nor queries of the view nor what the
        layer's forward got, so that it can wait for further layers (``LayerView.released``).
    """

    name: str
    kinds: tuple[ScoreKind, ...] = ()
    prior: float = 1.0
    comparable: bool = False
    finite: bool = False
    needs_hidden_states: bool = False
    waits: bool = False

    def can_rate(self, view: LayerView) -> bool:
        """Say whether a view has what the expert needs."""
        return view.aligned or not self.needs_hidden_states

    @abstractmethod
    def scores(self, view: LayerView) -> Tensor:
        """Rate the pairs.

        Parameters
        ----------
        view : LayerView

        Returns
        -------
        Tensor [B, H, T], floating
            Higher is better. Unless ``comparable``, order and relative distances count: each
            head's scores are brought to mean 0 and standard deviation 1. NaN ranks last; padding is
            ignored.
        """

    def kept(self, length: int, compression_ratio: float) -> int:
        """Count the pairs of a head that stay where this expert rules a layer alone.

        Parameters
        ----------
        length : int
            Real pairs of the row.
        compression_ratio : float
            Of the press.

        Returns
        -------
        int
            At least 1.
        """
        return kept_pairs(length, compression_ratio)


class PositionExpert(Expert):
    """Keeps the beginning and the end.

    Alone, it keeps exactly the first ``int(T * first)`` and the last ``int(T * last)`` positions
    (the first one where both are 0), whatever the compression ratio. In a mixture they score 0,
    and others minus their distance from the nearer of the two regions, as a share of T.

    Parameters
    ----------
    name : str
    first, last : float
        Shares of the row, in [0, 1], at most 1 together.
    prior : float

    Raises
    ------
    ValueError
        If the shares are out of range.
    """

    finite = True
    waits = True

    def __init__(self, name: str, first: float, last: float, prior: float = 1.0) -> None:
        if not (first >= 0 and last >= 0 and first + last <= 1):
            raise ValueError(
                f"expected shares first, last >= 0 and at most 1 together, got {first} and {last}"
            )
        self.name, self.first, self.last, self.prior = name, first, last, prior
        self._rows: tuple[Any, Tensor] = (None, torch.empty(0))

    def regions(self, length: int) -> tuple[int, int]:
        """Sizes of the two regions of a row with `length` real pairs."""
        first, last = int(length * self.first), int(length * self.last)
        return (first, last) if first + last else (1, 0)

    def scores(self, view: LayerView) -> Tensor:
        """Rate by the distance from the regions, see the class."""
        # The same in every layer of a forward, most likely.
        key = view.lengths, view.keys.shape[2], view.keys.device
        if self._rows[0] != key:
            self._rows = key, torch.stack([self._row(view, length) for length in view.lengths])
        return self._rows[1][:, None].expand(view.keys.shape[:3])

    def _row(self, view: LayerView, length: int) -> Tensor:
        """Scores [T] of a row of `length` real pairs; from host numbers, so that nothing waits."""
        first, last = self.regions(length)
        num_keys = view.keys.shape[2]
        positions = torch.arange(length - num_keys, length, device=view.keys.device)
        nowhere = torch.full_like(positions, length)  # a region of no size attracts nothing
        after = (positions - first + 1).clamp(min=0) if first else nowhere
        before = (length - last - positions).clamp(min=0) if last else nowhere
        distance = torch.minimum(after, before)
        return -distance.float() / max(length, 1)

    def kept(self, length: int, compression_ratio: float) -> int:
        """Count the pairs of the two regions; the compression ratio has no say."""
        return sum(self.regions(length))


class KindExpert(Expert):
    """Rates by one of the native scores.

    Parameters
    ----------
    name : str
    kind : ScoreKind
    prior : float
    """

    finite = True
    waits = True

    def __init__(self, name: str, kind: ScoreKind, prior: float = 1.0) -> None:
        self.name, self.kinds, self.prior = name, (kind,), prior

    def scores(self, view: LayerView) -> Tensor:
        """Give the native score as it is."""
        return view.scores_of(self.kinds[0])


class TemporalExpert(Expert):
    """Rates by recency and by lag-relative information.

    ``LAG - log(1 + age / 128)``: the log of LagKV's score (a share, 1 on average), and a power law
    for the attention that falls off with age, with LagKV's partition as the unit of time.

    Parameters
    ----------
    name : str
    prior : float
    """

    kinds = (ScoreKind.LAG,)
    finite = True
    waits = True

    def __init__(self, name: str = "temporal", prior: float = 1.0) -> None:
        self.name, self.prior = name, prior
        self._decay: tuple[Any, Tensor] = (None, torch.empty(0))

    def scores(self, view: LayerView) -> Tensor:
        """Rate by spread and age, see the class."""
        key = view.keys.shape[2], view.keys.device
        if self._decay[0] != key:
            age = torch.arange(key[0] - 1, -1, -1, device=key[1])
            self._decay = key, torch.log1p(age / LAG)
        return view.scores_of(ScoreKind.LAG) - self._decay[1]


class ExpectedExpert(Expert):
    """Rates by the attention that a pair can expect, and by the size of what it then gives.

    ``log attention + 1/2 log |value|``: see ``moekv.ops.expected_attention`` for the first.
    """

    name = "expected"
    prior = 3.0
    comparable = True
    finite = True
    needs_hidden_states = True
    waits = True

    def scores(self, view: LayerView) -> Tensor:
        """Rate by attention and value, see the class."""
        # Squares are summed up in fp32. The norm itself in fp32 would take three times as long, and
        # rounding it to bf16 moves its log by 1/256 at most.
        size: Tensor = torch.linalg.vector_norm(view.values, dim=-1).float()
        return view.expected().add(size.clamp_(1e-6, 1e30).log_(), alpha=0.5)


class PressExpert(Expert):
    """Any kvpress scorer as an expert; its own ``compression_ratio`` has no say.

    Parameters
    ----------
    press : kvpress.ScorerPress
    """

    def __init__(self, press: ScorerPress) -> None:
        self.press = press
        self.name = type(press).__name__

    def scores(self, view: LayerView) -> Tensor:
        """Call the press's ``score`` with what the hook got."""
        keys, values = (
            pairs.reshape(len(view.hidden_states), -1, *pairs.shape[2:])
            for pairs in (view.keys, view.values)
        )
        scores: Tensor = self.press.score(
            view.module, view.hidden_states, keys, values, view.attentions, dict(view.kwargs)
        )
        if scores.shape != keys.shape[:3]:
            return scores
        return scores.reshape(view.keys.shape[:3])


_REGISTRY: dict[str, Callable[[], Expert]] = {
    "aggressive": lambda: PositionExpert("aggressive", 0.2, 0.1, prior=-2.0),
    "moderate": lambda: PositionExpert("moderate", 0.3, 0.2, prior=-1.0),
    "conservative": lambda: PositionExpert("conservative", 0.5, 0.3, prior=0.0),
    "selective": lambda: KindExpert("selective", ScoreKind.ATTENTION, prior=2.0),
    "semantic": lambda: KindExpert("semantic", ScoreKind.DIVERSITY, prior=2.0),
    "temporal": lambda: TemporalExpert(prior=1.0),
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
        What ``MoERouterPress(experts=[name])`` then takes.
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


def _build(item: Any) -> Expert:
    if isinstance(item, Expert):
        return item
    if isinstance(item, ScorerPress):
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

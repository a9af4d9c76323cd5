"""The base class of experts."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from moekv.budget import finite_range, kept_pairs
from moekv.experts.view import LayerView
from moekv.ops import ScoreKind
from moekv.units import kind


class Expert(ABC):
    """A method that scores the cached pairs of a layer.

    Attributes
    ----------
    name : str
        Its name in lists and statistics.
    kinds : tuple of ScoreKind
        Native scores that :meth:`scores` reads by ``view.scores_of``. All experts share one pass
        over the keys.
    comparable : bool
        Whether the scores of different heads and layers are on one scale: estimates of the log of
        the attention that a key will receive. They are then ranked over heads and layers.
    finite : bool
        Whether scores of real pairs are never infinite (NaN aside), so that no check is needed.
    needs_hidden_states : bool
        Whether it can only score where the hidden states of all pairs are known, as after a
        prefill. In a growing cache its share goes to the others.
    waits : bool
        Whether :meth:`scores` reads neither hidden states nor queries nor ``kwargs`` of the view,
        so that several layers can be scored later, together (``LayerView.released``).
    reads_choice : bool
        Whether :meth:`scores` reads ``view.expert_choice``, so that it has to be observed.
    """

    name: str
    kinds: tuple[ScoreKind, ...] = ()
    comparable: bool = False
    finite: bool = False
    needs_hidden_states: bool = False
    waits: bool = False
    reads_choice: bool = False

    def __repr__(self) -> str:
        """Name the class."""
        return f"{type(self).__name__}()"

    def can_rate(self, view: LayerView) -> bool:
        """Return whether a view has what the expert needs."""
        return view.aligned or not self.needs_hidden_states

    @abstractmethod
    def scores(self, view: LayerView) -> Tensor:
        """Score the pairs.

        Parameters
        ----------
        view : LayerView

        Returns
        -------
        Tensor [B, H, T], floating
            Pairs with higher scores are retained. Unless ``comparable``, only order and relative
            distances within a head count. NaN ranks last; a head with equal scores does not count;
            padding is ignored. Distances of scores that are very far from a head's others
            are not kept, only their order.
        """

    def kept(self, length: int, compression_ratio: float) -> int:
        """Count the pairs of a head to retain where this expert decides a layer alone.

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


def scores_by(expert: Expert, view: LayerView) -> Tensor:
    """Score a layer by an expert, with 0 if it cannot.

    Infinite scores of real pairs are brought next to the finite ones of their head: +inf above the
    highest and -inf below the lowest by their difference (by 1 where there is none). NaN stays.

    Parameters
    ----------
    expert : Expert
    view : LayerView

    Returns
    -------
    Tensor [B, H, T], float32

    Raises
    ------
    ValueError
        The expert's scores are no tensor, or have another shape, dtype or device; or they are to be
        compared over heads, and one is finite but beyond float32.
    """
    shape, device = view.keys.shape[:3], view.keys.device
    if not expert.can_rate(view):
        return torch.zeros(shape, device=device)
    scores = expert.scores(view)
    if not isinstance(scores, Tensor):
        raise ValueError(
            f"expected floating scores {list(shape)} on {device} from expert {expert.name!r}, "
            f"got {kind(scores)}"
        )
    if scores.shape != shape or scores.device != device or not scores.is_floating_point():
        raise ValueError(
            f"expected floating scores {list(shape)} on {device} from expert {expert.name!r}, "
            f"got {scores.dtype} {list(scores.shape)} on {scores.device}"
        )
    if expert.finite:
        return scores.float()
    if not expert.comparable:
        return _bounded(_told_apart(scores, view.real), view.real)
    if scores.dtype == torch.float64 and bool((scores.float().isinf() & scores.isfinite()).any()):
        raise ValueError(
            f"expected scores of expert {expert.name!r}, which are compared over heads, within "
            "float32, got larger ones of float64"
        )
    return _bounded(scores.float(), view.real)


_FAR = 100.0
"""Spreads from the middle beyond which a score of a head with extremes counts by its logarithm."""


def _told_apart(scores: Tensor, real: Tensor) -> Tensor:
    """Give scores in float32, in their order within a head, where moments of float32 would lose it.

    A spread is the median distance from the median. In heads where a score is very many spreads
    away, as where something stands for "never", or where all are very large, small or close, scores
    are counted in spreads. Those of other heads are as they were.
    """
    wide = scores.double()
    numbers = wide.masked_fill(~(wide.isfinite() & real[:, None]), torch.nan)
    middle = numbers.nanmedian(-1, keepdim=True).values.nan_to_num(0.0)
    # In halves: the distance of the largest would be infinite.
    away = (0.5 * numbers - 0.5 * middle).abs()
    spread = away.masked_fill(away == 0, torch.nan).nanmedian(-1, keepdim=True).values
    spread = spread.nan_to_num(1.0)
    largest = numbers.abs().nan_to_num(0.0).amax(-1, keepdim=True)
    farthest = away.nan_to_num(0.0).amax(-1, keepdim=True)
    odd = (farthest > _FAR**2 * spread) | (largest > 1e5 * spread) | (largest > 1e15)
    odd = odd | (spread < 1e-15)
    counted = (0.5 * wide - 0.5 * middle) / spread
    beyond = _FAR + (counted.abs() / _FAR).log().clamp(min=0.0)
    counted = torch.where(counted.abs() > _FAR, beyond.copysign(counted), counted)
    return torch.where(odd, counted, wide).float()


def _bounded(scores: Tensor, real: Tensor) -> Tensor:
    low, high = finite_range(scores, real[:, None], -1)
    step = torch.where(high > low, high - low, 1.0)
    scores = torch.where(scores == torch.inf, high + step, scores)
    return torch.where(scores == -torch.inf, low - step, scores)

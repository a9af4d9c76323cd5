"""How many pairs are retained, and the heads that share a budget."""

from fractions import Fraction
from numbers import Real
from typing import Literal, get_args

Budget = Literal["auto", "uniform", "layer", "head", "model"]
BUDGETS = get_args(Budget)
"""``"uniform"``: every head keeps the same number. ``"layer"``: pairs move between layers, each of
which keeps as many in all its heads. ``"head"``: pairs move between the heads of a layer.
``"model"``: between those of all layers. ``"auto"``: one of these, see ``MoERouterPress``.
"""
OVER_MODEL = ("layer", "model")  # those that let pairs move between layers
DENSE = ("uniform", "layer")  # those under which the heads of a layer keep as many


def kept_pairs(length: int, compression_ratio: float, gain: Fraction | int = 1) -> int:
    """Count the pairs of a head to retain: ``max(1, int(length * (1 - compression_ratio)))``.

    Parameters
    ----------
    length : int
        Real pairs, >= 0.
    compression_ratio : float
        Share of their bytes to remove, in [0, 1).
    gain : Fraction
        Pairs that can be stored in the bytes of one: more than 1 where they are quantised.

    Returns
    -------
    int
        At least 1, so that no cache is emptied; with `gain` 1 as many as in kvpress. At most all:
        where quantising makes enough room, nothing is evicted.
    """
    return max(1, min(length, int(length * (1 - compression_ratio) * gain)))


def check_ratio(compression_ratio: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a compression ratio is a number in [0, 1)."""
    if not isinstance(compression_ratio, Real):
        raise TypeError(
            f"expected compression_ratio a number, got {type(compression_ratio).__name__} "
            f"{compression_ratio!r}"
        )
    if not 0 <= compression_ratio < 1:
        raise ValueError(
            f"expected compression_ratio in [0, 1), the share of bytes to remove, "
            f"got {compression_ratio}"
        )

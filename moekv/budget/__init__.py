"""How many pairs stay, and which.

``size`` counts the pairs of a head by the ratio and names the budgets; ``kept`` is what stays of a
layer; ``selection`` chooses it after a prefill, ``grown`` where heads have come to hold different
numbers, ``layers`` under any budget; ``protection`` serves top-ks that are not ours.

May import ``moekv.ops``.
"""

from moekv.budget.grown import Grown, select_grown
from moekv.budget.kept import Kept, without_padding
from moekv.budget.layers import choose
from moekv.budget.protection import finite_range, protect
from moekv.budget.selection import select, select_over_layers, split_layers
from moekv.budget.size import BUDGETS, DENSE, OVER_MODEL, Budget, check_ratio, kept_pairs

__all__ = [
    "BUDGETS",
    "DENSE",
    "OVER_MODEL",
    "Budget",
    "Grown",
    "Kept",
    "check_ratio",
    "choose",
    "finite_range",
    "kept_pairs",
    "protect",
    "select",
    "select_grown",
    "select_over_layers",
    "split_layers",
    "without_padding",
]

"""Counts the pairs to retain, and selects them.

``size`` counts the pairs of a head by the ratio and names the budgets; ``kept`` has the retained
pairs of a layer; ``selection`` selects them after a prefill, ``grown`` where heads hold different
numbers, ``layers`` under any budget; ``protection`` prepares scores for the top-k of other code.

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

"""The expert ``semantic``."""

from moekv.experts.kinds import KindExpert
from moekv.ops import ScoreKind


class SemanticExpert(KindExpert):
    """Scores by the distance of a pair's key from the others (KeyDiff, Park et al., 2025)."""

    name = "semantic"
    kinds = (ScoreKind.DIVERSITY,)

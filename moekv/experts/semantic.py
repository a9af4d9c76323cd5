"""The expert ``semantic``."""

from moekv.experts.kinds import KindExpert
from moekv.ops import ScoreKind


class SemanticExpert(KindExpert):
    """Rates by how unlike the other keys a pair's is (KeyDiff, Park et al., 2025)."""

    name = "semantic"
    kinds = (ScoreKind.DIVERSITY,)

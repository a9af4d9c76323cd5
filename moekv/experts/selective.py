"""The expert ``selective``."""

from moekv.experts.kinds import KindExpert
from moekv.ops import ScoreKind


class SelectiveExpert(KindExpert):
    """Scores by the attention of the last window of queries (SnapKV, Li et al., 2024)."""

    name = "selective"
    kinds = (ScoreKind.ATTENTION,)

"""The expert ``selective``."""

from moekv.experts.kinds import KindExpert
from moekv.ops import ScoreKind


class SelectiveExpert(KindExpert):
    """Rates by the attention that the last window of queries pays (SnapKV, Li et al., 2024)."""

    name = "selective"
    kinds = (ScoreKind.ATTENTION,)

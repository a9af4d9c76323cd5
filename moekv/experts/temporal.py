"""The expert ``temporal``."""

from typing import Any

import torch
from torch import Tensor

from moekv.experts.base import Expert
from moekv.experts.view import LAG, LayerView
from moekv.ops import ScoreKind


class TemporalExpert(Expert):
    """Scores by recency and by lag-relative information.

    ``LAG - log(1 + age / 128)``: the log of LagKV's score (a share, 1 on average), and a power law
    for the attention that falls off with age, with LagKV's partition as the unit of time.
    """

    name = "temporal"
    kinds = (ScoreKind.LAG,)
    finite = True
    waits = True

    def __init__(self) -> None:
        self._decay: tuple[Any, Tensor] = (None, torch.empty(0))

    def scores(self, view: LayerView) -> Tensor:
        """Score by spread and age, see the class."""
        key = view.keys.shape[2], view.keys.device
        known, decay = self._decay
        if known != key:
            age = torch.arange(key[0] - 1, -1, -1, device=key[1])
            decay = torch.log1p(age / LAG)
            self._decay = key, decay
        return view.scores_of(ScoreKind.LAG) - decay

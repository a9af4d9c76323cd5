"""Any kvpress scorer as an expert."""

from typing import Any

from torch import Tensor

from moekv.experts.base import Expert
from moekv.experts.view import LayerView


class PressExpert(Expert):
    """Any kvpress scorer as an expert; its own ``compression_ratio`` is not used.

    Parameters
    ----------
    press : kvpress.ScorerPress
        Any object with a method ``score``: kvpress is not imported here.
    """

    def __init__(self, press: Any) -> None:
        self.press = press
        self.name = type(press).__name__

    def scores(self, view: LayerView) -> Tensor:
        """Call the press's ``score`` with the arguments of the hook."""
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

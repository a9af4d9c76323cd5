"""The base class of experts that score by one of the native scores."""

from torch import Tensor

from moekv.experts.base import Expert
from moekv.experts.view import LayerView


class KindExpert(Expert):
    """Scores by the one native score in ``kinds``."""

    finite = True
    waits = True

    def scores(self, view: LayerView) -> Tensor:
        """Return the native score as it is."""
        return view.scores_of(self.kinds[0])

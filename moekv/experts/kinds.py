"""What experts that rate by one of the native scores have in common."""

from torch import Tensor

from moekv.experts.base import Expert
from moekv.experts.view import LayerView


class KindExpert(Expert):
    """Rates by the one native score in ``kinds``."""

    finite = True
    waits = True

    def scores(self, view: LayerView) -> Tensor:
        """Return the native score as it is."""
        return view.scores_of(self.kinds[0])

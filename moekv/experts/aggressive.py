"""The expert ``aggressive``: the first 20 % of a row and the last 10 %."""

from moekv.experts.position import PositionExpert


class AggressiveExpert(PositionExpert):
    """Retains the first 20 % and the last 10 %, see `PositionExpert`."""

    def __init__(self) -> None:
        super().__init__("aggressive", first=0.2, last=0.1)

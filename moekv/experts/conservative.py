"""The expert ``conservative``: the first 50 % of a row and the last 30 %."""

from moekv.experts.position import PositionExpert


class ConservativeExpert(PositionExpert):
    """Retains the first 50 % and the last 30 %, see `PositionExpert`."""

    def __init__(self) -> None:
        super().__init__("conservative", first=0.5, last=0.3)

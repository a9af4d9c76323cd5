"""The expert ``moderate``: the first 30 % of a row and the last 20 %."""

from moekv.experts.position import PositionExpert


class ModerateExpert(PositionExpert):
    """Retains the first 30 % and the last 20 %, see `PositionExpert`."""

    def __init__(self) -> None:
        super().__init__("moderate", first=0.3, last=0.2)

"""Memory of a calibration, and the number of layers that are fitted at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moekv.calibration.config import CalibrationConfig
from moekv.calibration.ridge import num_features
from moekv.calibration.router import CalibratedRouter
from moekv.units import size

MEMORY = 8 << 30
"""Bytes that a calibration may hold beside the model, unless another number is given."""

JUDGED = 512
"""Tokens of a held-out text, at most."""

MAX_HELD_OUT = 16
"""Held-out texts, at most."""

_SOLVING = 5  # float64 copies of one layer's normal equations, at most


@dataclass(frozen=True)
class Needs:
    """Memory and disk space of a calibration, beside the model and its cache.

    The normal equations of a layer grow with the square of the hidden size. Where those of all
    layers are too large, the texts are read once for each group of layers.
    """

    groups: Sequence[range]  # of layers that are fitted together
    memory: int  # bytes, at the highest
    disk: int  # bytes of the checkpoint

    def __str__(self) -> str:
        """Describe them in a line."""
        layers = self.groups[-1].stop
        text = f"up to {size(self.memory)} beside the model"
        if len(self.groups) > 1:
            most = max(map(len, self.groups))
            text += (
                f", at most {most} of {layers} layers at a time: every text is read "
                f"{len(self.groups)} times"
            )
        return f"{text}; a checkpoint of {size(self.disk)}"


def calibration_needs(
    router: CalibratedRouter,
    config: CalibrationConfig,
    *,
    itemsize: int,
    memory: int = MEMORY,
) -> Needs:
    """Compute the memory of a calibration, and divide the layers into groups that fit.

    Parameters
    ----------
    router : CalibratedRouter
        The one to fit: its layers, heads, experts and sizes count.
    config : CalibrationConfig
    itemsize : int
        Bytes of a number of the hidden states.
    memory : int
        Most bytes that it may take.

    Returns
    -------
    Needs

    Raises
    ------
    ValueError
        One layer at a time takes more.
    """
    layers, hidden, heads = len(router.layers), router.width, router.num_kv_heads
    width = num_features(router)
    equations = 4 * config.domains * width * (width + heads)
    solving = _SOLVING * 8 * width * width
    reading = 3 * config.length * hidden * itemsize  # inputs of two passes, and what is kept
    numbers = 4 * heads * (len(router.experts) + 1)  # of the experts, novelty and target
    tokens = config.samples + (MAX_HELD_OUT * JUDGED if config.held_out else 0)
    sample = tokens * layers * (hidden * itemsize + numbers)
    gates = tokens * layers * numbers + 3 * JUDGED * layers * hidden * 4
    fixed = sample + max(solving, gates)
    each = equations + reading
    if fixed + each > memory:
        raise ValueError(
            f"expected a memory of {size(fixed + each)} or more, got {size(memory)}: the gates' "
            f"{config.samples} samples and the held-out texts alone take {size(sample)}, fewer "
            "samples less"
        )
    most = min((memory - fixed) // each, layers)
    count = -(-layers // most)
    ends = [layers * number // count for number in range(count + 1)]
    groups = [range(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    most = max(map(len, groups))
    return Needs(groups, fixed + most * each, layers * equations + sample)

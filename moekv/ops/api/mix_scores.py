"""The op ``mix_scores``."""

import torch
from torch import Tensor

from moekv.ops import checks
from moekv.ops.backends import implementation
from moekv.ops.registration import register


def mix_scores(
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Mix the experts' scores by the gate's choice, each mapped to the common scale first.

    ``mixed = sum over j of weights[j] * (gain * scores[experts[j]] + offset)``, where gain and
    offset are those of the chosen expert. A term with weight 0 adds nothing, whatever its score.

    Parameters
    ----------
    scores : Tensor [E, B, H, T], float32
    weights : Tensor [B, T, k] or [B, H, T, k], float32
        Without H the heads share them.
    experts : Tensor, int32
        Shape of ``weights``; values in [0, E).
    gain, offset : Tensor [E, B, H], float32, optional
        None: 1 and 0.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``scores``.

    Returns
    -------
    Tensor [B, H, T], float32

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``scores`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.
    """
    op = implementation("mix_scores", scores, backend)
    mixed: Tensor = op(scores, weights, experts, gain, offset)
    return mixed


def _fake(
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    checks.native("mix_scores", "scores", scores)
    checks.mix_scores(scores, weights, experts, gain, offset)
    return scores.new_empty(scores.shape[1:], dtype=torch.float32)


register("mix_scores", _fake)

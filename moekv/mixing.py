"""One scale for the scores of all experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moekv.budget import finite_range
from moekv.experts import Expert
from moekv.view import LayerView


def scores_by(expert: Expert, view: LayerView) -> Tensor:
    """Let an expert rate a layer, if it can; otherwise scores are 0.

    Infinite scores of real pairs are brought next to the finite ones of their head: +inf above the
    highest and -inf below the lowest by their difference (by 1 where there is none). NaN stays.

    Parameters
    ----------
    expert : Expert
    view : LayerView

    Returns
    -------
    Tensor [B, H, T], float32

    Raises
    ------
    ValueError
        The expert's scores have another shape, dtype or device.
    """
    shape, device = view.keys.shape[:3], view.keys.device
    if not expert.can_rate(view):
        return torch.zeros(shape, device=device)
    scores = expert.scores(view)
    if scores.shape != shape or scores.device != device or not scores.is_floating_point():
        raise ValueError(
            f"expected floating scores {list(shape)} on {device} from expert {expert.name!r}, "
            f"got {scores.dtype} {list(scores.shape)} on {scores.device}"
        )
    scores = scores.float()
    return scores if expert.finite else _bounded(scores, view.real)


def together(rows: Sequence[Tensor]) -> Tensor:
    """Put the rows of several batches below each other; those of one stay where they are."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def _bounded(scores: Tensor, real: Tensor) -> Tensor:
    low, high = finite_range(scores, real[:, None], -1)
    step = torch.where(high > low, high - low, 1.0)
    scores = torch.where(scores == torch.inf, high + step, scores)
    return torch.where(scores == -torch.inf, low - step, scores)


def common_scale(
    experts: Sequence[Expert], scores: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Find the affine maps that bring every head's scores to mean 0 and standard deviation 1.

    Without calibration nothing is known of what a score is worth, so that its spread over the real
    pairs is taken for the unit. Constant scores say nothing: they become 0. NaN does not count.
    Scores of comparable experts stay as they are.

    Parameters
    ----------
    experts : sequence of E Expert
    scores : Tensor [E, B, H, T], float32
    real : Tensor [B, T], bool, or None
        None: all pairs are real.

    Returns
    -------
    gain, offset : Tensor [E, B, H], float32
        As ``moekv.ops.mix_scores`` takes them.
    """
    counting = scores.nan_to_num(0.0, 0.0, 0.0)
    counted = counting == scores
    if real is not None:
        counted &= real[:, None]
        counting = counting.where(counted, 0.0)
    number = counted.sum(-1).clamp(min=1)
    mean = counting.sum(-1) / number
    # What does not count deviates by the mean.
    square = (counting - mean[..., None]).square_().sum(-1)
    square -= (scores.shape[-1] - number) * mean.square()
    std = (square.clamp(min=0) / number).sqrt()
    # Equal numbers differ from their rounded mean by less than this.
    noise = 1e-6 * counting.abs().amax(-1)
    gain = torch.where(std > noise, 1 / std, 0.0)
    offset = -mean * gain
    for index, expert in enumerate(experts):
        if expert.comparable:
            gain[index], offset[index] = 1.0, 0.0
    return gain, offset

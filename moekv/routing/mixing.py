"""One scale for the scores of all experts."""

from collections.abc import Sequence

import torch
from torch import Tensor


def together(rows: Sequence[Tensor]) -> Tensor:
    """Put the rows of several batches below each other; those of one stay where they are."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def common_scale(
    comparable: Sequence[bool], scores: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Find the affine maps that bring every head's scores to mean 0 and standard deviation 1.

    Without calibration nothing is known of what a score is worth, so that its spread over the real
    pairs is taken for the unit. Constant scores say nothing: they become 0. NaN does not count.
    Scores of comparable experts stay as they are.

    Parameters
    ----------
    comparable : sequence of E bool
        Which experts' scores stay as they are.
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
    for index, stays in enumerate(comparable):
        if stays:
            gain[index], offset[index] = 1.0, 0.0
    return gain, offset

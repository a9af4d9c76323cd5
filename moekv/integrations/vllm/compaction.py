"""Moves the retained pairs of a prompt together, to pages that are retained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekv import ops
from moekv.integrations.vllm.options import Gap, ServingOptions
from moekv.integrations.vllm.pages import Pages


@dataclass(frozen=True)
class Kept:
    """The pages that the heads of some layers keep of a prompt.

    Attributes
    ----------
    pages : Tensor [L, H, most], int64
        Whole ones, in the text's order.
    counts : Tensor [L, H], int64
        Of each head; its further pages mean nothing.
    """

    pages: Tensor
    counts: Tensor


def page_counts(scores: Tensor, kept: int, block_size: int, *, sinks: int, window: int) -> Tensor:
    """Share pages among heads, by one threshold over all of them.

    Parameters
    ----------
    scores : Tensor [R, T], float32
        Of R heads and T pairs, whole pages.
    kept : int
        Pages of a head, on average.
    block_size : int
    sinks, window : int
        First and last pairs that every head keeps.

    Returns
    -------
    Tensor [R], int64
        From 1 to all; exactly ``R * kept`` in sum. A head has at least the whole pages that the
        threshold gives it; what is left goes to those that miss least of one more.
    """
    rows = len(scores)
    _, offsets = ops.select_kept(
        scores[None], total=rows * kept * block_size, sinks=sinks, window=window, floor=block_size
    )
    pairs = offsets.diff().long()
    counts = pairs // block_size
    missing = pairs - counts * block_size
    left = rows * kept - int(counts.sum())
    counts[missing.sort(descending=True, stable=True).indices[:left]] += 1
    return counts


def choose(
    scores: Tensor, gap: Gap, block_size: int, rest: int, options: ServingOptions
) -> tuple[Tensor, Tensor]:
    """Choose the pairs of a prompt to retain.

    Parameters
    ----------
    scores : Tensor [R, T], float32
        Of R heads; those of the first ``gap.full`` blocks are used.
    gap : Gap
    block_size : int
    rest : int
        Tokens of the prompt behind these blocks, which stay anyway.
    options : ServingOptions

    Returns
    -------
    indices : Tensor [n], int64
        Positions, ascending in each head, heads in order.
    counts : Tensor [R], int64
        Pages of each head.
    """
    scores = scores[:, : gap.full * block_size].contiguous()
    sinks, window = options.sinks, max(0, options.recent - rest)
    if options.budget == "model":
        counts = page_counts(scores, gap.kept, block_size, sinks=sinks, window=window)
    else:
        counts = torch.full((len(scores),), gap.kept)
    totals = (counts * block_size).tolist()
    indices, _ = ops.select_kept(scores[:, None], total=totals, sinks=sinks, window=window)
    return indices.long(), counts


def compact(pages: Pages, blocks: Tensor, gap: Gap, indices: Tensor, counts: Tensor) -> Kept:
    """Move the retained pairs to pages of the retained blocks.

    Those are the last of the whole blocks, which are nobody else's. A head's pairs go to pages of
    its own as far as these reach, and then to those that other heads leave free. All pairs are read
    before the first is written.

    Parameters
    ----------
    pages : Pages
        Of L layers of H heads.
    blocks : Tensor [gap.full or more]
        Of the request.
    gap : Gap
    indices, counts : Tensor
        See :func:`choose`, for the heads of all layers.

    Returns
    -------
    Kept
    """
    size = pages.block_size
    source = pages.of(blocks[: gap.full]).flatten(0, 1)  # [R, full]
    heads = torch.arange(len(counts)).repeat_interleave(counts * size)
    keys, values = pages.read(source[heads, indices // size], indices % size)
    own = source[:, gap.start :]
    column = torch.arange(max(gap.kept, int(counts.max())))
    has = column < counts[:, None]  # [R, most]
    table = own.new_zeros(has.shape)
    table[:, : gap.kept] = own
    spare = own[~has[:, : gap.kept]]
    table[has & (column >= gap.kept)] = spare
    pages.write(table[has], keys, values)
    shape = len(pages.first), pages.num_heads
    return Kept(table.view(*shape, -1), counts.view(shape))

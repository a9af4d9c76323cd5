"""Moves the retained pairs of a prompt together, to pages that are retained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekv import ops
from moekv.integrations.vllm.options import Gap, ServingOptions
from moekv.integrations.vllm.pages import Pages
from moekv.integrations.vllm.rating import Scores


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

    def before(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Put these pages before those of later blocks [L, H, n].

        Returns
        -------
        pages : Tensor [L, H, W], int64
            Ending together: what stands before a head's means nothing.
        start : Tensor [L * H], int32
            Where each head's begin.
        """
        most, later = self.pages.shape[2], blocks.shape[2]
        table = blocks.new_zeros(*blocks.shape[:2], most + later)
        column = torch.arange(most)
        missing = most - self.counts[..., None]
        table[..., :most][column >= missing] = self.pages[column < self.counts[..., None]]
        table[..., most:] = blocks
        return table, missing.flatten().int()


def page_counts(
    scores: Tensor,
    kept: int,
    block_size: int,
    *,
    sinks: int,
    window: int,
    start: Tensor | None = None,
) -> Tensor:
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
    start : Tensor [R], int32, optional
        Where each head's pairs begin, if some have fewer.

    Returns
    -------
    Tensor [R], int64
        From 1 to all; exactly ``R * kept`` in sum. A head has at least the whole pages that the
        threshold gives it; what is left goes to those that miss least of one more.
    """
    rows = len(scores)
    _, offsets = ops.select_kept(
        scores[None],
        None if start is None else start[None],
        total=rows * kept * block_size,
        sinks=sinks,
        window=window,
        floor=block_size,
    )
    pairs = offsets.diff().long()
    counts = pairs // block_size
    missing = pairs - counts * block_size
    left = rows * kept - int(counts.sum())
    counts[missing.sort(descending=True, stable=True).indices[:left]] += 1
    return counts


def choose(
    scores: Tensor,
    gap: Gap,
    block_size: int,
    rest: int,
    options: ServingOptions,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the pairs to retain of those that a request holds.

    Parameters
    ----------
    scores : Tensor [R, T], float32
        Of R heads.
    gap : Gap
    block_size : int
    rest : int
        Tokens behind these pairs, which are retained anyway.
    options : ServingOptions
    start : Tensor [R], int32, optional
        Where each head's pairs begin, if some have fewer.

    Returns
    -------
    indices : Tensor [n], int64
        In rows of ``scores``, ascending in each head, heads in order.
    counts : Tensor [R], int64
        Pages of each head.
    """
    sinks, window = options.sinks, max(0, options.recent - rest)
    if options.budget == "model":
        counts = page_counts(scores, gap.kept, block_size, sinks=sinks, window=window, start=start)
    else:
        counts = torch.full((len(scores),), gap.kept)
    totals = (counts * block_size).tolist()
    indices, _ = ops.select_kept(
        scores[:, None],
        None if start is None else start[:, None],
        total=totals,
        sinks=sinks,
        window=window,
    )
    return indices.long(), counts


def compact(
    pages: Pages, scores: Scores, source: Tensor, own: Tensor, indices: Tensor, counts: Tensor
) -> Kept:
    """Move the retained pairs to pages of the retained blocks, with their scores.

    Those are the last of the whole blocks, which are nobody else's. A head's pairs go to pages of
    its own as far as these reach, and then to those that other heads leave free. All pairs are read
    before the first is written.

    Parameters
    ----------
    pages : Pages
    scores : Scores
    source : Tensor [L, H, W], int64
        Pages that the heads of L layers hold.
    own : Tensor [L, H, k], int64
        Pages of the retained blocks.
    indices, counts : Tensor
        See :func:`choose`, for these heads.

    Returns
    -------
    Kept
    """
    size, shape = pages.block_size, own.shape[:2]
    source, own = source.flatten(0, 1), own.flatten(0, 1)
    heads = torch.arange(len(counts)).repeat_interleave(counts * size)
    from_pages, places = source[heads, indices // size], indices % size
    keys, values = pages.read(from_pages, places)
    kept = own.shape[1]
    column = torch.arange(max(kept, int(counts.max())))
    has = column < counts[:, None]  # [R, most]
    table = own.new_zeros(has.shape)
    table[:, :kept] = own
    spare = own[~has[:, :kept]]
    table[has & (column >= kept)] = spare
    scores.move(from_pages, places, table[has])
    pages.write(table[has], keys, values)
    return Kept(table.view(*shape, -1), counts.view(shape))

"""The retained pairs of a layer."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Kept:
    """Positions that the heads of a layer retain.

    Attributes
    ----------
    indices : Tensor [n], int32
        Ascending within each head, heads in order.
    offsets : Tensor [B * H + 1], int32
        Where each head begins in `indices`.
    shape : tuple of int
        (B, H, T).
    per_head : int or None
        Pairs of each head, where all heads retain as many, of rows without padding.
    """

    indices: Tensor
    offsets: Tensor
    shape: tuple[int, int, int]
    per_head: int | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, count: int | None = None) -> "Kept":
        """Retain what is True in a mask [B, H, T].

        `count`: how much that is, where it is known; None: waits for the device.
        """
        batch, num_heads, num_keys = mask.shape
        if count is None:
            indices = mask.nonzero()[:, 2].int()
        else:  # each goes to its place, and what is False behind them all
            flat = mask.flatten()
            target = torch.where(flat, flat.cumsum(0) - 1, count)
            position = torch.arange(num_keys, dtype=torch.int32, device=mask.device)
            position = position.expand(mask.shape).flatten()
            indices = position.new_empty(count + 1).scatter_(0, target, position)[:count]
        offsets = functional.pad(mask.sum(-1).flatten().cumsum(0), (1, 0)).int()
        return cls(indices, offsets, (batch, num_heads, num_keys))

    @classmethod
    def everything(cls, shape: tuple[int, int, int], real: Tensor | None, device: Any) -> "Kept":
        """Retain all real pairs [B, H or 1, T]; None: all. Waits for the device if any."""
        batch, num_heads, num_keys = shape
        if real is not None:
            return cls.from_mask(real.expand(shape))
        heads = batch * num_heads
        indices = torch.arange(num_keys, dtype=torch.int32, device=device).repeat(heads)
        offsets = torch.arange(heads + 1, dtype=torch.int32, device=device) * num_keys
        return cls(indices, offsets, shape)

    def rows(self) -> Tensor:
        """Return the kept pairs' numbers in the flat layer [B * H * T]: int64 [n]."""
        batch, num_heads, num_keys = self.shape
        begin = torch.arange(batch * num_heads, device=self.indices.device) * num_keys
        if self.per_head is not None:
            return (self.indices.view(-1, self.per_head) + begin[:, None]).flatten()
        # The size is known, so nothing waits for the device.
        return self.indices + begin.repeat_interleave(
            self.offsets.diff(), output_size=len(self.indices)
        )

    def mask(self, rows: Tensor | None = None) -> Tensor:
        """Mark the kept positions: [B, H, T] bool. `rows`: those of :meth:`rows`, if known."""
        batch, num_heads, num_keys = self.shape
        mask = self.indices.new_zeros(batch * num_heads * num_keys, dtype=torch.bool)
        mask[self.rows() if rows is None else rows] = True
        return mask.view(self.shape)

    def of_heads(self, own: slice) -> "Kept":
        """Take some of each row's heads. Waits for the device if it takes not all."""
        batch, num_heads, num_keys = self.shape
        first, last, _ = own.indices(num_heads)
        if (first, last) == (0, num_heads):
            return self
        bounds = self.offsets.tolist()
        rows = range(0, batch * num_heads, num_heads)
        indices = [self.indices[bounds[row + first] : bounds[row + last]] for row in rows]
        ends = self.counts()[:, first:last].flatten().cumsum(0, dtype=torch.int32)
        offsets = functional.pad(ends, (1, 0))
        return replace(
            self, indices=torch.cat(indices), offsets=offsets, shape=(batch, last - first, num_keys)
        )

    def counts(self) -> Tensor:
        """Count the pairs of each head: [B, H]."""
        return self.offsets.diff().view(self.shape[:2])

    def within(self, held: "Kept") -> "Kept":
        """Say by places among held pairs what stays of them, as a layer shows what it holds.

        Parameters
        ----------
        held : Kept
            Of the same layer. What stays is part of it.

        Returns
        -------
        Kept
            Of the longest head's length, the pairs of a shorter one at its right. Waits for the
            device.
        """
        batch, num_heads, _ = self.shape
        counts = held.offsets.diff()
        longest = int(counts.max())
        row = torch.searchsorted(held.rows(), self.rows())  # both ascend
        shift = (longest - counts - held.offsets[:-1]).repeat_interleave(
            self.offsets.diff(), output_size=len(row)
        )
        return replace(self, indices=(row + shift).int(), shape=(batch, num_heads, longest))

    def share(self) -> Tensor:
        """Share of each row's heads that retain a position: [B, T] float32."""
        batch, num_heads, num_keys = self.shape
        place = self.indices
        if batch > 1:
            place = place + self.rows() // (num_heads * num_keys) * num_keys
        counts = torch.zeros(batch * num_keys, dtype=torch.float32, device=place.device)
        counts.index_add_(0, place, counts.new_ones(()).expand(len(place)))
        return counts.view(batch, num_keys).div_(num_heads)


def without_padding(kept: Kept, start: Tensor | None, lengths: Iterable[int]) -> Kept:
    """Remove padding, which only heads without real pairs retain. Waits for the device if any do.

    Parameters
    ----------
    kept : Kept
    start : Tensor [B] or [B, H], int32, or None
        Padding at the left of each row or head.
    lengths : iterable of int
        Real pairs of each row or head.

    Returns
    -------
    Kept
    """
    if start is None or all(lengths):
        return kept
    device = kept.indices.device
    start = start.to(device).view(len(start), -1, 1)
    return Kept.from_mask(kept.mask() & (torch.arange(kept.shape[2], device=device) >= start))

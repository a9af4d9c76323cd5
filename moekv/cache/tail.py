"""Pairs of the tokens since a compression, as dense tensors in the model's dtype.

Rows of a batch may be compressed one by one. Then tokens of the others wait at the beginning of the
tail, as they are, for their own row's compression.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekv.cache.buffers import append
from moekv.devices import send


class Tail:
    """Buffers of keys and values that grow, empty at first.

    Parameters
    ----------
    heads : sequence of two ints
        Rows of the batch, B, and KV heads, H.
    key, value : Tensor [..., D] and [..., Dv]
        Of the sizes, dtypes and device of what is to come.

    Attributes
    ----------
    length : int
        Tokens, S.
    waiting : int
        The first of them, which some row had when another one was compressed: part of the context.
    skips : Tensor [B], int64, or None
        How many of these each row does not have here: it has stored them, or they have left. None:
        none wait.
    """

    def __init__(self, heads: Sequence[int], key: Tensor, value: Tensor) -> None:
        self.length = self.waiting = 0
        self.skips: Tensor | None = None
        self._skipped: list[int] | None = None  # the same, once the host knows
        self._keys = key.new_empty((*heads, 0, key.shape[-1]))
        self._values = value.new_empty((*heads, 0, value.shape[-1]))

    @property
    def keys(self) -> Tensor:
        """The keys, [B, H, S, D]."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """The values, [B, H, S, Dv]."""
        return self._values[:, :, : self.length]

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """The buffers of keys and values, spare capacity included."""
        return self._keys, self._values

    @property
    def room(self) -> int:
        """Tokens that the buffers can hold."""
        return self._keys.shape[2]

    def append(self, keys: Tensor, values: Tensor, most: int | None) -> None:
        """Take in the pairs of new tokens [B, H, Q, D] and [B, H, Q, Dv], see ``append``."""
        self._keys = append(self._keys, self.length, keys, most)
        self._values = append(self._values, self.length, values, most)
        self.length += keys.shape[2]

    @property
    def skipped(self) -> list[int]:
        """How many of the waiting tokens each row lacks. Waits for the device if rows are new."""
        if self.skips is None:
            return [0] * len(self._keys)
        if self._skipped is None:
            self._skipped = self.skips.tolist()
        return self._skipped

    def seen(self) -> Tensor | None:
        """Mark the tokens that each row has here: [B, 1, 1, S] bool; None: all have all."""
        if self.skips is None:
            return None
        place = torch.arange(self.length, device=self.skips.device)
        return place >= self.skips[:, None, None, None]

    def lack(self, rows: Sequence[int]) -> None:
        """Take from some rows all tokens; those of others wait. What no row has is forgotten."""
        skipped = [self.length if b in rows else n for b, n in enumerate(self.skipped)]
        self.wait(self.length, send(skipped, self._keys.device))
        self._skipped = skipped
        self.trim()

    def trim(self) -> None:
        """Forget what no row has. Waits for the device if rows are new."""
        if self.skips is None or not (gone := min(self.skipped, default=0)):
            return
        if gone < self.length:  # or their memory is that of the next ones
            self._keys, self._values = (x[:, :, gone:].clone() for x in (self.keys, self.values))
        self.length, waiting = self.length - gone, self.waiting - gone
        self.wait(waiting, self.skips - gone if waiting else None)

    def wait(self, tokens: int, skips: Tensor | None) -> None:
        """Have the first tokens wait: see the class."""
        self.waiting, self.skips, self._skipped = tokens, skips, None

    def put_back(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Hold the first pairs of what was held once."""
        self.length = length
        self._keys, self._values = keys[:, :, :length], values[:, :, :length]

    def forget(self, count: int) -> None:
        """Drop the last tokens. What comes next goes elsewhere: views of these stay as they are."""
        self.length -= count
        self._keys, self._values = self.keys, self.values
        if self.waiting > self.length:  # cropped into the context
            skips = None if self.skips is None else self.skips.clamp(max=self.length)
            self.wait(self.length, skips if self.length else None)

    def __copy__(self) -> Tail:
        """Copy the tokens as well, behind which each will have its own."""
        tail = Tail(self._keys.shape[:2], self._keys, self._values)
        tail.__dict__ |= self.__dict__
        tail._keys, tail._values = self.keys.clone(), self.values.clone()
        return tail

    def select(self, rows: Tensor) -> None:
        """Copy rows of the batch, in their order."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        if self.skips is not None:
            self.skips, self._skipped = self.skips[rows.to(self.skips.device)], None

    def move(self, device: torch.device | str) -> None:
        """Move the buffers to a device."""
        self._keys = self._keys.to(device, non_blocking=True)
        self._values = self._values.to(device, non_blocking=True)

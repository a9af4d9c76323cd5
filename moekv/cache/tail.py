"""Pairs of the tokens since a compression, as dense tensors in the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekv.cache.buffers import append


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
    """

    def __init__(self, heads: Sequence[int], key: Tensor, value: Tensor) -> None:
        self.length = 0
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

    def put_back(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Hold the first pairs of what was held once."""
        self.length = length
        self._keys, self._values = keys[:, :, :length], values[:, :, :length]

    def forget(self, count: int) -> None:
        """Drop the last tokens. What comes next goes elsewhere: views of these stay as they are."""
        self.length -= count
        self._keys, self._values = self.keys, self.values

    def __copy__(self) -> Tail:
        """Copy the tokens as well, behind which each will have its own."""
        tail = Tail(self._keys.shape[:2], self._keys, self._values)
        tail.length, tail._keys, tail._values = self.length, self.keys.clone(), self.values.clone()
        return tail

    def select(self, rows: Tensor) -> None:
        """Copy rows of the batch, in their order."""
        self._keys, self._values = self._keys[rows], self._values[rows]

    def move(self, device: torch.device | str) -> None:
        """Move the buffers to a device."""
        self._keys = self._keys.to(device, non_blocking=True)
        self._values = self._values.to(device, non_blocking=True)

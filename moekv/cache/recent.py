"""The last inputs and queries of an attention layer, held beside its cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moekv.cache.buffers import writable
from moekv.devices import send


class RecentStates:
    """A ring of hidden states and queries of the last tokens.

    It belongs to a cache layer, whose rows it follows when they are reordered, and whose length
    tells it about tokens that were taken off or came unseen.

    Parameters
    ----------
    size : int
        Tokens to remember.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self.end = 0  # length of the cache layer behind the newest token
        self._next = 0
        self._rings: list[Tensor] = []  # [B, size, hidden] and [B, size, Hq, D]
        self._begin: Tensor | None = None  # [B], position of the oldest that counts; None: all do

    def append(self, states: Tensor, queries: Tensor, end: int) -> None:
        """Remember the states of new tokens.

        Parameters
        ----------
        states : Tensor [B, Q, hidden]
        queries : Tensor [B, Hq, W, D]
            Of the last of these tokens; all, or as many as are to be remembered.
        end : int
            Length of the cache layer, the new tokens included.
        """
        unseen = end - states.shape[1] - self.end
        # Fewer: tokens were taken off the cache. More: some came that were not seen here.
        self.forget(self.count if unseen > 0 else -unseen)
        self.end = end
        new = (states[:, -self.size :], queries[:, :, -self.size :].transpose(1, 2))
        if not self._rings or self._rings[0].shape[0] != len(states):
            self._rings = [x.new_empty(len(x), self.size, *x.shape[2:]) for x in new]
            self.count = self._next = 0
            self._begin = None
        fed = new[0].shape[1]
        until_end = min(fed, self.size - self._next)
        self._rings = [writable(ring) for ring in self._rings]
        for ring, x in zip(self._rings, new, strict=True):
            ring[:, self._next : self._next + until_end] = x[:, :until_end].detach()
            ring[:, : fed - until_end] = x[:, until_end:].detach()
        self._next = (self._next + fed) % self.size
        self.count = min(self.count + fed, self.size)

    def forget(self, newest: int) -> None:
        """Forget the newest states, as many as are there at most."""
        newest = min(newest, self.count)
        self.count -= newest
        self._next = (self._next - newest) % self.size

    def keep(self, newest: Sequence[int]) -> None:
        """Count no more than so many of the newest states of each row."""
        begin = send([self.end - n for n in newest], self._rings[0].device)
        self._begin = begin if self._begin is None else torch.maximum(self._begin, begin)

    def counts(self) -> list[int]:
        """Count the states of each row that count. Waits for the device."""
        if self._begin is None:
            return [self.count] * len(self._rings[0])
        counts: list[int] = (self.end - self._begin).clamp(0, self.count).tolist()
        return counts

    def states(self, newest: int) -> Tensor:
        """Return the newest states [B, N, hidden] in order, ``N = min(newest, count)``."""
        return self._newest(self._rings[0], newest)

    def queries(self, newest: int) -> Tensor:
        """Return the queries of the newest tokens: [B, Hq, N, D]."""
        return self._newest(self._rings[1], newest).transpose(1, 2)

    def _newest(self, ring: Tensor, newest: int) -> Tensor:
        begin = self._next - min(newest, self.count)
        if begin >= 0:
            return ring[:, begin : self._next]
        return torch.cat([ring[:, begin:], ring[:, : self._next]], dim=1)

    def select(self, rows: Tensor) -> None:
        """Give batch row b the states of row ``rows[b]``."""
        self._rings = [ring[rows.to(ring.device)] for ring in self._rings]
        if self._begin is not None:
            self._begin = self._begin[rows.to(self._begin.device)]

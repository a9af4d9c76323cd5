"""The last inputs of an attention layer, kept beside its cache."""

import torch
from torch import Tensor

from moekv.cache.buffers import writable


class RecentStates:
    """A ring of hidden states, from which the queries of the last tokens can be formed.

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
        self._ring: Tensor | None = None

    def append(self, states: Tensor, end: int) -> None:
        """Remember the states of new tokens.

        Parameters
        ----------
        states : Tensor [B, Q, hidden]
        end : int
            Length of the cache layer, the new tokens included.
        """
        unseen = end - states.shape[1] - self.end
        # Fewer: tokens were taken off the cache. More: some came that were not seen here.
        self.forget(self.count if unseen > 0 else -unseen)
        self.end = end
        batch, _, dim = states.shape
        if self._ring is None or self._ring.shape[0] != batch:
            self._ring = states.new_empty(batch, self.size, dim)
            self.count = self._next = 0
        states = states.detach()[:, -self.size :]
        fed = states.shape[1]
        until_end = min(fed, self.size - self._next)
        self._ring = writable(self._ring)
        self._ring[:, self._next : self._next + until_end] = states[:, :until_end]
        self._ring[:, : fed - until_end] = states[:, until_end:]
        self._next = (self._next + fed) % self.size
        self.count = min(self.count + fed, self.size)

    def forget(self, newest: int) -> None:
        """Forget the newest states, as many as are there at most."""
        newest = min(newest, self.count)
        self.count -= newest
        self._next = (self._next - newest) % self.size

    def keep(self, newest: int) -> None:
        """Forget all but the newest states."""
        self.count = min(self.count, newest)

    def states(self, newest: int) -> Tensor:
        """Return the newest states [B, N, hidden] in order, ``N = min(newest, count)``."""
        assert self._ring is not None
        begin = self._next - min(newest, self.count)
        if begin >= 0:
            return self._ring[:, begin : self._next]
        return torch.cat([self._ring[:, begin:], self._ring[:, : self._next]], dim=1)

    def select(self, rows: Tensor) -> None:
        """Give batch row b the states of row ``rows[b]``."""
        if self._ring is not None:
            self._ring = self._ring[rows.to(self._ring.device)]

"""Compression inside transformers' ``StaticCache``, whose tensors keep their shapes.

A compiled ``generate`` depends on buffers that stay where they are. So the kept pairs move to the
front of each head, in place, and later tokens are written behind them: compression gives no memory
back, it frees as many slots for further tokens as pairs were evicted.

Tokens go on to be numbered by their true positions, which rotary embeddings and attention masks
need, while slots are packed. The layer keeps the difference as a tensor, ``evicted``: a token at
position p goes to slot ``p - evicted``, and slot s stands for position ``s + evicted`` in masks,
the ``kv_offset`` that transformers knows from sliding windows. No number of a compiled graph
changes with it, so nothing is compiled again: neither for another prompt nor for another ratio.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

from moekv import ops
from moekv.budget import Kept
from moekv.cache.attention import Served, install
from moekv.cache.buffers import writable
from moekv.cache.graphs import traced
from moekv.cache.masks import offset_of, remember_buffer
from moekv.models.hooks import STATIC_COUNTS_SLOTS


class CompactStaticLayer(Served, StaticLayer):
    """A static layer from whose slots pairs have left, or may leave.

    It reports the true length, that of what was fed.

    Parameters
    ----------
    max_cache_len : int
        Slots.

    Attributes
    ----------
    evicted : Tensor, scalar int64
        Pairs that have left each head, on the layer's device.
    context : Tensor, scalar int64
        ``context_length``, on the layer's device.
    context_length : int
        Positions that were compressed together.
    """

    first = None  # it has no padding
    follows_masks = False  # of a context: compiled graphs know one mask for all heads

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self._num_evicted = self.context_length = 0
        self.evicted: Tensor
        self.context: Tensor

    @classmethod
    def take_over(cls, layer: StaticLayer) -> "CompactStaticLayer":
        """Make a layer of another's buffers.

        Parameters
        ----------
        layer : StaticLayer
            Initialised; not to be used any more.
        """
        install()  # now, and not when a layer of another kind asks: that would compile again
        compact = cls(layer.max_cache_len)
        compact.__dict__.update(layer.__dict__)
        compact._init_evicted()
        return compact

    def _init_evicted(self) -> None:
        self.evicted = torch.zeros((), dtype=torch.int64, device=self.device)
        self.context = torch.zeros_like(self.evicted)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.evicted)
            torch._dynamo.mark_static_address(self.context)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        super().lazy_initialization(key_states, value_states)
        self._init_evicted()

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        cache_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write the pairs of new tokens to the slots behind what is left.

        Parameters
        ----------
        key_states, value_states : Tensor
            [B, H, Q, D] and [B, H, Q, Dv].
        cache_kwargs : dict, optional
            With ``cache_position``, the tokens' true positions, where layers do not count slots.
        **kwargs
            Not used.

        Returns
        -------
        tuple of Tensor
            The buffers.
        """
        if STATIC_COUNTS_SLOTS:
            keys, values = super().update(key_states, value_states)
        else:
            if self.is_initialized and cache_kwargs is not None:
                slots = cache_kwargs["cache_position"] - self.evicted
                cache_kwargs = cache_kwargs | {"cache_position": slots}
            keys, values = super().update(key_states, value_states, cache_kwargs)
        if not torch.compiler.is_compiling():
            remember_buffer(keys, self)
        return keys, values

    def get_mask_sizes(self, fed: Tensor | int) -> tuple[int, int]:
        """Slots, and the position that the first one stands for."""
        if torch.compiler.is_compiling():  # a number would be compiled in
            traced.asked = self if self.is_initialized else None
            return self.max_cache_len, self.evicted  # type: ignore[return-value]
        return self.max_cache_len, offset_of(self, self._num_evicted)

    def get_seq_length(self) -> int:
        """Positions seen so far."""
        length = super().get_seq_length()
        return length + self.evicted if self.is_initialized else length  # type: ignore[return-value]

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        if self.is_initialized:
            self.set_evicted(0, 0)

    @property
    def num_evicted(self) -> int:
        """Pairs that have left each head."""
        return self._num_evicted

    def set_evicted(self, count: int, context_length: int) -> None:
        """Set how many pairs have left each head, of how many positions.

        The layer's slots are filled already.
        """
        self._num_evicted, self.context_length = count, context_length
        self.evicted.fill_(count)
        self.context.fill_(context_length)

    def compact(self, kept: Kept, *, backend: str) -> None:
        """Move the chosen pairs to the front of each head, in place, and clear what was behind.

        Buffers that have recorded gradients, which reach no compressed context, are copied before.

        Parameters
        ----------
        kept : Kept
            With ``per_head``, of the slots that are filled.
        backend : str
            Of ``kv_compact_``.
        """
        batch, num_heads, length = kept.shape
        count = kept.per_head
        assert count is not None and self.keys is not None and self.values is not None
        indices = kept.indices.view(batch, num_heads, count)
        # A graph would take what is moved here for what was there before.
        self.keys, self.values = writable(self.keys), writable(self.values)
        ops.kv_compact_(self.keys, self.values, indices, backend=backend)
        for pairs in (self.keys, self.values):  # where StaticLayer counts slots that are not zero
            pairs[:, :, count:length].zero_()
        if STATIC_COUNTS_SLOTS:
            self.cumulative_length.sub_(length - count)  # type: ignore[attr-defined]
        context_length = length + self._num_evicted
        self.set_evicted(context_length - count, context_length)


def is_compact(cache: Cache | None) -> bool:
    """Return whether a cache has layers from whose slots pairs have left, or may leave."""
    return cache is not None and any(isinstance(x, CompactStaticLayer) for x in cache.layers)


def compact(cache: Cache, index: int, kept: Kept | None, *, backend: str) -> None:
    """Leave only the kept pairs in a layer of a static cache.

    Parameters
    ----------
    cache : Cache
        Its layer becomes a ``CompactStaticLayer`` with the same buffers, once, and if nothing is
        to leave this time, too: for compiled graphs that is another layer.
    index : int
    kept : Kept, optional
        With ``per_head``; None: all.
    backend : str
    """
    layer = cache.layers[index]
    assert isinstance(layer, StaticLayer)
    if not isinstance(layer, CompactStaticLayer):
        layer = cache.layers[index] = CompactStaticLayer.take_over(layer)
    if kept is not None:
        layer.compact(kept, backend=backend)

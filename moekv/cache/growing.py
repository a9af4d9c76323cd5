"""Dense tensors with spare capacity for new tokens: all heads keep the same number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from moekv import ops
from moekv.budget import Kept
from moekv.cache.attention import Served, install
from moekv.cache.buffers import append, first_kept, gather_rows, storage_bytes, writable
from moekv.cache.graphs import traced
from moekv.cache.layer import CompressedLayer
from moekv.cache.masks import offset_of
from moekv.cache.pairs import DensePairs
from moekv.models.hooks import num_fed


class GrowingLayer(Served, CompressedLayer, DynamicLayer):
    """A dense layer that appends in amortised constant time.

    ``DynamicLayer`` copies the whole cache for every token. Here ``keys`` and ``values`` are views
    [B, H, n, D] of buffers with spare capacity, n the pairs that are held: `evicted` fewer than
    the true length. Whatever replaces them works as it does there; a slice ``keys[:, :, :n]`` that
    is assigned back crops the layer to n true positions. Once pairs have left, only what the layer
    has handed out can replace them: of others the positions are unknown. Decode steps on a CPU are
    served by ``ragged_attention``, see ``moekv.cache.attention``.

    Parameters
    ----------
    keys, values : Tensor
        [B, H, T, D] and [B, H, T, Dv]. They are taken over, not copied.
    backend : str
        Which implementation of ``ragged_attention`` serves this layer; ``"torch"``: none, steps go
        to the model's own attention.

    Attributes
    ----------
    evicted : int
        Pairs that have left each head.
    """

    def __init__(self, keys: Tensor, values: Tensor, *, backend: str = "auto") -> None:
        self._key_buffer, self._value_buffer = keys.detach(), values.detach()
        self._held, self._held_values = keys.shape[2], values.shape[2]
        self.is_initialized = False
        super().__init__(backend=backend)
        install()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.evicted = 0

    @classmethod
    def compress(
        cls, keys: Tensor, values: Tensor, kept: Kept, *, backend: str = "auto"
    ) -> GrowingLayer:
        """Copy the kept pairs of a dense layer, the same number of every head.

        Parameters
        ----------
        keys, values : Tensor
            [B, H, T, D] and [B, H, T, Dv].
        kept : Kept
            With ``per_head``.
        backend : str
            Which implementation of ``ragged_attention`` to use.

        Returns
        -------
        GrowingLayer
            With storage of its own, no larger than the kept pairs.
        """
        rows = kept.rows()
        batch, num_kv_heads, length = kept.shape
        assert kept.per_head is not None
        shape = (batch, num_kv_heads, kept.per_head, -1)
        layer = cls(
            gather_rows(keys, rows).view(shape),
            gather_rows(values, rows).view(shape),
            backend=backend,
        )
        layer.evicted, layer.context_length = length - kept.per_head, length
        layer.first = first_kept(kept)
        return layer

    def recompress(self, kept: Kept, pairs: str = "16") -> None:
        """Move the kept pairs to the front, in place: the rest is capacity for new tokens.

        What is more than `most` is given back.

        Parameters
        ----------
        kept : Kept
            With ``per_head``.
        pairs : str
            ``"16"``: dense pairs stay as they are.
        """
        assert kept.per_head is not None and pairs == "16"
        batch, num_kv_heads, length = kept.shape
        indices = kept.indices.view(batch, num_kv_heads, kept.per_head)
        self.notes = notes = self.whole_notes()
        self._key_buffer, self._value_buffer = map(writable, (self._key_buffer, self._value_buffer))
        self._held = self._held_values = length
        ops.kv_compact_(self._keys, self._values, indices, backend=self.backend)
        if notes is not None:
            notes.recompress(kept)
        if self.most is not None and self._key_buffer.shape[2] > max(self.most, kept.per_head):
            room = max(self.most, kept.per_head)
            self._key_buffer = self._key_buffer[:, :, :room].clone()
            self._value_buffer = self._value_buffer[:, :, :room].clone()
        self._held = self._held_values = kept.per_head
        self.num_moves += 1
        if not self.evicted:  # places are positions
            self.first = first_kept(kept)
        self.evicted += length - kept.per_head
        self.context_length = self.get_seq_length()

    # -- what transformers asks of a layer ---------------------------------------------------------

    @property
    def _keys(self) -> Tensor:
        return self._key_buffer[:, :, : self._held]

    @property
    def _values(self) -> Tensor:
        return self._value_buffer[:, :, : self._held_values]

    @property
    def keys(self) -> Tensor:
        """The keys, [B, H, n, D]."""
        return self._shown(self._keys)

    @keys.setter
    def keys(self, pairs: Tensor | None) -> None:
        if pairs is not None or self.is_initialized:  # as transformers' constructor says
            self._key_buffer, self._held = self._take(pairs, self._key_buffer, self._held)

    @property
    def values(self) -> Tensor:
        """The values, [B, H, n, Dv]."""
        return self._shown(self._values)

    @values.setter
    def values(self, pairs: Tensor | None) -> None:
        if pairs is not None or self.is_initialized:
            self._value_buffer, self._held_values = self._take(
                pairs, self._value_buffer, self._held_values
            )

    def _shown(self, pairs: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(pairs) is not Tensor:
            return pairs  # what a subclass of tensors is about would be lost
        return DensePairs.of(pairs, self)

    def _take(self, pairs: Tensor | None, buffer: Tensor, held: int) -> tuple[Tensor, int]:
        """Return the buffer, and the pairs it holds, once such pairs have been assigned.

        Pairs that the layer has handed out say how many positions they stand for. Any others may
        replace them only while every pair is held, so that pairs are positions.

        Raises
        ------
        ValueError
            The positions are unknown, compressed ones are missing, or the pairs are too old.
        """
        if isinstance(pairs, DensePairs) and pairs.layer is self:
            length = pairs.length
            if not self.has_lost(pairs.taken, length) and self.keeps_all(length):
                return buffer, held
            self._cut(length, held)
            taken = pairs.as_subclass(Tensor)[:, :, : length - self.evicted]
        else:
            taken = self._others(pairs, buffer[:, :, :held])
            self._cut(taken.shape[2], held)
        return taken, taken.shape[2]

    def _cut(self, length: int, held: int) -> None:
        if length < self.evicted + held:
            self.check_crop(length)
            self._end_at(length)

    def _others(self, pairs: Tensor | None, held: Tensor) -> Tensor:
        """Copy pairs that the layer has not handed out, if they can be its own."""
        is_known = pairs is not None and not self.evicted
        if isinstance(pairs, DensePairs) and pairs.layer.evicted:
            is_known = False
        same = False
        if pairs is not None and is_known:
            count = min(pairs.shape[2], held.shape[2])
            first, others = held[:, :, :count], pairs.as_subclass(Tensor)[:, :, :count]
            alike = first.dtype == others.dtype and first.device == others.device
            same = alike and torch.equal(first, others)
            is_known = same or pairs.shape[2] >= held.shape[2]
        if pairs is None or not is_known:
            raise ValueError(
                f"expected the {held.shape[2]} pairs of a compressed layer as it has handed them "
                "out, a slice keys[:, :, :n] of its own, which crops it to n positions, or their "
                f"clone() or to(), got {None if pairs is None else pairs.shape[2]}: which of them "
                "left, and so the true length, is unknown. cache.update appends pairs, and "
                "layer.keys.copy_ writes over them. (kvpress.DecodingPress evicts so; "
                "MoERouterPress(decoding=DecodingConfig(...)) goes on with a compressed cache)"
            )
        if not same:
            self._branch_off()
            self.first = None  # of whatever rows: each of their pairs is held
        return pairs.as_subclass(Tensor).clone()  # compaction writes over what the layer holds

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append the pairs of new tokens.

        Parameters
        ----------
        key_states, value_states : Tensor
            [B, H, Q, D] and [B, H, Q, Dv].
        *args, **kwargs
            Not used.

        Returns
        -------
        tuple of Tensor
            All keys and values that are held.
        """
        self._expect(len(key_states))
        self._key_buffer = append(self._key_buffer, self._held, key_states, self.most)
        self._value_buffer = append(self._value_buffer, self._held_values, value_states, self.most)
        self._held += key_states.shape[2]
        self._held_values += value_states.shape[2]
        self.dtype = self._key_buffer.dtype
        if torch.compiler.is_compiling():
            traced.shown = self
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions seen so far, those of evicted pairs and of left padding included."""
        return self.evicted + self._held

    def get_mask_sizes(self, fed: Tensor | int) -> tuple[int, int]:
        """Length and offset of the mask, before the new tokens are appended.

        What is held stands for the last positions: whichever these are, all come before the new
        tokens, which see each other's past alone.
        """
        return self._held + num_fed(fed), offset_of(self, self.evicted)

    def _copy_buffers(self) -> None:
        self._key_buffer, self._value_buffer = self._keys.clone(), self._values.clone()

    def _forget(self, count: int) -> None:
        self._held -= count
        self._held_values = min(self._held, self._held_values)  # as values may have been assigned
        # As the buffers, too: what is appended next goes elsewhere, and views of these tokens stay.
        self._key_buffer, self._value_buffer = self._keys, self._values

    def _select_rows(self, indices: Tensor) -> None:
        self.num_moves += 1
        indices = indices.to(self._key_buffer.device)
        self._key_buffer, self._value_buffer = self._keys[indices], self._values[indices]

    # -- what moekv asks of a layer ----------------------------------------------------------------

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return keys and values as plain tensors [B, H, n, D] and [B, H, n, Dv]."""
        return self._keys, self._values

    @property
    def follows_masks(self) -> bool:
        """Whether places are positions: nothing has left."""
        return not self.evicted

    @property
    def num_heads(self) -> int:
        """KV heads."""
        return self._keys.shape[1]

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self._key_buffer.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's storages, spare capacity included."""
        return storage_bytes(self._key_buffer, self._value_buffer)

    @property
    def bytes_per_pair(self) -> int:
        """Bytes of one key and its value."""
        return (self._keys.shape[3] + self._values.shape[3]) * self._keys.dtype.itemsize

    def held_pairs(self) -> tuple[Tensor, Tensor]:
        """Show the pairs that are held, as they are."""
        return self._keys, self._values

    def count_pairs(self, padding: list[int]) -> list[int]:
        """Count the real pairs of each row, all heads together."""
        _, num_heads, held, _ = self._keys.shape
        return [num_heads * (held - p) for p in padding]

    def head_lengths(self, padding: Sequence[int]) -> list[list[int]]:
        """Count the real pairs of each row's heads."""
        _, num_heads, held, _ = self._keys.shape
        return [[held - p] * num_heads for p in padding]

"""The layers that take the place of compressed ones inside the user's ``DynamicCache``.

:class:`RaggedLayer`: heads keep different numbers of pairs, and nothing else. It reports the true,
uncompressed length, so that masks and position ids stay what they were; the pairs themselves are
handed to attention as ``RaggedPairs``, which ``moekv.attention`` understands.

:class:`GrowingLayer`: plain dense tensors, with room for new tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from moekv import ops
from moekv.attention import NOT_DENSE, RaggedPairs, install, serve_steps
from moekv.budget import Kept
from moekv.recent import RecentStates

_LEAST_ROOM = 64  # tokens


def storage_bytes(*tensors: Tensor) -> int:
    """Bytes of the storages under tensors, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _append(buffer: Tensor, length: int, states: Tensor, most: int | None) -> Tensor:
    """Write new pairs behind the first ``length`` of a buffer, or of a larger one if need be.

    A full buffer grows by an eighth, so that a pair is copied a bounded number of times however
    many tokens follow, and little memory waits in vain; where no more than ``most`` are expected,
    there is room for no more.
    """
    batch, num_kv_heads, capacity, dim = buffer.shape
    if states.shape[:2] != (batch, num_kv_heads) or states.shape[3] != dim:
        raise ValueError(
            f"expected new pairs [{batch}, {num_kv_heads}, num_queries, {dim}] for this cache, "
            f"got {list(states.shape)}"
        )
    if states.dtype != buffer.dtype or states.device != buffer.device:
        raise ValueError(
            f"expected new pairs of {buffer.dtype} on {buffer.device} like the cache, "
            f"got {states.dtype} on {states.device}"
        )
    needed = length + states.shape[2]
    if needed > capacity:
        room = needed + max(needed // 8, _LEAST_ROOM)
        room = room if most is None else max(needed, min(room, most))
        grown = buffer.new_empty((batch, num_kv_heads, room, dim))
        grown[:, :, :length] = buffer[:, :, :length]
        buffer = grown
    # Detached: a cache that recorded gradients would hold every step of a generation.
    buffer[:, :, length:needed] = states.detach()
    return buffer


def _uncroppable(wanted: int, compressed: int) -> str:
    return (
        f"cannot crop to {wanted} positions: the first {compressed} were compressed together, only "
        "tokens after them can be removed"
    )


def gather_rows(pairs: Tensor, rows: Tensor) -> Tensor:
    """Copy rows of [B, H, T, D], numbered flat, into [n, D]."""
    # Whole rows of a flat view: several times faster on a CPU than torch.gather, and one pass where
    # compaction in place, which needs a copy to give memory back, takes two.
    return pairs.detach().reshape(-1, pairs.shape[-1]).index_select(0, rows)


class GrowingLayer(DynamicLayer):
    """A dense layer that appends in amortised constant time.

    ``DynamicLayer`` copies the whole cache for every token. Here ``keys`` and ``values`` are views
    [B, H, T, D] of buffers with room behind them; whatever replaces or crops them works as before.
    Decode steps on a CPU are served by ``ragged_attention``, see ``moekv.attention.serve_steps``.

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
        Pairs that have left each head: by so much the true length exceeds the reported one.
    compressed : int
        Pairs of each head after the last compression, which no crop may reach.
    most : int or None
        Pairs of a head, if known, that will not be exceeded.
    recent : RecentStates or None
        Inputs of the attention layer, for compression during decoding.
    counted : tuple
        Whose statistics count how many of the pairs as kept, see ``moekv.decoding``.
    notes : GrowingLayer, RaggedLayer or None
        What a calibrated router noted of each pair, see ``moekv.decoding.take_notes``.
    """

    def __init__(self, keys: Tensor, values: Tensor, *, backend: str = "auto") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        install()
        self.backend = backend
        self.lazy_initialization(keys, values)
        self.keys = self._key_buffer = keys.detach()
        self.values = self._value_buffer = values.detach()
        self.evicted = 0
        self.compressed = 0
        self.most: int | None = None
        self.recent: RecentStates | None = None
        self.counted: tuple[object, int] = (None, 0)
        self.notes: GrowingLayer | RaggedLayer | None = None

    @classmethod
    def compress(
        cls, keys: Tensor, values: Tensor, kept: Kept, *, backend: str = "auto"
    ) -> "GrowingLayer":
        """Copy the chosen pairs of a dense layer, as many of every head.

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
        layer.evicted, layer.compressed = length - kept.per_head, kept.per_head
        return layer

    def recompress(self, kept: Kept) -> None:
        """Move the chosen pairs to the front, in place: the rest is room for new tokens.

        Parameters
        ----------
        kept : Kept
            With ``per_head``.
        """
        assert kept.per_head is not None and self.keys is not None and self.values is not None
        batch, num_kv_heads, length = kept.shape
        indices = kept.indices.view(batch, num_kv_heads, kept.per_head)
        self.notes = notes = notes_of(self)
        ops.kv_compact_(self.keys, self.values, indices, backend=self.backend)
        if notes is not None:
            notes.recompress(kept)
        self.keys = self.keys[:, :, : kept.per_head]
        self.values = self.values[:, :, : kept.per_head]
        self.evicted += length - kept.per_head
        self.compressed = kept.per_head

    def get_mask_sizes(self, cache_position: Tensor) -> tuple[int, int]:
        """Length and offset of the mask, before the new tokens are appended.

        Several tokens at their true positions need a mask that knows how many pairs have left:
        else they would see each other's future.
        """
        fed, held = cache_position.shape[0], self.get_seq_length()
        at_true_position = fed > 1 and self.evicted and cache_position[0] == held + self.evicted
        return held + fed, self.evicted if at_true_position else 0

    def crop(self, max_length: int) -> None:
        """Forget the tokens after the first ``max_length`` pairs, or the last ``-max_length``.

        Raises
        ------
        ValueError
            If that would reach into the compressed context, where heads end with different tokens.
        """
        length = self.get_seq_length()
        wanted = length + max_length if max_length < 0 else max_length
        if self.evicted and wanted < min(length, self.compressed):
            raise ValueError(_uncroppable(wanted, self.compressed))
        super().crop(max_length)
        if self.notes is not None:
            self.notes.crop(self.get_seq_length())

    def offload(self) -> None:
        """Move the pairs to the CPU, and give up the room behind them."""
        super().offload()  # type: ignore[no-untyped-call]
        assert self.keys is not None and self.values is not None
        self._key_buffer, self._value_buffer = self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give batch row b the pairs of row ``beam_idx[b]``."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        _follow(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        super().batch_repeat_interleave(repeats)
        assert self.keys is not None
        _follow(self, torch.arange(len(self.keys) // repeats).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows that ``indices`` names."""
        super().batch_select_indices(indices)
        _follow(self, indices)

    @property
    def nbytes(self) -> int:
        """Bytes that this layer's storages hold, room to grow included."""
        return storage_bytes(self._key_buffer, self._value_buffer)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append the pairs of new tokens.

        Parameters
        ----------
        key_states, value_states : Tensor
            [B, H, Q, D] and [B, H, Q, Dv].
        cache_kwargs : dict, optional
            Not used.

        Returns
        -------
        tuple of Tensor
            All keys and values.
        """
        length = self.get_seq_length()
        self._key_buffer = _append(
            self._under(self.keys, self._key_buffer), length, key_states, self.most
        )
        self._value_buffer = _append(
            self._under(self.values, self._value_buffer), length, value_states, self.most
        )
        length += key_states.shape[2]
        self.keys, self.values = self._key_buffer[:, :, :length], self._value_buffer[:, :, :length]
        serve_steps(self.keys, self.backend)
        return self.keys, self.values

    @staticmethod
    def _under(pairs: Tensor | None, buffer: Tensor) -> Tensor:
        """Find the buffer that pairs are a view of; others have no room behind them."""
        assert pairs is not None
        same = pairs.data_ptr() == buffer.data_ptr() and pairs.stride() == buffer.stride()
        return buffer if same and pairs.shape[:2] == buffer.shape[:2] else pairs


class RaggedLayer(CacheLayerMixin):
    """Kept pairs of every head, stored back to back, and a dense tail of the tokens since.

    Parameters
    ----------
    keys, values : Tensor
        [N, D] and [N, Dv], the kept pairs of all heads.
    begin, end : Tensor
        [B, H] int32. Head h of batch row b owns rows ``begin[b, h] ... end[b, h] - 1``.
    length : int
        Positions that the stored pairs were kept from, padding included.
    backend : str
        Which implementation of ``ragged_attention`` serves this layer.

    Attributes
    ----------
    most : int or None
        Tokens of the tail, if known, that will not be exceeded.
    recent, counted, notes
        As in :class:`GrowingLayer`.
    """

    is_sliding = False

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        begin: Tensor,
        end: Tensor,
        *,
        length: int,
        backend: str = "auto",
    ) -> None:
        install()
        self.stored_keys = keys
        self.stored_values = values
        self.begin = begin
        self.end = end
        self.context_length = length
        self.backend = backend
        self.is_initialized = True
        self.tail_length = 0
        self.most: int | None = None
        self.recent: RecentStates | None = None
        self.counted: tuple[object, int] = (None, 0)
        self.notes: RaggedLayer | GrowingLayer | None = None
        self._stored_pairs: list[int] | None = None
        self._tail_keys = keys.new_empty((*begin.shape, 0, keys.shape[1]))
        self._tail_values = values.new_empty((*begin.shape, 0, values.shape[1]))

    @classmethod
    def compress(
        cls, keys: Tensor, values: Tensor, kept: Kept, *, backend: str = "auto"
    ) -> "RaggedLayer":
        """Copy the chosen pairs of a dense layer.

        Parameters
        ----------
        keys, values : Tensor
            [B, H, T, D] and [B, H, T, Dv].
        kept : Kept
            What stays of each head.
        backend : str
            Which implementation of ``ragged_attention`` to use.

        Returns
        -------
        RaggedLayer
            With storage of its own, no larger than the kept pairs.
        """
        rows = kept.rows()
        batch, num_kv_heads, length = kept.shape
        return cls(
            gather_rows(keys, rows),
            gather_rows(values, rows),
            kept.offsets[:-1].view(batch, num_kv_heads),
            kept.offsets[1:].view(batch, num_kv_heads),
            length=length,
            backend=backend,
        )

    def recompress(self, kept: Kept) -> None:
        """Leave only the chosen pairs, in new memory; the tail becomes part of what is stored.

        Its memory waits for as many tokens where they are expected (``most``).

        Parameters
        ----------
        kept : Kept
            Of the pairs as :meth:`to_dense` shows them.
        """
        batch, num_kv_heads, longest = kept.shape
        head = torch.arange(batch * num_kv_heads, device=self.device).repeat_interleave(
            kept.offsets.diff(), output_size=len(kept.indices)
        )
        stored = (self.end - self.begin).flatten().long()
        place = kept.indices - (longest - stored - self.tail_length)[head]
        row = torch.where(
            place < stored[head],
            self.begin.flatten()[head] + place,
            len(self.stored_keys) + head * self.tail_length + place - stored[head],
        )
        keys, values = (
            torch.cat([pairs, tail.flatten(0, 2)]).index_select(0, row)
            for pairs, tail in (
                (self.stored_keys, self.tail_keys),
                (self.stored_values, self.tail_values),
            )
        )
        self.notes = notes_of(self)
        if self.notes is not None:
            self.notes.recompress(kept)
        self.context_length, self.tail_length = self.get_seq_length(), 0
        self.stored_keys, self.stored_values, self._stored_pairs = keys, values, None
        self.begin = kept.offsets[:-1].view(batch, num_kv_heads)
        self.end = kept.offsets[1:].view(batch, num_kv_heads)
        if self.most is None or self._tail_keys.shape[2] > self.most:
            # Nobody knows whether so many tokens will come again.
            self._tail_keys = self._tail_keys.new_empty((*self.begin.shape, 0, keys.shape[1]))
            self._tail_values = self._tail_values.new_empty((*self.begin.shape, 0, values.shape[1]))

    def subset(self, kept: Kept, *, of: Kept) -> "RaggedLayer":
        """Copy some of the stored pairs.

        Parameters
        ----------
        kept : Kept
            What stays of each head.
        of : Kept
            What the layer holds.

        Returns
        -------
        RaggedLayer
            Without a tail, with storage of its own.
        """
        rows = torch.searchsorted(of.rows(), kept.rows())  # both ascend
        heads = self.begin.shape
        return RaggedLayer(
            self.stored_keys.index_select(0, rows),
            self.stored_values.index_select(0, rows),
            kept.offsets[:-1].view(heads),
            kept.offsets[1:].view(heads),
            length=self.context_length,
            backend=self.backend,
        )

    # -- what transformers asks of a layer ---------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pairs."""
        return self.stored_keys.dtype

    @property
    def device(self) -> torch.device:
        """Where the pairs are."""
        return self.stored_keys.device

    @property  # type: ignore[override]  # attention is to see that the pairs are ragged
    def keys(self) -> RaggedPairs:
        """The keys, for attention."""
        return RaggedPairs(self, self.stored_keys.shape[1], self.get_seq_length())

    @keys.setter
    def keys(self, pairs: RaggedPairs) -> None:
        self._crop_to(pairs)

    @property  # type: ignore[override]
    def values(self) -> RaggedPairs:
        """The values, for attention."""
        return RaggedPairs(self, self.stored_values.shape[1], self.get_seq_length())

    @values.setter
    def values(self, pairs: RaggedPairs) -> None:
        self._crop_to(pairs)

    def _crop_to(self, pairs: RaggedPairs) -> None:
        if not isinstance(pairs, RaggedPairs) or pairs.layer is not self:
            raise TypeError(
                f"expected a crop of this layer's own pairs, got {type(pairs)}: {NOT_DENSE}"
            )
        self.crop(pairs.length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a ragged layer is born with its pairs."""

    def update(  # type: ignore[override]
        self,
        key_states: Tensor,
        value_states: Tensor,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[RaggedPairs, RaggedPairs]:
        """Append the pairs of new tokens to the tail, in amortised constant time.

        Parameters
        ----------
        key_states, value_states : Tensor
            [B, H, Q, D] and [B, H, Q, Dv].
        cache_kwargs : dict, optional
            Not used.

        Returns
        -------
        tuple of RaggedPairs
            All keys and values, for attention.
        """
        self._tail_keys = _append(self._tail_keys, self.tail_length, key_states, self.most)
        self._tail_values = _append(self._tail_values, self.tail_length, value_states, self.most)
        self.tail_length += key_states.shape[2]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions seen so far, those of evicted pairs and of left padding included."""
        return self.context_length + self.tail_length

    def get_mask_sizes(self, cache_position: Tensor) -> tuple[int, int]:
        """Length and offset of the mask over all positions, before the new tokens are appended."""
        return self.get_seq_length() + cache_position.shape[0], 0

    def get_max_cache_shape(self) -> int:
        """Return -1: the tail grows without limit."""
        return -1

    def crop(self, max_length: int) -> None:
        """Forget the tokens after the first ``max_length``, or the last ``-max_length``.

        Raises
        ------
        ValueError
            If that would reach into the compressed context, which cannot be cut.
        """
        length = self.get_seq_length()
        wanted = length + max_length if max_length < 0 else max_length
        if wanted >= length:
            return
        if wanted < self.context_length:
            raise ValueError(_uncroppable(wanted, self.context_length))
        self.tail_length = wanted - self.context_length
        if self.notes is not None:
            self.notes.crop(wanted)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give batch row b the pairs of row ``beam_idx[b]``, sharing what is stored."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row, sharing what is stored."""
        rows = torch.arange(self.begin.shape[0], device=self.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows that ``indices`` names."""
        indices = indices.to(self.device)
        self.begin, self.end = self.begin[indices], self.end[indices]
        self._tail_keys, self._tail_values = self._tail_keys[indices], self._tail_values[indices]
        self._stored_pairs = None
        _follow(self, indices)

    def reset(self) -> None:
        """Refuse: what was evicted cannot be emptied in place.

        Raises
        ------
        RuntimeError
            Always. Begin a new text with a new cache.
        """
        raise RuntimeError("a compressed cache cannot be reset; begin a new text with a new cache")

    def offload(self) -> None:
        """Move the pairs to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move offloaded pairs back to where the head tables are."""
        if self.stored_keys.device != self.begin.device:
            self._move(self.begin.device)

    def _move(self, device: torch.device | str) -> None:
        for name in ("stored_keys", "stored_values", "_tail_keys", "_tail_values"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))

    # -- what moekv asks of a layer ----------------------------------------------------------------

    @property
    def tail_keys(self) -> Tensor:
        """[B, H, S, D], the keys of the tokens since compression."""
        return self._tail_keys[:, :, : self.tail_length]

    @property
    def tail_values(self) -> Tensor:
        """[B, H, S, Dv], the values of the tokens since compression."""
        return self._tail_values[:, :, : self.tail_length]

    @property
    def stored_pairs(self) -> list[int]:
        """Stored pairs of each batch row, all heads together. Waits for the device if new."""
        if self._stored_pairs is None:
            self._stored_pairs = (self.end - self.begin).sum(1).tolist()
        return self._stored_pairs

    @property
    def nbytes(self) -> int:
        """Bytes that this layer's storages hold, room to grow included."""
        return storage_bytes(
            self.stored_keys, self.stored_values, self._tail_keys, self._tail_values
        )

    def to_dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copy the pairs into padded tensors.

        Returns
        -------
        keys, values : Tensor
            [B, H, L, D] and [B, H, L, Dv], L the longest head; the pairs of a head stand at the
            right end, zeros before them.
        lengths : Tensor
            [B, H] int64, pairs of each head.
        """
        kept = (self.end - self.begin).long()
        longest = int(kept.max())
        column = torch.arange(longest, device=self.device) - (longest - kept)[..., None]
        row = (self.begin[..., None] + column).clamp(0, max(len(self.stored_keys) - 1, 0))
        dense = []
        for stored, tail in (
            (self.stored_keys, self.tail_keys),
            (self.stored_values, self.tail_values),
        ):
            pairs = stored[row].masked_fill((column < 0)[..., None], 0)
            dense.append(torch.cat([pairs, tail], dim=2))
        return dense[0], dense[1], kept + self.tail_length


def compressed(
    keys: Tensor, values: Tensor, kept: Kept, *, backend: str = "auto"
) -> GrowingLayer | RaggedLayer:
    """Copy the chosen pairs of a dense layer, to a dense one if each head keeps as many.

    Parameters
    ----------
    keys, values : Tensor
        [B, H, T, D] and [B, H, T, Dv].
    kept : Kept
        What stays of each head.
    backend : str
        Which implementation of ``ragged_attention`` serves the layer.

    Returns
    -------
    GrowingLayer or RaggedLayer
    """
    if kept.per_head is None:
        return RaggedLayer.compress(keys, values, kept, backend=backend)
    return GrowingLayer.compress(keys, values, kept, backend=backend)


def notes_of(layer: CacheLayerMixin) -> GrowingLayer | RaggedLayer | None:
    """Return a layer's notes if they are of the pairs that it holds, no more and no fewer."""
    notes: GrowingLayer | RaggedLayer | None = getattr(layer, "notes", None)
    whole = notes is not None and notes.get_seq_length() == layer.get_seq_length()
    return notes if whole else None


def _follow(layer: GrowingLayer | RaggedLayer, rows: Tensor) -> None:
    """Give what a layer remembers of its tokens the batch rows that its pairs have got."""
    if layer.recent is not None:
        layer.recent.select(rows)
    if layer.notes is not None:
        layer.notes.batch_select_indices(rows)

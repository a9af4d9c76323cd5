"""Heads that keep different numbers of pairs, and nothing else.

A ragged layer reports the true, uncompressed length, so that masks and position ids stay what they
were; the pairs themselves are handed to attention as ``RaggedPairs``, which
``moekv.cache.attention`` understands.
"""

import copy
import warnings
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin

from moekv.budget import Kept
from moekv.cache.attention import Served, install
from moekv.cache.buffers import first_kept, gather_rows, storage_bytes
from moekv.cache.folding import Folding
from moekv.cache.layer import CompressedLayer
from moekv.cache.masks import offset_of
from moekv.cache.pairs import NOT_DENSE, RaggedPairs
from moekv.cache.positions import is_worth, pack, places_of, positions_of, unpack
from moekv.cache.rows import Rows, gain, storable
from moekv.cache.tail import Tail
from moekv.devices import send
from moekv.models.hooks import num_fed


class RaggedLayer(Served, CompressedLayer):
    """Kept pairs of every head, stored back to back, and a dense tail of the tokens since.

    What is stored may be quantised; the tail has the model's dtype. Where quantising rounds, a row
    that was not compressed when others were has its tokens in the tail until it is.

    Parameters
    ----------
    rows : Rows
        The N kept pairs of all heads.
    begin, end : Tensor
        [B, H] int32. Head h of batch row b owns rows ``begin[b, h] ... end[b, h] - 1``.
    length : int
        Positions that the stored pairs were kept from, padding included.
    backend : str
        Which implementation of ``ragged_attention`` serves this layer.

    Attributes
    ----------
    pairs : str
        How the rows are to be stored. ``rows.pairs`` is ``"16"`` instead while one cannot be.
    num_joined : Tensor, int64, or None
        Evicted pairs that joined others when the layer was made of a dense one; None: none could.
    positions : Tensor [B, H, ceil(context_length / 8)], uint8, or None
        Bits of the positions that the stored pairs stand for, see ``moekv.cache.positions``; None:
        unknown. Few are worth that many: beyond 32 positions for each pair they are not kept.
    """

    is_ragged = True

    def __init__(
        self,
        rows: Rows,
        begin: Tensor,
        end: Tensor,
        *,
        length: int,
        backend: str = "auto",
    ) -> None:
        self.rows = rows
        self.pairs = rows.pairs
        self.begin = begin
        self.end = end
        self.num_joined: Tensor | None = None
        self.positions: Tensor | None = None
        self._stored_counts: list[list[int]] | None = (
            None  # pairs of each head, once they were asked for
        )
        self._tail = self._new_tail()
        self._assigned: dict[str, RaggedPairs] = {}
        self.is_initialized = False
        super().__init__(backend=backend)
        install()
        self.context_length = length
        self.is_initialized = True

    def _new_tail(self) -> Tail:
        """Make an empty tail, without memory."""
        rows = self.rows
        value_dtype = rows.values.dtype if rows.scales is None else rows.dtype
        empty = torch.empty(0, dtype=rows.dtype, device=rows.device)
        key, value = empty.view(0, rows.key_dim), empty.view(0, rows.value_dim).to(value_dtype)
        return Tail(self.begin.shape, key, value)

    @classmethod
    def compress(
        cls,
        keys: Tensor,
        values: Tensor,
        kept: Kept,
        *,
        pairs: str = "16",
        folding: Folding | None = None,
        checked: bool = False,
        backend: str = "auto",
    ) -> "RaggedLayer":
        """Copy the chosen pairs of a dense layer.

        Parameters
        ----------
        keys, values : Tensor
            [B, H, T, D] and [B, H, T, Dv].
        kept : Kept
            What stays of each head.
        pairs : str
            How it is stored: one of ``moekv.ops.PAIRS``.
        folding : Folding, optional
            Has the other pairs join these. None: they are lost.
        checked : bool
            Whether all pairs are known to be storable, as of ``Rows.of``.
        backend : str
            Which implementation of ``ragged_attention`` to use.

        Returns
        -------
        RaggedLayer
            With storage of its own, no larger than the kept pairs.
        """
        rows = kept.rows()
        batch, num_kv_heads, length = kept.shape
        stay, bias, num_joined = gather_rows(keys, rows), None, None
        if folding is None:
            values = gather_rows(values, rows)
        else:
            values, bias, num_joined = folding.fold(keys, values, kept, backend=backend)
            checked = False  # these are new numbers
        # The row of the batch that each pair belongs to; pairs in 16 bits are never rounded.
        owner = None if pairs == "16" else rows // max(num_kv_heads * length, 1)
        how: dict[str, Any] = {"bias": bias, "owner": owner, "checked": checked}
        layer = cls(
            Rows.of(stay, values, pairs, **how, backend=backend),
            kept.offsets[:-1].view(batch, num_kv_heads),
            kept.offsets[1:].view(batch, num_kv_heads),
            length=length,
            backend=backend,
        )
        layer.pairs = pairs
        layer.first = first_kept(kept)
        layer.num_joined = num_joined
        if bias is None and is_worth(kept.shape, len(rows)):  # folded pairs stand for several
            layer.positions = pack(kept.mask(rows))
        return layer

    def all_storable(self) -> Tensor:
        """Say whether each pair can be stored in any format; those that are quantised can."""
        able = storable(self.tail_keys, self.tail_values).all()
        if self.rows.pairs == "16":
            able &= storable(self.rows.keys, self.rows.values).all()
        return able

    def recompress(
        self,
        kept: Kept,
        pairs: str = "16",
        alone: Sequence[int] | None = None,
        *,
        checked: bool = False,
    ) -> None:
        """Leave only the chosen pairs, in new memory; the tail becomes part of what is stored.

        Its memory waits for as many tokens where they are expected (``most``).

        Parameters
        ----------
        kept : Kept
            Of the pairs as :meth:`to_dense` shows them.
        pairs : str
            How they are stored, if they are not quantised already.
        alone : sequence of int, optional
            Rows of the batch whose tail is stored. That of others, which retain all their pairs,
            stays as it is. None: all.
        checked : bool
            Whether all are known to be storable: see :meth:`all_storable`.
        """
        self._check_assigned()
        batch, num_kv_heads, longest = kept.shape
        pairs = pairs if self.pairs == "16" else self.pairs
        head = _owners(kept.offsets.diff(), 1, len(kept.indices))
        stored = (self.end - self.begin).flatten().long()
        skips = self._skips().repeat_interleave(num_kv_heads)
        place = kept.indices - (longest - stored - self.tail_length + skips)[head]
        is_stored = place < stored[head]
        row = torch.where(
            is_stored,
            self.begin.flatten()[head] + place,
            len(self.rows) + head * self.tail_length + skips[head] + place - stored[head],
        )
        offsets = kept.offsets
        if alone is not None:
            goes = torch.zeros(batch, dtype=torch.bool, device=self.device)
            goes[send(alone, self.device)] = True
            moves = is_stored | goes.repeat_interleave(num_kv_heads)[head]
            row, head = row[moves], head[moves]
            counts = torch.bincount(head, minlength=batch * num_kv_heads)
            offsets = functional.pad(counts.cumsum(0), (1, 0)).int()
        tail = self.tail_keys.flatten(0, 2), self.tail_values.flatten(0, 2)
        rows = self.rows.in_format(pairs, backend=self.backend)
        rows = rows.join(*tail, backend=self.backend).select(row)
        # Rows that are quantised already were looked at.
        checked = checked or (self.rows.pairs == rows.pairs and not self.tail_length)
        rows = rows.or_wide(
            lambda: self.rows.widened().join(*tail).select(row),
            head // num_kv_heads,
            checked=checked,
        )
        positions = self._positions_after(kept, len(row), alone)
        self.notes = self.whole_notes()
        if self.notes is not None:
            assert isinstance(self.notes, RaggedLayer)
            self.notes.recompress(kept, alone=alone)
        self.num_moves += 1
        first = first_kept(kept)
        known = longest - self.tail_length + self._skips()  # where places begin to say positions
        before = torch.zeros_like(first) if self.first is None else self.first.to(first.device)
        self.first = torch.where(first < known, before, first - longest + self.get_seq_length())
        self.context_length, self.positions = self.get_seq_length(), positions
        self._tail.lack(range(batch) if alone is None else alone)
        self.pairs, self.rows, self._stored_counts = pairs, rows, None
        self.begin = offsets[:-1].view(batch, num_kv_heads)
        self.end = offsets[1:].view(batch, num_kv_heads)
        if not self.tail_length and (self.most is None or self._tail.room > self.most):
            self._tail = self._new_tail()  # nobody knows whether so many tokens will come again

    def _skips(self) -> Tensor:
        """How many tokens at the beginning of the tail each row does not have there: [B] int64."""
        skips = self._tail.skips
        return self.begin.new_zeros(self.batch_size).long() if skips is None else skips

    def _positions_after(
        self, kept: Kept, num_stored: int, alone: Sequence[int] | None
    ) -> Tensor | None:
        """Bits of the positions that are left by a compression, if they are to be known."""
        batch, num_heads, longest = kept.shape
        length = self.get_seq_length()
        if self.positions is None or not is_worth((batch, num_heads, length), num_stored):
            return None
        place = torch.arange(length, device=self.device)
        late = (place >= length - self.tail_length + self._skips()[:, None])[:, None]  # in the tail
        stays = late | functional.pad(self._stays(), (0, length - self.context_length))
        left = stays & kept.mask().gather(-1, places_of(stays, longest))
        if alone is not None:
            late[send(alone, self.device)] = False
            left &= ~late
        return pack(left)

    def _stays(self) -> Tensor:
        """Mark the positions whose pairs are stored, which are known: [B, H, T] bool."""
        assert self.positions is not None
        return unpack(self.positions, self.context_length)

    # -- what transformers asks of a layer ---------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pairs, as they are read."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the pairs are."""
        return self.rows.device

    @property  # type: ignore[override]  # attention is to see that the pairs are ragged
    def keys(self) -> RaggedPairs:
        """The keys, for attention."""
        return self._shown("keys")

    @keys.setter
    def keys(self, pairs: Any) -> None:
        self._assign("keys", pairs)

    @property  # type: ignore[override]
    def values(self) -> RaggedPairs:
        """The values, for attention."""
        return self._shown("values")

    @values.setter
    def values(self, pairs: Any) -> None:
        self._assign("values", pairs)

    @property
    def _length(self) -> int:
        """Positions that the layer holds, whatever waits for its other half."""
        return self._tail_begin + self.tail_length

    @property
    def _tail_begin(self) -> int:
        """Position of the first token of the tail."""
        return self.context_length - self._tail.waiting

    def _shown(self, name: str) -> RaggedPairs:
        return self._assigned.get(name) or RaggedPairs(self, name, self._length)

    def _assign(self, name: str, pairs: Any) -> None:
        """Take one half, which waits for the other while their lengths differ.

        What is stored is of both: it is cropped once, or put back.

        Raises
        ------
        TypeError
            They are not this layer's, or its other half.
        ValueError
            They are too old, or compressed ones are missing.
        """
        if pairs is None and not self.is_initialized:  # as transformers' constructor says
            return
        own = isinstance(pairs, RaggedPairs) and pairs.layer is self
        if not own or pairs.name != name:
            got = f"its {pairs.name}" if own else str(type(pairs))
            raise TypeError(f"expected a crop of this layer's own {name}, got {got}: {NOT_DENSE}")
        self.check_taken(pairs.taken)
        if pairs.length > self.context_length < pairs.context_length:
            raise self._too_old("a crop has taken some of the compressed ones")
        if self.keeps_all(pairs.length):
            return
        self.check_crop(pairs.length)
        self._assigned = self._assigned | {name: pairs}
        keys, values = self.keys, self.values
        if keys.length == values.length:
            self._assigned = {}
            self._take(keys, values)

    def _take(self, keys: RaggedPairs, values: RaggedPairs) -> None:
        """Hold pairs that the layer has handed out, of as many positions."""
        length, held = keys.length, self._length
        if any(self.has_lost(pairs.taken, length) for pairs in (keys, values)):
            self._tail.put_back(keys.tail[0], values.tail[1], length - self._tail_begin)
        elif length < held:
            self._forget(held - length)
            self._end_at(length)

    def _check_assigned(self) -> None:
        if self._assigned:
            self.check_halves()

    def crop(self, max_length: int) -> None:
        """Forget tokens as any layer; where halves differ, each is cropped, as elsewhere."""
        wanted = self.left_by(max_length)
        if not self._assigned:
            super().crop(max_length)
        elif wanted < self.get_seq_length():
            self.check_crop(wanted)
            self.keys = self.keys[:, :, :wanted]
            self.values = self.values[:, :, :wanted]

    def put_tail(
        self, keys: Tensor, values: Tensor, waiting: int = 0, skips: Tensor | None = None
    ) -> None:
        """Have these [B, H, S, D] and [B, H, S, Dv] be the tail: see ``Tail``."""
        self._tail.put_back(keys, values, keys.shape[2])
        self._tail.wait(waiting, skips)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: a ragged layer is made with its pairs."""

    def update(  # type: ignore[override]
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[RaggedPairs, RaggedPairs]:
        """Append the pairs of new tokens to the tail, in amortised constant time.

        Parameters
        ----------
        key_states, value_states : Tensor
            [B, H, Q, D] and [B, H, Q, Dv].
        *args, **kwargs
            Not used.

        Returns
        -------
        tuple of RaggedPairs
            All keys and values, for attention.
        """
        self._check_assigned()
        self._expect(len(key_states))
        self._tail.append(key_states, value_states, self.most)
        keys, values = self._tail.buffers
        self.rows = self.rows.read_as(keys.dtype, values.dtype)
        pairs = self.keys
        return pairs, pairs.beside("values")

    def get_seq_length(self) -> int:
        """Positions seen so far, those of evicted pairs and of left padding included."""
        keys = self._assigned.get("keys")
        return self._length if keys is None else keys.length

    def get_mask_sizes(self, fed: Tensor | int) -> tuple[int, int]:
        """Length and offset of the mask over all positions, before the new tokens are appended."""
        return self.get_seq_length() + num_fed(fed), offset_of(self, 0)

    def _copy_buffers(self) -> None:
        self._check_assigned()
        self._tail = copy.copy(self._tail)

    def _forget(self, count: int) -> None:
        into = max(count - self.tail_length + self._tail.waiting, 0)
        if into:  # a row of fewer pairs than that is padding there
            stored = (count - self.tail_length + self._skips()).clamp(min=0)[:, None]
            self.end = torch.maximum(self.end - stored, self.begin).to(self.end.dtype)
            if self.positions is not None:
                self.positions = pack(self._stays()[..., : self.context_length - into])
            self._stored_counts = None
        self._tail.forget(min(count, self.tail_length))

    def _select_rows(self, indices: Tensor) -> None:
        """Give batch row b the pairs of row ``indices[b]``, sharing what is stored."""
        self._check_assigned()
        indices = indices.to(self.device)
        self.begin, self.end = self.begin[indices], self.end[indices]
        if self.positions is not None:
            self.positions = self.positions[indices]
        self._tail.select(indices)
        self._stored_counts = None
        self.num_moves += 1

    def _give_back(self) -> None:
        """Copy what is left, if that is less than what is stored."""
        self._tail.trim()
        heads = self.begin.shape
        # Rows that share what is stored go on sharing it.
        bounds = torch.cat([self.begin, self.end], 1)
        own, row = torch.unique(bounds, return_inverse=True, dim=0)
        begin, end = own.chunk(2, 1)
        counts = (end - begin).flatten().long()
        ends = counts.cumsum(0)
        left = int(counts.sum())
        if left >= len(self.rows):
            return
        # Of each pair, how far it moves, added to where it comes to stand.
        shift = (begin.flatten() - (ends - counts)).repeat_interleave(counts, output_size=left)
        place = torch.arange(left, device=self.device) + shift.to(self.device)
        self.rows = self.rows.select(place)
        self.end = ends.to(self.end.dtype).view_as(end)[row].view(heads)
        self.begin = (ends - counts).to(self.begin.dtype).view_as(begin)[row].view(heads)

    def offload(self) -> None:
        """Move the pairs to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move offloaded pairs back to where the head tables are."""
        if self.device != self.begin.device:
            self._move(self.begin.device)

    def _move(self, device: torch.device | str) -> None:
        self.rows = self.rows.move(device)
        self._tail.move(device)

    # -- what moekv asks of a layer ----------------------------------------------------------------

    @property
    def follows_masks(self) -> bool:
        """Whether each pair knows its position, and holds nothing of others."""
        return self.positions is not None and self.rows.bias is None

    def stored_of(self, seen: Tensor, num_heads: int) -> Tensor:
        """Take the columns of the stored pairs out of a mask over the context.

        Parameters
        ----------
        seen : Tensor [B or 1, Hq or 1, Q or 1, T], bool
        num_heads : int
            Query heads, Hq.

        Returns
        -------
        Tensor [B, Hq, Q or 1, L], bool
            For pairs as :meth:`padded` has them, without the tail.
        """
        stays = self._stays()
        stored = positions_of(stays, int(stays.sum(-1).max()))[:, :, None].to(seen.device)
        stored = stored.repeat_interleave(num_heads // self.num_heads, 1)
        sizes = list(map(max, seen.shape[:-1], stored.shape[:-1]))
        return seen.expand(*sizes, -1).gather(-1, stored.expand(*sizes, -1))

    @property
    def num_heads(self) -> int:
        """KV heads."""
        return self.begin.shape[1]

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.begin.shape[0]

    @property
    def bytes_per_pair(self) -> int:
        """Bytes of one key and its value in the tail."""
        return (self.rows.key_dim + self.rows.value_dim) * self.dtype.itemsize

    @property
    def stored_bytes_per_pair(self) -> int:
        """Bytes of one key and its value where they are stored, scales included."""
        return self.rows.bytes_per_pair

    def bytes_beside(self) -> dict[str, int]:
        """Bytes of scales, of biases, and of the tail, spare capacity included."""
        scales, bias = self.rows.scales, self.rows.bias
        return {
            "scales": 0 if scales is None else storage_bytes(scales),
            "biases": 0 if bias is None else storage_bytes(bias),
            "tail": self.nbytes - storage_bytes(*self.rows.tensors),
        }

    def stored_size(self) -> tuple[int, int]:
        """Count the bytes and the numbers of the stored pairs."""
        rows = self.rows
        return len(rows) * rows.bytes_per_pair, len(rows) * (rows.key_dim + rows.value_dim)

    def gain(self, pairs: str) -> Fraction:
        """Count the pairs that it will store in the bytes of one dense pair."""
        biased = self.rows.bias is not None
        pairs = pairs if self.pairs == "16" else self.pairs
        return gain(pairs, self.tail_keys, self.tail_values, biased=biased)

    def allowed_bytes(self, most: int) -> int:
        """Bytes of `most` pairs of each head, those that are to come as the model makes them."""
        saved = self.bytes_per_pair - self.stored_bytes_per_pair
        beside = self.num_heads * sum(self._tail.skipped)  # of tokens that wait in other rows
        stored = sum(self.stored_pairs) * saved
        return super().allowed_bytes(most) + beside * self.bytes_per_pair - stored

    def count_pairs(self, padding: list[int]) -> list[int]:
        """Count the real pairs of each row, all heads together. Waits for the device if new."""
        tails = self._tail_counts(padding)
        return [
            stored + self.num_heads * tail
            for stored, tail in zip(self.stored_pairs, tails, strict=True)
        ]

    def _tail_counts(self, padding: Sequence[int]) -> list[int]:
        """Count the tokens that each row has in the tail, but for padding."""
        begin = self._tail_begin
        return [
            self.tail_length - max(skipped, p - begin)
            for skipped, p in zip(self._tail.skipped, padding, strict=True)
        ]

    def num_waiting(self, padding: Sequence[int]) -> int:
        """Count the tokens of the rows, but for padding, that wait for their row's compression."""
        since = self.tail_length - self._tail.waiting
        return sum(max(count - since, 0) for count in self._tail_counts(padding))

    def head_lengths(self, padding: Sequence[int]) -> list[list[int]]:
        """Count the real pairs of each row's heads. Waits for the device if new."""
        tails = self._tail_counts(padding)
        return [
            [n + tail for n in row] for row, tail in zip(self.stored_counts, tails, strict=True)
        ]

    @property
    def stored_keys(self) -> Tensor:
        """[N, D], the stored keys; their codes where they are quantised."""
        return self.rows.keys

    @property
    def stored_values(self) -> Tensor:
        """[N, Dv], the stored values; their codes where they are quantised."""
        return self.rows.values

    @property
    def tail_length(self) -> int:
        """Tokens in the tail, S: those since compression, behind such as wait for their row's."""
        return self._tail.length

    @property
    def tail(self) -> Tail:
        """The tail."""
        return self._tail

    @property
    def tail_keys(self) -> Tensor:
        """[B, H, S, D], the keys of the tail."""
        return self._tail.keys

    @property
    def tail_values(self) -> Tensor:
        """[B, H, S, Dv], the values of the tail."""
        return self._tail.values

    @property
    def stored_counts(self) -> list[list[int]]:
        """Stored pairs of each head, B times H. Waits for the device if new: `count_stored`."""
        if self._stored_counts is None:
            count_stored([self])
        assert self._stored_counts is not None
        return self._stored_counts

    @property
    def stored_pairs(self) -> list[int]:
        """Stored pairs of each batch row, all heads together. Waits for the device if new."""
        return list(map(sum, self.stored_counts))

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's storages, spare capacity included."""
        return storage_bytes(*self.rows.tensors, *self._tail.buffers)

    def held_pairs(self) -> tuple[Tensor, Tensor]:
        """Copy the pairs that are held, without their biases."""
        return self.padded()[:2]

    def to_dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copy the pairs into padded tensors, with a warning if they have biases.

        Attention over these tensors is not that of the layer then.

        Returns
        -------
        keys, values : Tensor
            [B, H, L, D] and [B, H, L, Dv], L the longest head; the pairs of a head stand at the
            right end, zeros before them.
        lengths : Tensor
            [B, H] int64, pairs of each head.
        """
        if self.rows.bias is not None:
            warnings.warn(
                "keys and values alone are not all that the layer holds: evicted pairs have joined "
                "some, whose logits have biases (layer.rows.bias), and no dense tensor has them; "
                "compress with fold=False for a layer without",
                stacklevel=2,
            )
        keys, values, _, lengths = self.padded()
        return keys, values, lengths

    def padded(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Copy the pairs into padded tensors, as :meth:`to_dense`, and their biases [B, H, L]."""
        keys, values, bias, lengths = self.beside_tail()
        if self._tail.skips is None:
            return keys, values, bias, lengths
        # What a row has stored moves to where the rest of it begins.
        longest, skips = keys.shape[2], self._skips()[:, None, None]
        column = torch.arange(longest, device=self.device)
        place = torch.where(column < longest - self.tail_length + skips, column - skips, column)
        lengths = lengths - skips[..., 0]
        real = column >= longest - lengths[..., None]
        place = place.clamp(min=0).expand_as(real)
        keys, values = (
            x.gather(2, place[..., None].expand_as(x)).masked_fill(~real[..., None], 0)
            for x in (keys, values)
        )
        bias = None if bias is None else bias.gather(2, place).masked_fill(~real, 0)
        held = zip(self.stored_counts, self._tail.skipped, strict=True)
        least = longest - self.tail_length - max(max(row) - skipped for row, skipped in held)
        bias = None if bias is None else bias[..., least:]
        return keys[:, :, least:], values[:, :, least:], bias, lengths

    def beside_tail(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Copy the pairs as :meth:`padded`, with the tail behind them as it is.

        Of rows that lack some of it, too: see ``Tail.seen``.
        """
        self._check_assigned()
        kept = (self.end - self.begin).long()
        longest = max(map(max, self.stored_counts))
        column = torch.arange(longest, device=self.device) - (longest - kept)[..., None]
        row = (self.begin[..., None] + column).clamp(0, max(len(self.rows) - 1, 0))
        dense = []
        for stored, tail in zip(self.rows.dense(), (self.tail_keys, self.tail_values), strict=True):
            pairs = stored[row].masked_fill((column < 0)[..., None], 0)
            dense.append(torch.cat([pairs, tail], dim=2))
        bias = self.rows.bias
        if bias is not None:
            bias = functional.pad(bias[row].masked_fill(column < 0, 0), (0, self.tail_length))
        return dense[0], dense[1], bias, kept + self.tail_length


def _owners(counts: Tensor, group: int, total: int) -> Tensor:
    """Say to which head, or group of heads, each pair belongs, by the pairs of the heads."""
    head = torch.arange(len(counts), device=counts.device)
    return (head // group).repeat_interleave(counts, output_size=total)


def count_stored(layers: Iterable[CacheLayerMixin | None]) -> None:
    """Count the stored pairs of each head of ragged layers that are new, for the host.

    One wait for all of them, where each would wait for itself.
    """
    new = [x for x in layers if isinstance(x, RaggedLayer) and x._stored_counts is None]
    if not new:
        return
    counts = [(x.end - x.begin).flatten().to(new[0].begin.device) for x in new]
    numbers = iter(torch.cat(counts).tolist())
    for layer in new:
        batch, num_heads = layer.begin.shape
        layer._stored_counts = [list(islice(numbers, num_heads)) for _ in range(batch)]

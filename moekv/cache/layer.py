"""The base class of compressed cache layers."""

from __future__ import annotations

import copy
import functools
import operator
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from moekv.budget import Kept
from moekv.cache.buffers import size_of
from moekv.cache.masks import Offset, check_rows
from moekv.cache.recent import RecentStates
from moekv.cache.rows import gain, storable
from moekv.models.hooks import CROPS_BY_COUNT, wrap_method


class CompressedLayer(CacheLayerMixin):
    """A layer of a user's ``DynamicCache`` from which pairs have left, or may leave.

    It reports the **true length**, that of what was fed, evicted pairs and left padding included:
    so masks, position ids, ``crop``, a second ``generate`` over the cache and assisted decoding
    count as they do without compression. New tokens follow dense behind what was compressed.

    A layer holds data alone: the press decides what is evicted.

    Parameters
    ----------
    backend : str
        Which implementation of ``ragged_attention`` serves this layer.

    Attributes
    ----------
    context_length : int
        Positions that were compressed together; 0: none yet.
    run : int
        Last positions of these that no head lacks: as far as a crop may reach into them.
    most : int or None
        Pairs to come, if known, that will not be exceeded.
    recent : RecentStates or None
        Last inputs of the attention layer, where compression will go on.
    counted : tuple
        Statistics that count pairs of this layer as kept, and how many.
    first : Tensor [B], int64, or None
        Positions of each row before which nothing is stored: its padding. None: there are none.
    notes : CompressedLayer or None
        What a calibrated router recorded for each pair, as a layer of its own.
    reader : str or None
        Identity of that router, see ``CalibratedRouter.reader``.
    """

    def __init__(self, *, backend: str = "auto") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.backend = backend
        self.context_length = 0
        self.run = 0
        self.most: int | None = None
        self.recent: RecentStates | None = None
        self.counted: tuple[object, int] = (None, 0)
        self.first: Tensor | None = None
        self.notes: CompressedLayer | None = None
        self.reader: str | None = None
        # Pairs that were handed out before one of these are not what the layer holds now: pairs
        # left or rows were selected; other tokens took the place of some that were cropped.
        self.num_moves = 0
        self.num_branches = 0
        self._is_cropped = False

    def __copy__(self) -> CompressedLayer:
        """Copy what is written to in place: as with other layers, each goes on by itself."""
        layer = type(self).__new__(type(self))
        layer.__dict__ |= self.__dict__
        layer._copy_buffers()
        layer.notes, layer.recent = copy.copy(self.notes), copy.deepcopy(self.recent)
        return layer

    # -- what a kind of layer provides -------------------------------------------------------------

    is_ragged = False
    """Whether heads may hold different numbers of pairs, and tokens since a compression are stored
    apart: then `most` counts these alone."""

    @property
    @abstractmethod
    def follows_masks(self) -> bool:
        """Whether a later mask may hide any position of what was compressed."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """KV heads."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of this layer's storages, spare capacity included."""

    @property
    @abstractmethod
    def bytes_per_pair(self) -> int:
        """Bytes of one key and its value, as the model makes them."""

    @property
    def stored_bytes_per_pair(self) -> int:
        """Bytes of one key and its value that were compressed."""
        return self.bytes_per_pair

    def allowed_bytes(self, most: int) -> int:
        """Bytes of `most` pairs of each head, those that are to come as the model makes them."""
        return self.batch_size * self.num_heads * most * self.bytes_per_pair

    def bytes_beside(self) -> dict[str, int]:
        """Bytes of ``"scales"`` and of the ``"tail"`` of tokens since, where they are apart."""
        return {}

    def stored_size(self) -> tuple[int, int]:
        """Count the bytes, scales included, and the numbers of the pairs that were compressed."""
        return size_of(self.held_pairs())

    def gain(self, pairs: str) -> Fraction:
        """Count the pairs that it will store in the bytes of one dense pair.

        Parameters
        ----------
        pairs : str
            How it is going to store them, if they are not quantised already.
        """
        return gain(pairs, *self.held_pairs())

    @abstractmethod
    def count_pairs(self, padding: list[int]) -> list[int]:
        """Count the real pairs of each row, all heads together.

        Parameters
        ----------
        padding : list of B ints
            Padding at the left of each row, in positions.
        """

    @abstractmethod
    def head_lengths(self, padding: Sequence[int]) -> list[list[int]]:
        """Count the real pairs of each row's heads, B times H. May wait for the device.

        Parameters
        ----------
        padding : sequence of B ints
            Padding at the left of each row, in positions.
        """

    @abstractmethod
    def held_pairs(self) -> tuple[Tensor, Tensor]:
        """Show the pairs that are held. May copy them, and wait for the device.

        Returns
        -------
        keys, values : Tensor
            [B, H, L, D] and [B, H, L, Dv]; the pairs of a shorter head stand at the right end.
        """

    def all_storable(self) -> Tensor:
        """Say whether each pair can be stored in any format: bool, a scalar on the device."""
        return storable(*self.held_pairs()).all()

    @abstractmethod
    def recompress(self, kept: Kept, pairs: str = "16") -> None:
        """Leave only the chosen pairs of those that the layer holds.

        Parameters
        ----------
        kept : Kept
            Of the pairs as they stand in a dense tensor, those of a shorter head at its right.
        pairs : str
            How a ragged layer stores them, if they are not quantised already.
        """

    @abstractmethod
    def _copy_buffers(self) -> None:
        """Copy the memory in which new tokens are written."""

    @abstractmethod
    def _forget(self, count: int) -> None:
        """Drop the last pairs of every head, which all of them have."""

    def hold_run(self, run: int | None) -> None:
        """Set how many of the last positions no head lacks; None: all of them."""
        self.run = self.context_length if run is None else run

    # -- what transformers asks of every layer -----------------------------------------------------

    is_sliding = False
    is_croppable = True

    def get_max_length(self) -> int:
        """Return -1: it grows without limit."""
        return -1

    get_max_cache_shape = get_max_length  # as transformers once called it

    def crop(self, max_length: int) -> None:
        """Forget the tokens after the first ``max_length``, or the last ``-max_length``.

        0 is that of the transformers that runs: the first 0, or the last 0.

        Raises
        ------
        TypeError
            It is no integer.
        ValueError
            If that would reach into the compressed context, where heads end with different tokens.
        """
        length, wanted = self.get_seq_length(), self.left_by(max_length)
        if wanted >= length:
            return
        self.check_crop(wanted)
        self._forget(length - wanted)
        self._end_at(wanted)

    def left_by(self, max_length: int) -> int:
        """Count the positions that ``crop(max_length)`` leaves, or more than there are."""
        max_length = operator.index(max_length)  # or nothing is cropped
        by_count = max_length < 0 or (max_length == 0 and CROPS_BY_COUNT)
        return max(self.get_seq_length() + max_length, 0) if by_count else max_length

    def check_crop(self, wanted: int) -> None:
        """Raise the error of :meth:`crop` if its last positions cannot be forgotten."""
        if self.context_length - wanted > self.run:
            raise ValueError(
                f"cannot crop to {wanted} positions: the first {self.context_length} were "
                "compressed together, only tokens after them can be removed"
                + (f", and the last {self.run} of them" if self.run else "")
                + ". (Assisted decoding in a press's block takes back what it has guessed: there "
                "have it guess fewer tokens, evict less, or assist behind the block.)"
            )

    def _end_at(self, wanted: int) -> None:
        """Note that the tokens after the first ``wanted`` have been forgotten."""
        self._is_cropped = True
        if (into := self.context_length - wanted) > 0:
            self.context_length, self.run = wanted, self.run - into
            if self.first is not None:  # of a row all padding is left
                self.first = self.first.clamp(max=wanted)
        if self.notes is not None:
            self.notes.crop(wanted)

    def keeps_all(self, length: int) -> bool:
        """Whether a slice of the first ``length`` positions, assigned back, leaves all as it is.

        So kvpress's pipeline takes an answer out of a cache. Where compression goes on, pairs of
        the context may have left for those of the answer, and none of it can go: it warns.
        """
        if self.recent is None or self.context_length - length <= self.run:
            return False
        warnings.warn(
            f"expected to keep the first {length} positions alone, got a cache that has been "
            "compressed behind them: the tokens after them stay in it",
            stacklevel=4,
        )
        return True

    def reset(self) -> None:
        """Refuse: what was evicted cannot be emptied in place.

        Raises
        ------
        RuntimeError
            Always. Begin a new text with a new cache.
        """
        raise RuntimeError("a compressed cache cannot be reset; begin a new text with a new cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give batch row b the pairs of row ``beam_idx[b]``."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        rows = torch.arange(self.batch_size, device="cpu")
        self._select(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows that ``indices`` names, and give the memory of others back.

        As an index of tensors: integers, or a mask, in a tensor or a list.
        """
        if not isinstance(indices, Tensor):  # `as_tensor` would move one to the default device
            indices = torch.tensor(indices, device="cpu")
        self._select(indices)
        self._give_back()
        if self.notes is not None:
            self.notes._give_back()

    def _select(self, indices: Tensor) -> None:
        self._select_rows(indices)
        if self.first is not None:
            self.first = self.first[indices.to(self.first.device)]
        if self.recent is not None:
            self.recent.select(indices)
        if self.notes is not None:
            self.notes._select(indices)

    def _give_back(self) -> None:
        """Free the memory of pairs that no row has. May wait for the device."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Rows of the batch."""

    @abstractmethod
    def _select_rows(self, indices: Tensor) -> None:
        """Give batch row b the pairs of row ``indices[b]``."""

    def taken(self) -> tuple[int, int]:
        """Return when pairs are handed out, for :meth:`has_lost`."""
        return self.num_moves, self.num_branches

    def _expect(self, rows: int) -> None:
        """Prepare for new tokens of some rows, which may replace cropped ones.

        A single text may be continued in several rows (``num_return_sequences``): all read it.

        Raises
        ------
        ValueError
            The cache has other rows.
        """
        if rows > self.batch_size == 1:
            self.batch_repeat_interleave(rows)
        check_rows(self.batch_size, rows)
        if self._is_cropped:
            self.num_branches, self._is_cropped = self.num_branches + 1, False

    def has_lost(self, taken: tuple[int, int], length: int) -> bool:
        """Whether the layer no longer holds the first positions as they were handed out earlier.

        Then pairs that are assigned to it bring them back, and what was noted of others goes.

        Raises
        ------
        ValueError
            Pairs have left the layer since, or its rows are others.
        """
        self.check_taken(taken)
        held = self.get_seq_length() if taken == self.taken() else self.context_length
        if length <= held:
            return False
        self._branch_off()
        return True

    def check_taken(self, taken: tuple[int, int]) -> None:
        """Raise the error of :meth:`has_lost` if pairs of then cannot come back."""
        if taken[0] != self.num_moves:
            raise self._too_old("it was last compressed or its rows were selected")

    def _too_old(self, since: str) -> ValueError:
        return ValueError(
            f"expected pairs that the layer has handed out since {since}, got older ones, which "
            "are not kept: copy.deepcopy(cache) keeps a cache as it is"
        )

    def check_halves(self) -> None:
        """Raise if one half alone was assigned, so that keys and values differ in length."""
        assert self.keys is not None and self.values is not None
        keys, values = self.keys.shape[2], self.values.shape[2]
        if keys != values:
            raise ValueError(
                f"expected keys and values of as many positions, got {keys} and {values} of a "
                "layer to which one half was assigned: assign the other as well"
            )

    def _branch_off(self) -> None:
        """Note that other tokens take the place of those that are held."""
        self.notes = self.recent = None
        self.num_branches += 1

    # -- notes -------------------------------------------------------------------------------------

    def whole_notes(self) -> CompressedLayer | None:
        """Return the notes if they are of the pairs that are held, no more and no fewer."""
        notes = self.notes
        whole = notes is not None and notes.get_seq_length() == self.get_seq_length()
        return notes if whole else None


def crop_all_layers_or_none() -> None:
    """Have a cache with compressed layers ask all of them before it crops one. Idempotent.

    Other layers crop first, and are as they were if one of them refuses (a sliding window that has
    been exceeded): what they hold is replaced, never written over.
    """
    wrap_method(Cache, "crop", _cropping_all)


def _cropping_all(crop: Callable[..., None]) -> Callable[..., None]:
    def crop_all(self: Cache, *args: Any, **kwargs: Any) -> None:
        compressed = [layer for layer in self.layers if isinstance(layer, CompressedLayer)]
        others = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        length = next(iter((*args, *kwargs.values())), None)
        if not compressed or length is None:
            crop(self, *args, **kwargs)
            return
        for layer in compressed:
            layer.check_crop(layer.left_by(length))
        layers, before = self.layers, [dict(layer.__dict__) for layer in others]
        self.layers = [*others, *compressed]
        try:
            crop(self, *args, **kwargs)
        except Exception:
            for other, held in zip(others, before, strict=True):
                other.__dict__ = held
            raise
        finally:
            self.layers = layers

    return crop_all


def repeat_all_layers() -> None:
    """Have a cache with compressed layers repeat its other layers as those are. Idempotent.

    One text may be continued in several rows, and transformers repeats no layer by itself. Layers
    with windows are repeated as they are fed; layers of states, which models read before, as the
    forward's mask is made.
    """
    wrap_method(Cache, "update", _repeating_all)
    wrap_method(Cache, "get_mask_sizes", _repeating_states)


def _repeating_all(update: Callable[..., Any]) -> Callable[..., Any]:
    def update_all(
        self: Cache, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **k: Any
    ) -> Any:
        if not torch.compiler.is_compiling() and layer_idx < len(self.layers):
            _repeat_beside_compressed(self, layer_idx, len(key_states))
        return update(self, key_states, value_states, layer_idx, *args, **k)

    return update_all


def _repeating_states(sizes: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    def sizes_of_all(self: Cache, *args: Any, **k: Any) -> tuple[int, int]:
        length, offset = sizes(self, *args, **k)
        if isinstance(offset, Offset):
            offset.expect = functools.partial(_expect_rows, self)
        return length, offset

    return sizes_of_all


def _expect_rows(cache: Cache, rows: int) -> None:
    """Prepare layers of states for new tokens of some rows, as compressed ones prepare themselves.

    Raises
    ------
    ValueError
        The cache has other rows.
    """
    layers: list[Any] = cache.layers
    for layer in layers:
        is_compressed = isinstance(layer, CompressedLayer)
        held = layer.batch_size if is_compressed else _rows_of_states(layer)
        if held > 1:
            check_rows(held, rows)
        if held == 1 < rows and not is_compressed:
            layer.reorder_cache(torch.zeros(rows, dtype=torch.long, device="cpu"))


def _rows_of_states(layer: Any) -> int:
    """Count the rows of a layer of states; 0: it has none yet, or is none."""
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        # Several of a kind in newer ones
        for state in states.values() if isinstance(states, dict) else [states]:
            if isinstance(state, Tensor):
                return len(state)
    return 0


def _repeat_beside_compressed(cache: Cache, index: int, rows: int) -> None:
    layer: Any = cache.layers[index]
    if isinstance(layer, CompressedLayer) or not hasattr(layer, "batch_repeat_interleave"):
        return
    keys = getattr(layer, "keys", None)
    held = len(keys) if isinstance(keys, Tensor) and keys.dim() == 4 else 0
    if not 0 < held < rows or not any(isinstance(x, CompressedLayer) for x in cache.layers):
        return
    if held > 1:
        check_rows(held, rows)
    else:
        layer.batch_repeat_interleave(rows)

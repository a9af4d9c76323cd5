"""Pairs stored back to back: one row for each pair, in 16 bits or quantised.

A format defines how a key's and a value's channels are stored. ``"16"``: unchanged. Others are
codes of 8 or 4 bits with scales beside them, see ``moekv.ops.quantize_pairs``. Codes are copied as
they are wherever rows move, so that a pair is rounded once, however often its layer is compressed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from moekv import ops

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Rows:
    """N pairs in one format.

    Attributes
    ----------
    pairs : str
        One of ``moekv.ops.PAIRS``.
    keys, values : Tensor
        [N, D] and [N, Dv]; where they are quantised, their codes [N, KB] and [N, VB], uint8.
    scales : Tensor [N, M], float16, or None
        What else is known of each row; None: nothing.
    key_dim, value_dim : int
        D and Dv.
    dtype : torch.dtype
        Of the pairs as they are read.
    bias : Tensor [N], float16, or None
        What is added to a row's logit, where evicted pairs have joined some: see
        ``moekv.ops.fold_pairs``. None: nothing.
    """

    pairs: str
    keys: Tensor
    values: Tensor
    scales: Tensor | None
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    bias: Tensor | None = None

    @classmethod
    def of(
        cls,
        keys: Tensor,
        values: Tensor,
        pairs: str = "16",
        *,
        bias: Tensor | None = None,
        owner: Tensor | None = None,
        checked: bool = False,
        backend: str = "auto",
    ) -> Rows:
        """Take pairs over, or quantise them.

        Parameters
        ----------
        keys, values : Tensor
            [N, D] and [N, Dv].
        pairs : str
            One of ``moekv.ops.PAIRS``.
        bias : Tensor [N], float16, optional
            As of the attribute.
        owner : Tensor [N], int64, optional
            As of :meth:`or_wide`.
        checked : bool
            As of :meth:`or_wide`.
        backend : str
            Of ``quantize_pairs``.

        Returns
        -------
        Rows
            As of :meth:`or_wide`.
        """
        wide = cls("16", keys, values, None, keys.shape[1], values.shape[1], keys.dtype, bias)
        rows = wide.in_format(pairs, backend=backend)
        return rows.or_wide(lambda: wide, owner, checked=checked)

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.keys)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that they consist of."""
        parts = self.keys, self.values, self.scales, self.bias
        return tuple(part for part in parts if part is not None)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.keys.device

    @property
    def bytes_per_pair(self) -> int:
        """Bytes of a row, scales and bias included."""
        return sum(math.prod(part.shape[1:]) * part.itemsize for part in self.tensors)

    def _each(self, function: Callable[..., Tensor], *others: Rows) -> Rows:
        """Apply a function to each tensor, and to those of other rows in the same format."""
        parts = (
            [getattr(rows, name) for rows in (self, *others)]
            for name in ("keys", "values", "scales", "bias")
        )
        keys, values, scales, bias = (
            None if own is None else function(own, *more) for own, *more in parts
        )
        assert keys is not None and values is not None
        return replace(self, keys=keys, values=values, scales=scales, bias=bias)

    def select(self, rows: Tensor) -> Rows:
        """Copy some rows, as they are."""
        return self._each(lambda part: part.index_select(0, rows))

    def move(self, device: torch.device | str) -> Rows:
        """Give the same rows on a device."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def read_as(self, key_dtype: torch.dtype, value_dtype: torch.dtype) -> Rows:
        """Give the same rows, to be read in other dtypes."""
        if self.pairs != "16":
            dtype = torch.promote_types(key_dtype, value_dtype)
            return self if dtype == self.dtype else replace(self, dtype=dtype)
        if (key_dtype, value_dtype) == (self.keys.dtype, self.values.dtype):
            return self
        keys, values = self.keys.to(key_dtype), self.values.to(value_dtype)
        return replace(self, keys=keys, values=values, dtype=keys.dtype)

    @property
    def readable(self) -> bool:
        """Whether each pair could be stored in this format: see ``storable``. Waits for the device.

        One that could not has NaN for scales.
        """
        return self.scales is None or bool(self.scales.isfinite().all())

    def join(self, keys: Tensor, values: Tensor, *, backend: str = "auto") -> Rows:
        """Give the rows with further pairs [n, D] and [n, Dv] behind them, in their format."""
        if not len(keys):
            return self
        bias = None if self.bias is None else self.bias.new_zeros(len(keys))
        more = Rows("16", keys, values, None, self.key_dim, self.value_dim, keys.dtype, bias)
        more = more.in_format(self.pairs, backend=backend)
        # Its cast knows no scales of float16 on CPUs, and nothing is to be cast.
        with torch.autocast(self.device.type, enabled=False):
            return self._each(lambda *parts: torch.cat(parts), more)

    def in_format(self, pairs: str, *, backend: str = "auto") -> Rows:
        """Quantise rows that are not; others keep the format that they have."""
        if pairs == self.pairs or self.pairs != "16":
            return self
        keys, values = self.keys.detach(), self.values.detach()
        parts = ops.quantize_pairs(keys, values, pairs=pairs, backend=backend)
        return Rows(pairs, *parts, self.key_dim, self.value_dim, self.dtype, self.bias)

    def or_wide(
        self,
        make: Callable[[], Rows],
        owner: Tensor | None = None,
        *,
        checked: bool = False,
    ) -> Rows:
        """Return these rows; in 16 bits, with a warning, if one of them could not be stored.

        Then other rows of the batch are rounded as their format rounds them: what a row answers is
        what it answers alone, where nothing spoils its format.

        Parameters
        ----------
        make : callable
            Gives the same pairs in 16 bits.
        owner : Tensor [N], int64, optional
            The row of the batch that each pair belongs to; None: there is one.
        checked : bool
            Whether all pairs are known to be ``storable``, so that nothing waits to see that.
        """
        if checked or self.readable:
            return self
        _logger.warning(
            "A layer keeps a pair that pairs=%r cannot store (NaN, infinity or a number too "
            "large for scales of float16): its pairs stay in 16 bits, in more bytes",
            self.pairs,
        )
        wide = make()
        if owner is None:
            return wide
        assert self.scales is not None
        spoils = ~self.scales.isfinite().all(1)
        spoiled = torch.isin(owner, owner[spoils])[:, None]
        keys, values = (
            torch.where(spoiled, own, read.to(own.dtype))
            for own, read in zip(wide.dense(), self.dense(), strict=True)
        )
        return replace(wide, keys=keys, values=values)

    def widened(self) -> Rows:
        """Give the rows as they are read, in 16 bits."""
        dims = self.key_dim, self.value_dim
        return Rows("16", *self.dense(), None, *dims, self.dtype, self.bias)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Read the pairs [N, D] and [N, Dv], without biases. In 16 bits nothing is copied."""
        if self.scales is None:
            return self.keys, self.values
        keys, values = ops.dequantize_pairs(
            self.keys,
            self.values,
            self.scales,
            pairs=self.pairs,
            head_dim=self.key_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
        )
        return keys, values


def check_pairs(
    pairs: str,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> None:
    """Raise unless a quantised format can serve pairs of these sizes and dtype.

    Raises
    ------
    ValueError
        It cannot.
    RuntimeError
        The backend cannot, or is not available.
    """
    if backend == "cuda" and dtype == torch.float32:
        raise RuntimeError(
            f"expected keys and values of float16 or bfloat16 for pairs {pairs!r} with backend "
            "'cuda', got torch.float32; backend 'auto' serves them by PyTorch"
        )
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"expected keys and values of float32, float16 or bfloat16 for pairs {pairs!r}, got "
            f"{dtype}"
        )
    ops.pair_layout(pairs, key_dim, value_dim)
    nothing = torch.empty(0, dtype=dtype, device=device)
    keys, values = nothing.view(0, key_dim), nothing.view(0, value_dim)
    Rows.of(keys, values, pairs, checked=True, backend=backend)


def gain(pairs: str, keys: Tensor, values: Tensor, *, biased: bool = False) -> Fraction:
    """Count the stored pairs that take the bytes of one dense pair of a layer.

    Parameters
    ----------
    pairs : str
        How they are stored.
    keys, values : Tensor [..., D] and [..., Dv]
        In the dtype of the dense layer.
    biased : bool
        Whether each has a bias.
    """
    key_dim, value_dim = keys.shape[-1], values.shape[-1]
    stored = dense = key_dim * keys.itemsize + value_dim * values.itemsize
    if pairs != "16":
        stored = ops.pair_layout(pairs, key_dim, value_dim).num_bytes
    return Fraction(dense, stored + biased * torch.float16.itemsize)


def storable(keys: Tensor, values: Tensor) -> Tensor:
    """Return which pairs [...] of keys [..., D] and values [..., Dv] any format can store.

    Those without NaN, infinity or numbers beyond float16, of which scales are.
    """
    largest = torch.maximum(keys.abs().amax(-1), values.abs().amax(-1))
    return largest <= torch.finfo(torch.float16).max


def read_flags(flags: Sequence[Tensor | None]) -> list[bool]:
    """Read what was found of each layer; None: False. One wait for all of them."""
    known = [flag for flag in flags if flag is not None]
    if not known:
        return [False] * len(flags)
    read = iter(torch.stack([flag.to(known[0].device) for flag in known]).tolist())
    return [flag is not None and next(read) for flag in flags]

"""Later hit rates: attention of queries after a compression, on the pairs that were retained."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekv.budget import Kept
from moekv.cache.layer import CompressedLayer
from moekv.models.ranks import ALONE, Ranks
from moekv.models.watching import Asked
from moekv.press.held import Held

EVERY = 16
"""Decoding steps of a cache between two measurements, of which the first is at the first step."""


def packed(wanted: Tensor) -> Tensor | None:
    """Pack which experts would retain a pair.

    Parameters
    ----------
    wanted : Tensor [E, ...], bool

    Returns
    -------
    Tensor [...], integers, or None
        Bit e of a pair: expert e. None: more experts than an integer has bits.
    """
    kinds = {8: torch.uint8, 15: torch.int16, 31: torch.int32, 63: torch.int64}
    dtype = next((kind for most, kind in kinds.items() if len(wanted) <= most), None)
    if dtype is None:
        return None
    bits = torch.zeros_like(wanted[0], dtype=dtype)
    for e, row in enumerate(wanted):
        bits += row.to(dtype) << e
    return bits


@dataclass
class Wanted:
    """Which of a layer's stored pairs each expert alone would have retained.

    Attributes
    ----------
    bits : Tensor [n], integers
        See :func:`packed`; of the retained pairs, head by head.
    counts : Tensor [B, H], integers
        Pairs of each head.
    names : tuple of E str
        Of the experts.
    num_moves : int
        Of the layer then. Another number now: it was compressed again, or rows were selected.
    length : int
        Positions that were compressed together.
    num_steps : int
        Decoding steps since then.
    """

    bits: Tensor
    counts: Tensor
    names: tuple[str, ...]
    num_moves: int
    length: int
    num_steps: int = 0

    def dense(self, longest: int) -> Tensor:
        """Return the bits as [B, H, L], those of a shorter head at the right, behind zeros.

        `longest`: pairs of the longest head, L.
        """
        place = torch.arange(longest, device=self.bits.device) - longest
        ends = self.counts.flatten().cumsum(0).view(self.counts.shape)
        row = (ends[..., None] + place).clamp(min=0)
        return self.bits[row].masked_fill(place < -self.counts[..., None], 0)


class Later:
    """Measures later hit rates of the caches of one block.

    Holds a byte or two for each retained pair, until the cache or the block is gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: weakref.WeakKeyDictionary[Any, Wanted] = weakref.WeakKeyDictionary()

    def remember(
        self, layer: Any, bits: Tensor | None, kept: Kept | None, names: Sequence[str]
    ) -> None:
        """Note which experts would have retained each pair that a layer now holds.

        Parameters
        ----------
        layer : CacheLayerMixin
            Just compressed; static ones are not followed.
        bits : Tensor [B, H, T], integers, or None
            Of the pairs before, see :func:`packed`. None: not needed.
        kept : Kept or None
            The retained ones of these. None: all.
        names : sequence of E str
            Of the experts.
        """
        if bits is None or kept is None or not isinstance(layer, CompressedLayer):
            return
        stay = bits.flatten().index_select(0, kept.rows())
        counts = kept.counts()
        wanted = Wanted(stay, counts, tuple(names), layer.num_moves, layer.context_length)
        with self._lock:
            self._wanted[layer] = wanted

    def is_due(self, layer: Any) -> bool:
        """Count a step over a cache, by its first layer; return whether to measure it."""
        with self._lock:
            wanted = self._wanted.get(layer)
            if wanted is None:
                return False
            wanted.num_steps += 1
            return wanted.num_steps % EVERY == 1

    def measure(
        self,
        layer: Any,
        module: nn.Module,
        asked: Asked,
        hidden_states: Tensor,
        names: Sequence[str],
        *,
        backend: str,
        rotary: nn.Module | None,
        ranks: Ranks = ALONE,
    ) -> Tensor | None:
        """Measure the attention of a step's last query.

        Parameters
        ----------
        layer : CacheLayerMixin
            Already with the pairs of the step.
        module : nn.Module
            The attention layer.
        asked : Asked
            Its queries.
        hidden_states : Tensor [B, Q, hidden]
            Its inputs.
        names : sequence of E str
            Of the current experts.
        backend, rotary
            As in ``moekv.experts.builder.ViewBuilder``.
        ranks : Ranks
            The processes that share out the layer's heads.

        Returns
        -------
        Tensor [E], float32, or None
            Share of the attention on the retained pairs that each expert alone would have retained
            too. Evicted pairs cannot be measured: where the retained ones are of no use, the rates
            of all experts fall. None: not measured.
        """
        with self._lock:
            wanted = self._wanted.get(layer)
        if wanted is None or wanted.names != tuple(names):
            return None
        if (wanted.num_moves, wanted.length) != (layer.num_moves, layer.context_length):
            return None
        held = Held.of(layer, [0] * layer.batch_size)
        view = held.view(
            module,
            hidden_states[:, -1:],
            asked.query[:, :, -1:],
            asked,
            None,
            {},
            backend=backend,
            rotary=rotary,
        )
        since = layer.get_seq_length() - wanted.length
        longest = held.shape[2] - since
        bits = wanted.dense(longest)
        mass = view.observed().view(held.shape)[:, :, :longest]
        hits = torch.stack([(mass * (bits >> e & 1)).sum(-1) for e in range(len(names))])
        return ranks.gather(hits, 2).mean((1, 2)).clamp(max=1)

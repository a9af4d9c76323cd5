"""The pairs of a layer that has grown, as a view for experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moekv.budget import Kept
from moekv.cache.layer import CompressedLayer
from moekv.devices import send
from moekv.experts.view import LayerView
from moekv.models.queries import logit_options
from moekv.models.ranks import ALONE, Ranks
from moekv.models.watching import Asked


@dataclass
class Held:
    """The pairs of a layer, as dense tensors that are padded at the left.

    Where processes share out the heads, the tensors are as long as the longest head of all.

    Attributes
    ----------
    keys, values : Tensor [B, H, L, D]
    start : Tensor [B, H], int32, or None
        Padding of each head; None: no padding.
    lengths : list of B lists of H ints
        Real pairs of each head.
    notes : tuple of two Tensor [B, H, L], or None
        Of a calibrated router, see ``LayerView``.
    ranks : Ranks
        The processes that share out the layer's heads.
    lengths_of_all : list of B lists of ints, or None
        Real pairs of each head of all processes; None: `lengths` are.
    """

    keys: Tensor
    values: Tensor
    start: Tensor | None
    lengths: list[list[int]]
    notes: tuple[Tensor, Tensor] | None = None
    ranks: Ranks = ALONE
    lengths_of_all: list[list[int]] | None = None

    @classmethod
    def of(cls, layer: CompressedLayer, padding: Sequence[int], ranks: Ranks = ALONE) -> Held:
        """Read a layer.

        Parameters
        ----------
        layer : CompressedLayer
            Its pairs may be copied; may wait for the device.
        padding : sequence of B ints
            Padding at the left of each row, in positions of the mask.
        ranks : Ranks
            The processes that share out the layer's heads: all of them have to ask.
        """
        keys, values = layer.held_pairs()
        lengths = layer.head_lengths(padding)
        (everywhere,) = ranks.lengths([lengths])
        missing = max(max(map(max, everywhere)) - keys.shape[2], 0)
        if missing:
            keys, values = (functional.pad(x, (0, 0, missing, 0)) for x in (keys, values))
        held = cls._padded(keys, values, lengths, ranks, everywhere)
        if (notes := layer.whole_notes()) is not None:
            read, place = (functional.pad(x[..., 0], (missing, 0)) for x in notes.held_pairs())
            before = send(padding, read.device)[:, None, None]
            held.notes = read, (place - before).clamp(min=0)
        return held

    @classmethod
    def _padded(
        cls,
        keys: Tensor,
        values: Tensor,
        lengths: list[list[int]],
        ranks: Ranks,
        everywhere: list[list[int]],
    ) -> Held:
        longest = keys.shape[2]
        start = None
        if any(n < longest for row in everywhere for n in row):
            start = longest - send(lengths, keys.device, torch.int32)
        return cls(keys, values, start, lengths, None, ranks, everywhere)

    @property
    def everywhere(self) -> list[list[int]]:
        """Real pairs of each head of all processes."""
        return self.lengths if self.lengths_of_all is None else self.lengths_of_all

    def of_all_heads(self) -> Held:
        """Return this layer with the heads of all processes: sizes, and no numbers to read."""
        if self.ranks.size == 1:
            return self
        keys, values = (
            x[:, :1].expand(-1, len(self.everywhere[0]), -1, -1) for x in (self.keys, self.values)
        )
        return self._padded(keys, values, self.everywhere, ALONE, self.everywhere)

    def sizes(self) -> Held:
        """Return this layer without numbers to read, which take as much memory as the layer."""
        none = self.keys.new_empty(*self.shape, 0)
        return replace(self, keys=none, values=none, notes=None)

    def own(self, kept: Kept) -> Kept:
        """Take what this process's heads retain, by places in the layer that it holds."""
        if self.ranks.size == 1:
            return kept
        own = kept.of_heads(self.ranks.own(self.shape[1]))
        longest = max(map(max, self.lengths))
        missing = own.shape[2] - longest
        return replace(own, indices=own.indices - missing, shape=(*own.shape[:2], longest))

    def rows(self, rows: Sequence[int]) -> Held:
        """Select rows of the batch, without what is padding in all of them."""
        lengths = [self.lengths[b] for b in rows]
        everywhere = [self.everywhere[b] for b in rows]
        longest = max(n for row in everywhere for n in row)
        if list(rows) == list(range(len(self.keys))) and longest == self.shape[2]:
            return self
        index = send(rows, self.keys.device)

        def part(pairs: Tensor) -> Tensor:
            return pairs[index, :, pairs.shape[2] - longest :]

        held = self._padded(part(self.keys), part(self.values), lengths, self.ranks, everywhere)
        if self.notes is not None:
            held.notes = part(self.notes[0]), part(self.notes[1])
        return held

    @property
    def folded(self) -> bool:
        """Whether heads of a row hold different numbers of pairs."""
        return any(len(set(row)) > 1 for row in self.everywhere)

    @property
    def real(self) -> Tensor:
        """Which places hold pairs: [B, H, L], bool."""
        place = torch.arange(self.shape[2], device=self.keys.device)
        if self.start is None:
            return torch.ones(self.shape, dtype=torch.bool, device=place.device)
        return place >= self.start[..., None]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, H, L)."""
        batch, num_heads, longest, _ = self.keys.shape
        return batch, num_heads, longest

    def view(
        self,
        module: nn.Module,
        states: Tensor,
        queries: Tensor,
        asked: Asked | None,
        attentions: Tensor | None,
        kwargs: Mapping[str, Any],
        *,
        backend: str,
        rotary: nn.Module | None = None,
    ) -> LayerView:
        """Make a view for experts; where heads differ, each is a row of its own.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        states : Tensor [B, N, hidden]
            Its last inputs.
        queries : Tensor [B, Hq, N, D]
            Their queries.
        asked : Asked or None
            The last call's queries.
        attentions, kwargs
            As a forward hook gets them.
        backend, rotary
            As in ``moekv.experts.builder.ViewBuilder``.
        """
        _, num_heads, longest = self.shape
        states, queries = states[:, -longest:], queries[:, :, -longest:].to(self.keys.dtype)
        keys, values, start = self.keys, self.values, self.start
        lengths, notes = [row[0] for row in self.lengths], self.notes
        everywhere = None
        if self.folded:
            assert start is not None
            keys, values = keys.flatten(0, 1)[:, None], values.flatten(0, 1)[:, None]
            queries = queries.reshape(len(keys), -1, *queries.shape[2:])
            start = start.flatten()
            lengths = [n for row in self.lengths for n in row]
            everywhere = tuple(n for row in self.everywhere for n in row)
            if notes is not None:
                read, position = (x.flatten(0, 1)[:, None] for x in notes)
                notes = read, position
        elif start is not None:
            start = start[:, 0].contiguous()
        return LayerView(
            module=module,
            hidden_states=states,
            keys=keys,
            values=values,
            queries=queries,
            start=start,
            lengths=tuple(lengths),
            begins=True,
            ends=True,
            attentions=attentions,
            kwargs=kwargs,
            kinds=(),
            backend=backend,
            notes=notes,
            rotary=rotary,
            logits=logit_options(module, asked, queries.shape[3]),
            ranks=self.ranks,
            lengths_of_all=everywhere,
        )

    def alone(self, keep: Sequence[int]) -> list[int]:
        """Pairs that an expert alone would retain in each row of the view, by the same share.

        Of the view of all processes' heads.
        """
        alone = []
        for k, row in zip(keep, self.everywhere, strict=True):
            before = max(sum(row), 1)
            after = min(before, k * len(row))
            alone += [max(n * after // before, 1) for n in (row if self.folded else row[:1])]
        return alone

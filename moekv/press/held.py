"""The pairs of a layer that has grown, as a view for experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekv.cache.layer import CompressedLayer
from moekv.experts.view import LayerView
from moekv.models.queries import logit_options
from moekv.models.watching import Asked
from moekv.ops import ScoreKind


@dataclass
class Held:
    """The pairs of a layer, as dense tensors that are padded at the left.

    Attributes
    ----------
    keys, values : Tensor [B, H, L, D]
    start : Tensor [B, H], int32, or None
        Padding of each head; None: no padding.
    lengths : list of B lists of H ints
        Real pairs of each head.
    notes : tuple of two Tensor [B, H, L], or None
        Of a calibrated router, see ``LayerView``.
    """

    keys: Tensor
    values: Tensor
    start: Tensor | None
    lengths: list[list[int]]
    notes: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, layer: CompressedLayer, padding: Sequence[int]) -> Held:
        """Read a layer.

        Parameters
        ----------
        layer : CompressedLayer
            Its pairs may be copied; may wait for the device.
        padding : sequence of B ints
            Padding at the left of each row, in positions of the mask.
        """
        held = cls._padded(*layer.held_pairs(), layer.head_lengths(padding))
        if (notes := layer.whole_notes()) is not None:
            read, place = notes.held_pairs()
            before = torch.tensor(padding, device=read.device)[:, None, None]
            held.notes = read[..., 0], (place[..., 0] - before).clamp(min=0)
        return held

    @classmethod
    def _padded(cls, keys: Tensor, values: Tensor, lengths: list[list[int]]) -> Held:
        longest = keys.shape[2]
        start = None
        if any(n < longest for row in lengths for n in row):
            counts = torch.tensor(lengths, dtype=torch.int32, device=keys.device)
            start = longest - counts
        return cls(keys, values, start, lengths)

    def rows(self, rows: Sequence[int]) -> Held:
        """Select rows of the batch."""
        if list(rows) == list(range(len(self.keys))):
            return self
        index = torch.tensor(rows, device=self.keys.device)
        lengths = [self.lengths[b] for b in rows]
        longest = max(n for row in lengths for n in row)

        def part(pairs: Tensor) -> Tensor:
            return pairs[index, :, pairs.shape[2] - longest :]

        held = self._padded(part(self.keys), part(self.values), lengths)
        if self.notes is not None:
            held.notes = part(self.notes[0]), part(self.notes[1])
        return held

    @property
    def folded(self) -> bool:
        """Whether heads of a row hold different numbers of pairs."""
        return any(len(set(row)) > 1 for row in self.lengths)

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
        kinds: Sequence[ScoreKind],
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
        kinds, backend, rotary
            As in ``moekv.experts.builder.ViewBuilder``.
        """
        _, num_heads, longest = self.shape
        states, queries = states[:, -longest:], queries[:, :, -longest:].to(self.keys.dtype)
        keys, values, start = self.keys, self.values, self.start
        lengths, notes = [row[0] for row in self.lengths], self.notes
        if self.folded:
            assert start is not None
            keys, values = keys.flatten(0, 1)[:, None], values.flatten(0, 1)[:, None]
            queries = queries.reshape(len(keys), -1, *queries.shape[2:])
            start = start.flatten()
            lengths = [n for row in self.lengths for n in row]
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
            kinds=kinds,
            backend=backend,
            notes=notes,
            rotary=rotary,
            logits=logit_options(module, asked, queries.shape[3]),
        )

    def alone(self, keep: Sequence[int]) -> list[int]:
        """Pairs that an expert alone would retain in each row of the view, by the same share."""
        alone = []
        for k, row in zip(keep, self.lengths, strict=True):
            before = max(sum(row), 1)
            after = min(before, k * len(row))
            alone += [max(n * after // before, 1) for n in (row if self.folded else row[:1])]
        return alone

"""Evicted pairs that are not lost: they join those that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekv import ops
from moekv.budget import Kept


@dataclass(frozen=True, eq=False)
class Folding:
    """What says which evicted pairs of a layer are looked at like which of the others.

    Attributes
    ----------
    queries : Tensor [B, Hq, M, D]
        Of some tokens of the text, as they would ask behind it.
    start : Tensor [B], int32, or None
        Padding positions at the left of each row.
    logits : mapping
        ``scaling`` and ``softcap`` of the layer.
    gate : float
        A pair joins only one that is looked at this much alike, see ``fold_pairs``.
    least : float
        It joins none if it is looked at less than this times the mean.
    """

    queries: Tensor
    start: Tensor | None
    logits: Mapping[str, float]
    gate: float = 0.0
    least: float = 0.0

    def fold(
        self, keys: Tensor, values: Tensor, kept: Kept, *, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Merge the pairs that leave with those that stay.

        Parameters
        ----------
        keys, values : Tensor
            [B, H, T, D] and [B, H, T, Dv].
        kept : Kept
        backend : str
            Of ``fold_pairs``.

        Returns
        -------
        values : Tensor [N, Dv]
            Of the pairs that stay.
        bias : Tensor [N], float16
        num_joined : Tensor, int64
            Pairs that have joined others; a scalar on the device.
        """
        queries = self.queries.to(keys.dtype)
        rows = kept.indices, kept.offsets, self.start
        how: dict[str, Any] = {"gate": self.gate, "least": self.least, "backend": backend}
        how |= self.logits
        found = ops.fold_pairs(queries, keys, values, *rows, **how)
        return found.values, found.bias, torch.count_nonzero(found.joined + 1)

"""The record of a prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerRecord:
    """The record of one layer. B rows, H KV heads, T tokens, E experts.

    Attributes
    ----------
    index : int
        Of the layer.
    kept : Tensor [B, H, T], bool
        Which pairs were retained; False at padding.
    speakers : Tensor [B, H, T], uint8
        The expert that picked each pair: the one that gave it its place in the order.
    weights : Tensor [B, E], float32
        Mean over the real tokens of the experts' weights, which sum to 1.
    """

    index: int
    kept: Tensor
    speakers: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Recording:
    """The record of a prefill.

    Attributes
    ----------
    experts : sequence of E str
        Their names.
    budget : str
        The one that was used.
    starts : sequence of B int
        Padding at the left of each row.
    num_tokens : int
        T, padding included.
    sinks, recent : int
        First and last real positions that are always retained.
    bytes_before, bytes_after : int
        Of the layers' storages, all rows together.
    layers : sequence of LayerRecord
        Those that the press compressed, in order.
    press : str
        The press with its options.
    """

    experts: Sequence[str]
    budget: str
    starts: Sequence[int]
    num_tokens: int
    sinks: int
    recent: int
    bytes_before: int
    bytes_after: int
    layers: Sequence[LayerRecord]
    press: str = ""

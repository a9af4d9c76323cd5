"""What is remembered beside the pairs of a layer that will be compressed again."""

from __future__ import annotations

import torch
from torch import Tensor

from moekv.budget import Kept
from moekv.cache.caches import compressed
from moekv.cache.growing import GrowingLayer
from moekv.cache.layer import CompressedLayer
from moekv.cache.recent import RecentStates


def remember(layer: CompressedLayer, hidden_states: Tensor, queries: Tensor, window: int) -> None:
    """Keep the last inputs and queries of an attention layer beside its cache.

    Parameters
    ----------
    layer : CompressedLayer
        Already with the pairs of these tokens.
    hidden_states : Tensor [B, Q, hidden]
    queries : Tensor [B, Hq, W, D]
        Of the last of these tokens; all, or as many as are to be remembered.
    window : int
        Tokens to remember.
    """
    if layer.recent is None or layer.recent.size != window:
        layer.recent = RecentStates(window)
    layer.recent.append(hidden_states, queries, layer.get_seq_length())


def take_notes(read: Tensor, kept: Kept | None, *, backend: str) -> CompressedLayer:
    """Record what a calibrated router reads from a prefill's pairs, for the next compression.

    Its ``learned`` expert needs hidden states, which are gone by then, and true positions. So both
    are kept beside the pairs, 8 bytes for each, as a cache layer of its own: with head_dim 1, what
    was read as keys and places as values. It is appended to, cropped, reordered and compressed with
    the layer whose ``notes`` it is.

    Parameters
    ----------
    read : Tensor [B, H, T], float32
        See ``CalibratedRouter.read``.
    kept : Kept or None
        The pairs that stay; None: all.
    backend : str

    Returns
    -------
    CompressedLayer
        Places are those in the padded row.
    """
    read = read[..., None].contiguous()
    place = torch.empty_like(read).copy_(_places(0, read))
    if kept is None:
        return GrowingLayer(read, place, backend=backend)
    return compressed(read, place, kept, backend=backend)


def note(layer: CompressedLayer, read: Tensor) -> None:
    """Record what is read from new tokens; drop all notes if tokens before them were not read.

    Parameters
    ----------
    layer : CompressedLayer
        Already with the pairs of these tokens.
    read : Tensor [B, H, Q], float32
    """
    before = layer.get_seq_length() - read.shape[2]
    if layer.notes is None or layer.notes.get_seq_length() < before:
        layer.notes = None
        return
    layer.notes.crop(before)  # shorter where somebody has cut the keys themselves
    read = read[..., None]
    layer.notes.update(read, _places(before, read).expand_as(read))


def _places(first: int, read: Tensor) -> Tensor:
    count = read.shape[2]
    return torch.arange(first, first + count, dtype=torch.float32, device=read.device)[:, None]

"""The expert ``learned``, of calibrated routers."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moekv.experts.base import Expert
from moekv.experts.view import LayerView
from moekv.ops import ScoreKind


@functools.lru_cache(maxsize=8)
def places(lengths: tuple[int, ...], num_keys: int, device: torch.device) -> Tensor:
    """Features of the place of each pair in its row. The same for all layers of a forward.

    Logarithms, as attention falls off with distance like a power law; the distance from the end
    with two units, a token and a hundred, as heads differ in their reach.

    Parameters
    ----------
    lengths : tuple of B ints
        Real pairs, at the right of each row.
    num_keys : int
    device : torch.device

    Returns
    -------
    Tensor [B, 3, T], float32
        ``log(1 + age)``, ``log(1 + age / 128)`` and ``log(1 + position)``; 0 at padding. Not to be
        written to.
    """
    rows = []
    for length in lengths:
        position = torch.arange(length, device=device, dtype=torch.float32)
        row = _describe(length - 1 - position, position)
        rows.append(functional.pad(row, (num_keys - length, 0)))
    return torch.stack(rows)


def _describe(age: Tensor, position: Tensor) -> Tensor:
    return torch.stack([age.log1p(), (age / 128).log1p(), position.log1p()])


class Surrogate(Protocol):
    """Owner of the weights of ``learned``: ``moekv.calibration.router.CalibratedRouter``."""

    def surrogate(self, index: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of a layer: of places [H, 3], of novelty [H], and a bias [H]."""

    def read(self, index: int, projected: Tensor) -> Tensor:
        """Return the part of the scores that depends on hidden states: [B, H, N]."""


class LearnedExpert(Expert):
    """Estimates the log of the attention that a pair will receive, by a linear regression.

    A linear surrogate for each KV head, as in KVzap (Jegou and Jeblick, 2026), of the scores that
    reading the context again would give (KVzip, Kim et al., 2025). Beside the hidden state its
    features are the place, since some heads only attend to the last few tokens, and the distance
    of the key from the others (KeyDiff, Park et al., 2025).

    Parameters
    ----------
    router : Surrogate
        Owns the weights.
    """

    name = "learned"
    kinds = (ScoreKind.DIVERSITY,)
    comparable = True
    finite = True
    waits = True

    def __init__(self, router: Surrogate) -> None:
        self.router = router

    def scores(self, view: LayerView) -> Tensor:
        """Score the pairs from their hidden states, or from notes of these."""
        index: int = view.module.layer_idx  # type: ignore[assignment]
        place, novelty, _ = self.router.surrogate(index, view.keys.device)
        own = view.own_heads
        novelty = novelty[view.heads] if view.folded > 1 else novelty[own]  # a row has all heads
        with torch.autocast(view.keys.device.type, enabled=False):
            return self._read(index, view, place, novelty, own)

    def _read(
        self, index: int, view: LayerView, place: Tensor, novelty: Tensor, own: slice
    ) -> Tensor:
        unlike = novelty[..., None] * view.scores_of(ScoreKind.DIVERSITY)
        if view.notes is not None:
            read, position = view.notes
            where = _describe(position[..., -1:] - position, position)
            return read + torch.einsum("bhp,pbht->bht", place[view.heads], where) + unlike
        assert view.aligned and view.read is not None
        where = places(view.lengths, view.keys.shape[2], view.keys.device)
        read = self.router.read(index, view.read)[:, own]
        return torch.baddbmm(read + unlike, place[own].expand(len(where), -1, -1), where)

"""Mixes the scores of several experts into one order of the pairs, by shares of the budget.

Every expert has its own order of the pairs, and a share of the budget: its mean gate weight. Each
picks pairs in its order, in proportion to its share; a pair that several pick counts once. So
the rank of a pair is the lowest of its ranks over the experts, each divided by the expert's share,
and a budget retains the first pairs of that one order. A smaller budget retains a subset of what a
larger one retains.

Unlike averages of scores, shares need no common scale, every expert with a share acts, and a bad
expert costs its share and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Votes:
    """Scores of one layer's pairs by V voters, and the voters' shares. B rows.

    A voter is an expert, or several whose scores are mixed on one scale.

    Attributes
    ----------
    scores : Tensor [V, B, H, T], float32
        Higher is better. NaN and -inf do not count.
    shares : Tensor [V, B], float32
        Of the budget; they sum to 1 in each row.
    comparable : tuple of V bool
        Whether a voter's scores can be compared over heads and layers. Another voter picks as many
        pairs in every head.
    has_shared : bool
        Whether the first voter's share is the same in every layer.
    """

    scores: Tensor
    shares: Tensor
    comparable: tuple[bool, ...]
    has_shared: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, H, T)."""
        batch, num_heads, num_keys = self.scores.shape[1:]
        return batch, num_heads, num_keys

    @property
    def is_exact(self) -> bool:
        """Whether a single voter's scores are the order, over heads and layers too."""
        return self.comparable == (True,)

    def view(self, batch: int, num_heads: int) -> Votes:
        """Unfold rows that are single heads (``LayerView.folded``) into batch and heads."""
        scores = self.scores.reshape(len(self.scores), batch, num_heads, self.scores.shape[3])
        shares = self.shares.view(len(self.scores), batch, -1).mean(-1)
        return replace(self, scores=scores, shares=shares)


def order(
    votes: Sequence[Votes],
    budget: str,
    real: Sequence[Tensor | None],
    num_heads: int | None = None,
) -> list[Tensor]:
    """Bring the pairs of some layers into the order in which a budget retains them.

    Parameters
    ----------
    votes : sequence of L Votes
        Of the same voters.
    budget : str
        Which heads share a budget: see ``moekv.budget.BUDGETS``.
    real : sequence of L Tensor [B, H or 1, T], bool, or None
        Which pairs are real; None: all.
    num_heads : int, optional
        Heads that share the budget, where further layers will follow: ranks are then lower bounds.

    Returns
    -------
    list of L Tensor [B, H, T], float32
        Higher is better: minus the lowest rank over the voters, each divided by the voter's share;
        -inf where none counts. The scores themselves where a single voter's are comparable, or
        no heads are compared.
    """
    if votes[0].is_exact or (budget == "uniform" and len(votes[0].comparable) == 1):
        return [each.scores[0] for each in votes]
    if budget == "model":
        return _order(votes, real, num_heads or sum(each.shape[1] for each in votes))
    return [
        scores
        for each, mask in zip(votes, real, strict=True)
        for scores in _order([each], [mask], 1 if budget == "uniform" else each.shape[1])
    ]


def _order(votes: Sequence[Votes], real: Sequence[Tensor | None], num_heads: int) -> list[Tensor]:
    """Bring the pairs of layers that share a budget into one order."""
    best = [torch.full_like(x.scores[0], torch.inf) for x in votes]
    for ranks in _ranks(votes, real, num_heads):
        for lowest, ranked in zip(best, ranks, strict=True):
            torch.minimum(lowest, ranked, out=lowest)
    return [x.neg_() for x in best]


def speakers(votes: Sequence[Votes], budget: str, real: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the voter whose rank is each pair's rank in the order; ties to the first voter.

    Parameters
    ----------
    votes, real
        As in :func:`order`.
    budget : str
        The budget used; ``"layer"`` selects in each head by itself, as ``"uniform"`` does.

    Returns
    -------
    list of L Tensor [B, H, T], uint8
        Numbers of voters; 0 where none counts.
    """
    if budget == "model":
        return _speakers(votes, real, sum(each.shape[1] for each in votes))
    return [
        numbers
        for each, mask in zip(votes, real, strict=True)
        for numbers in _speakers([each], [mask], each.shape[1] if budget == "head" else 1)
    ]


def _speakers(
    votes: Sequence[Votes], real: Sequence[Tensor | None], num_heads: int
) -> list[Tensor]:
    """Return the voter of each pair, in layers that share a budget."""
    best = [torch.full_like(x.scores[0], torch.inf) for x in votes]
    voters = [torch.zeros_like(x, dtype=torch.uint8) for x in best]
    if len(votes[0].comparable) == 1:
        return voters
    for number, ranks in enumerate(_ranks(votes, real, num_heads)):
        for lowest, voter, ranked in zip(best, voters, ranks, strict=True):
            voter.masked_fill_(ranked < lowest, number)
            torch.minimum(lowest, ranked, out=lowest)
    return voters


def _ranks(
    votes: Sequence[Votes], real: Sequence[Tensor | None], num_heads: int
) -> Iterator[Iterator[Tensor]]:
    """Return each voter's ranks of the pairs of each layer, divided by its share; inf: none."""
    for voter, comparable in enumerate(votes[0].comparable):
        scores = [_telling(x.scores[voter], on) for x, on in zip(votes, real, strict=True)]
        together = comparable and num_heads > 1
        ranks = _rank_together(scores) if together else [num_heads * rank(x) for x in scores]
        yield (
            (ranked / x.shares[voter, :, None, None]).where(said > -torch.inf, torch.inf)
            for x, ranked, said in zip(votes, ranks, scores, strict=True)
        )


def _telling(scores: Tensor, real: Tensor | None) -> Tensor:
    """Scores, with -inf where they do not count."""
    scores = scores.nan_to_num(-torch.inf, torch.finfo(torch.float32).max, -torch.inf)
    return scores if real is None else scores.masked_fill(~real, -torch.inf)


def _rank_together(scores: Sequence[Tensor]) -> list[Tensor]:
    """Rank the pairs of each row over all heads of some layers."""
    device = scores[0].device
    rows = torch.cat([x.to(device).flatten(1) for x in scores], 1)
    parts = torch.split(rank(rows), [x[0].numel() for x in scores], 1)
    return [part.to(x.device).view_as(x) for part, x in zip(parts, scores, strict=True)]


def rank(scores: Tensor) -> Tensor:
    """Rank rows of scores [..., N] from 1, the best first, ties to the lower place; float32."""
    if scores.device.type == "cpu":
        best = _best_first(scores)
    else:
        best = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(1, scores.shape[-1] + 1, dtype=torch.float32, device=scores.device)
    return torch.empty_like(scores).scatter_(-1, best, places.expand_as(scores))


def _best_first(scores: Tensor) -> Tensor:
    """Sort rows [..., N] of float32 on a CPU: places, the best first, ties to the lower one.

    As ``argsort(descending=True, stable=True)`` does, in under half of its time: a score and its
    place make one integer, and NumPy sorts integers with vectors.
    """
    bits = (scores.detach() + 0.0).view(torch.int32)  # -0 is 0
    rising = bits ^ (bits >> 31 & 0x7FFFFFFF)
    keys = (~rising).long() << 32 | torch.arange(scores.shape[-1], device=scores.device)
    keys.numpy().sort(axis=-1)
    return keys & 0xFFFFFFFF

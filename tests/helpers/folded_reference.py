"""What folding promises, head by head in float64: who joins whom, and what becomes of values.

Written from docs/design.md, ``fold_pairs`` and "Folding". Products of patterns that are all but
equal are told apart by the last bits of queries and keys, which two implementations of attention do
not share: of such a pair every choice is possible.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SAMPLES, GATE, LEAST = 64, 0.5, 0.1
NEAR = 5e-3  # of products of patterns, whose numbers have eight bits


@dataclass
class Joined:
    """Evicted pairs that join one retained pair, with their weights."""

    sure: list[tuple[int, float]] = field(default_factory=list)
    maybe: list[tuple[int, float]] = field(default_factory=list)

    def all_ways(self) -> list[list[tuple[int, float]]]:
        """List all sets of pairs that may have joined."""
        assert len(self.maybe) < 12, "too much is uncertain"
        sizes = range(len(self.maybe) + 1)
        subsets = itertools.chain(*(itertools.combinations(self.maybe, n) for n in sizes))
        return [self.sure + list(some) for some in subsets]


def asked_behind(query: Tensor, padding: Tensor, config: Any) -> Tensor:
    """Queries of 64 tokens of each row, as they would ask behind it: [B, Hq, 64, D] float64.

    Parameters
    ----------
    query : Tensor [B, Hq, T, D]
        Of all tokens, where they stand.
    padding : Tensor [B]
    config : PreTrainedConfig
        Of a model that turns the halves of a head against each other.
    """
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    dim = int(query.shape[3] * rope.get("partial_rotary_factor", 1))
    frequency = rope["rope_theta"] ** -(torch.arange(0, dim, 2).double() / dim)
    part = torch.arange(SAMPLES)
    rows = []
    for row, begin in zip(query.double(), padding.tolist(), strict=True):
        length = query.shape[2] - begin
        place = (65536 * part + 40503 * part % 65536) * length // (SAMPLES * 65536)
        asked = row[:, begin + place]
        one, two = asked[..., :dim].chunk(2, -1)
        angle = (length - place)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        turned = [one * cos - two * sin, two * cos + one * sin, asked[..., dim:]]
        rows.append(torch.cat(turned, -1))
    return torch.stack(rows)


def joined_in_head(
    queries: Tensor, keys: Tensor, kept: Tensor, begin: int, *, scaling: float, softcap: float
) -> dict[int, Joined]:
    """Say which pairs of a head join which.

    Parameters
    ----------
    queries : Tensor [M, D]
        Of all query heads of the KV head.
    keys : Tensor [T, D]
    kept : Tensor [T] bool
    begin : int
        Padding at the left.

    Returns
    -------
    dict
        For every retained pair.
    """
    logits = scaling * queries @ keys.double().mT
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    shares = torch.zeros_like(logits)
    shares[:, begin:] = logits[:, begin:].softmax(-1)
    shares[shares < 1e-18] = 0
    looks, norms = shares.mean(0), shares.norm(dim=0)
    patterns = (shares / norms.where(norms > 0, 1)).bfloat16().double()
    stay = kept.nonzero()[:, 0]
    found = {i: Joined() for i in stay.tolist()}
    if not found:
        return found
    products = patterns.mT @ patterns[:, stay]
    least = LEAST / (keys.shape[0] - begin)
    for j in range(begin, keys.shape[0]):
        if kept[j] or looks[j] < least * (1 - 1e-3):
            continue
        best = products[j].max()
        near = stay[(products[j] > best - NEAR) & (products[j] > GATE - NEAR)].tolist()
        is_sure = len(near) == 1 and best > GATE + NEAR and looks[j] > least * (1 + 1e-3)
        for i in near:
            pair = j, float((looks[j] / looks[i]).clamp(max=1.0))
            (found[i].sure if is_sure else found[i].maybe).append(pair)
    return found


def folded(values: Tensor, place: int, joined: list[tuple[int, float]]) -> tuple[Tensor, float]:
    """Value [Dv] and bias of a retained pair of a head that others have joined."""
    total = 1 + sum(weight for _, weight in joined)
    value = values[place].double() + sum(weight * values[j].double() for j, weight in joined)
    return value / total, float(torch.tensor(total).log())

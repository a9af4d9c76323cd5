"""The one order of several voters, and who gave each pair its place, beside plain sums."""

import pytest
import torch
from torch import Tensor

from moekv.routing.mixing import Votes, order, rank, speakers

SHAPE = (2, 3, 7)


def votes(seed: int, comparable: tuple[bool, ...]) -> Votes:
    generator = torch.Generator().manual_seed(seed)
    # Few values, so that there are ties.
    scores = torch.randint(0, 6, (len(comparable), *SHAPE), generator=generator).float()
    scores[0, 0, 0, 2] = -torch.inf
    scores[:, 1, 1, 3] = torch.nan
    shares = torch.rand(len(comparable), SHAPE[0], generator=generator) + 0.1
    return Votes(scores, shares / shares.sum(0), comparable)


def ranked(layers: list[Votes], budget: str, real: list[Tensor | None], voter: int) -> list[Tensor]:
    """Ranks of one voter divided by its share, pair by pair."""
    found = [torch.full(SHAPE, torch.inf) for _ in layers]
    heads = {"uniform": 1, "head": SHAPE[1], "model": SHAPE[1] * len(layers)}[budget]
    for number, layer in enumerate(layers):
        for row in range(SHAPE[0]):
            for head in range(SHAPE[1]):
                places = [(number, head)]
                if layer.comparable[voter] and budget != "uniform":
                    within = range(len(layers)) if budget == "model" else [number]
                    places = [(x, h) for x in within for h in range(SHAPE[1])]
                scale = heads if len(places) == 1 else 1
                rivals = []
                for x, h in places:
                    for t in range(SHAPE[2]):
                        value = float(layers[x].scores[voter, row, h, t])
                        mask = real[x]
                        on = mask is None or bool(mask[row, 0, t])
                        value = value if value == value and on else -torch.inf
                        rivals.append((-value, x, h, t))
                for place, (minus, x, h, t) in enumerate(sorted(rivals), start=1):
                    if (x, h) == (number, head) and minus < torch.inf:
                        share = float(layer.shares[voter, row])
                        found[number][row, head, t] = scale * place / share
    return found


@pytest.mark.parametrize("budget", ["uniform", "head", "model"])
@pytest.mark.parametrize("comparable", [(True, False), (False, False, True), (False,)])
@pytest.mark.parametrize("padded", [False, True])
def test_places_and_speakers(budget: str, comparable: tuple[bool, ...], padded: bool) -> None:
    layers = [votes(seed, comparable) for seed in range(2)]
    mask = torch.ones(SHAPE[0], 1, SHAPE[2], dtype=torch.bool)
    mask[1, :, :2] = False
    real: list[Tensor | None] = [mask if padded else None] * 2
    said = speakers(layers, budget, real)
    by_voter = [ranked(layers, budget, real, voter) for voter in range(len(comparable))]
    found = order(layers, budget, real)
    for number in range(len(layers)):
        ranks = torch.stack([voter[number] for voter in by_voter])
        best, first = ranks.min(0)
        if budget != "uniform" or len(comparable) > 1:
            torch.testing.assert_close(found[number], -best)
        # Places that differ by rounding alone are anybody's.
        close = ranks.gather(0, said[number][None].long())[0]
        torch.testing.assert_close(close.nan_to_num(posinf=0), best.nan_to_num(posinf=0))
        assert (said[number][best == torch.inf] == 0).all()
        clear = (ranks.sort(0).values.diff(dim=0)[:1] > 1e-3).all(0) if len(ranks) > 1 else best > 0
        assert torch.equal(said[number][clear].long(), first[clear])


@pytest.mark.parametrize("shape", [(5000,), (3, 2048), (2, 3, 7), (4, 1), (2, 0), (0, 5)])
def test_ranks_are_those_of_a_stable_sort(shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(4).round()
    for every, value in ((7, -torch.inf), (5, torch.inf), (3, -0.0), (11, 1e-42), (13, -3e38)):
        scores.view(-1)[::every] = value
    for rows in (scores, scores.transpose(0, -1)):
        best = rows.argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(1.0, rows.shape[-1] + 1).expand(rows.shape)
        assert torch.equal(rank(rows), torch.zeros(rows.shape).scatter(-1, best, places))

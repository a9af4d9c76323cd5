"""What speaks for an expert where nothing was learned."""

import math

import pytest
import torch

from moekv.routing.evidence import standardise, trust, wants

NAN = math.nan


def test_heads_are_standardised_over_real_numbers() -> None:
    scores = torch.randn(2, 2, 3, 50) * 7 + torch.arange(12.0).view(2, 2, 3, 1)
    real = torch.ones(2, 50, dtype=torch.bool)
    real[1, :20] = False
    scores[:, 1, :, :20] = 1e6
    scores[0, 0, 0, 3] = NAN
    scaled = standardise(scores, real)
    assert (scaled[:, 1, :, :20] == -torch.inf).all() and scaled[0, 0, 0, 3] == -torch.inf
    for e in range(2):
        for b in range(2):
            for h, head in enumerate(scaled[e, b]):
                counted = real[b] & ~scores[e, b, h].isnan()
                raw = scores[e, b, h][counted].double()
                expected = (raw - raw.mean()) / raw.std(correction=0)
                torch.testing.assert_close(head[counted], expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 1 / 3, -1e4, 0.1])
def test_constant_scores_say_nothing(constant: float) -> None:
    scaled = standardise(torch.full((1, 1, 1, 1001), constant), None)
    assert (scaled == -torch.inf).all()
    assert not wants(scaled).any()


def test_a_token_is_wanted_by_the_mean_of_heads() -> None:
    scores = torch.tensor([[[[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]]])  # the second head says nothing
    step = math.sqrt(1.5)
    expected = torch.tensor([-step, 0.0, step]) / 2
    torch.testing.assert_close(wants(standardise(scores, None))[0, :, 0], expected)


def test_trust_is_what_is_missed_beside_chance() -> None:
    rates = torch.tensor([0.9, 0.8, 0.5])
    found = trust(rates, [0.5, 0.5, 0.5])
    expected = -torch.tensor([0.11, 0.21, 0.51]).log()
    torch.testing.assert_close(found, expected - expected.mean())
    more, less = trust(torch.tensor([0.9, 0.9]), [0.8, 0.2]).tolist()
    assert less > more  # as much was found among fewer pairs

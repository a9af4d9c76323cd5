"""The router whose loss can be chosen: each mode by hand."""

import math

import pytest
import torch
from router_cases import HIDDEN, hidden_states

from moekv.routing.base import BaseMoERouter
from moekv.routing.topk_balanced import TopKBalancedRouter


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("entropy", math.log(4) + 0.4 * math.log(0.4) + 0.6 * math.log(0.2)),
        ("variance", 4 * (0.15**2 + 3 * 0.05**2)),
        ("gini", 6 * 0.2 / 8),
    ],
)
def test_balance_modes_match_hand_computed_values(mode, expected):
    prior = [math.log(p) for p in (0.4, 0.2, 0.2, 0.2)]
    router = TopKBalancedRouter(HIDDEN, 4, 2, prior=prior, balance_mode=mode, aux_loss_weight=1.0)
    torch.testing.assert_close(
        router(hidden_states(2, 3)).aux_loss.item(), expected, atol=1e-6, rtol=0
    )
    even = TopKBalancedRouter(HIDDEN, 4, 2, balance_mode=mode, aux_loss_weight=1.0)
    assert abs(even(hidden_states(2, 3)).aux_loss.item()) < 1e-6


@pytest.mark.parametrize("mode", ["entropy", "variance", "gini"])
def test_a_step_down_the_loss_moves_the_choice_and_not_the_weights(mode):
    """Of probabilities .28, .26, .24, .22 the last ones gain most."""
    prior = [math.log(p) for p in (0.28, 0.26, 0.24, 0.22)]
    hidden = hidden_states(1, 5)
    plain = BaseMoERouter(HIDDEN, 4, 2, prior=prior)(hidden)
    assert plain.load.tolist() == [5, 5, 0, 0]
    router = TopKBalancedRouter(HIDDEN, 4, 2, prior=prior, balance_mode=mode, balance_weight=0.6)
    out = router(hidden)
    assert out.load.tolist() == [0, 0, 5, 5]
    torch.testing.assert_close(out.weights[0, 0].sort().values, torch.tensor([22 / 46, 24 / 46]))
    idle = TopKBalancedRouter(HIDDEN, 4, 2, prior=prior, balance_mode=mode, balance_weight=0.0)
    assert torch.equal(idle(hidden).experts, plain.experts)

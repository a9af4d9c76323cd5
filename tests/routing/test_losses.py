"""Gradients of the balance losses."""

import torch
from router_cases import HIDDEN, hidden_states

from moekv.routing.topk_balanced import TopKBalancedRouter


def test_variance_gradient_is_exact():
    router = TopKBalancedRouter(
        HIDDEN, 3, 1, balance_mode="variance", aux_loss_weight=1.0, prior=[1.0, 0.0, 0.0]
    )
    router(hidden_states(1, 4)).aux_loss.backward()
    p = torch.tensor([1.0, 0.0, 0.0]).softmax(-1)
    upstream = 6 * (p - 1 / 3)  # d/dp of 3 * sum (p - 1/3)^2
    expected = p * (upstream - (p * upstream).sum())
    torch.testing.assert_close(router.gate.bias.grad, expected)

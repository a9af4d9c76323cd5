"""The router that gives important tokens more experts."""

import math

import torch
from router_cases import HIDDEN, hidden_states

from moekv.routing.adaptive import AdaptiveRouter


def test_importance_is_the_standardised_distance_from_the_mean_direction():
    hidden = hidden_states(1, 9)
    unit = hidden[0].double() / hidden[0].double().norm(dim=-1, keepdim=True)
    centre = unit.mean(0)
    distance = 1 - unit @ centre / centre.norm()
    z = (distance - distance.mean()) / (distance.std(unbiased=False) + 1e-4)
    out = AdaptiveRouter(HIDDEN, 4, 3)(hidden)
    torch.testing.assert_close(out.importance[0].double(), z.sigmoid(), atol=1e-5, rtol=0)


def test_importance_ignores_scale_and_is_half_where_nothing_stands_out():
    router = AdaptiveRouter(HIDDEN, 4, 3)
    hidden = hidden_states(1, 9)
    torch.testing.assert_close(router(hidden).importance, router(100 * hidden).importance)
    torch.testing.assert_close(
        router(hidden[:, :1]).importance, torch.tensor([[0.5]]), atol=1e-3, rtol=0
    )
    same = hidden[:, :1].expand(1, 9, HIDDEN)
    torch.testing.assert_close(router(same).importance, torch.full((1, 9), 0.5), atol=1e-3, rtol=0)


def test_important_tokens_consult_more_experts():
    prior = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    router = AdaptiveRouter(HIDDEN, 4, 4, prior=prior)
    logits, importance = torch.zeros(1, 4, 4) + router.prior, torch.tensor([[0.0, 0.4, 0.625, 1.0]])
    router._rate = lambda *_: (logits, importance)
    out = router(hidden_states(1, 4))
    mass = torch.tensor(
        [
            [0.4, 0.0, 0.0, 0.0],
            [0.4, 0.3 * 0.6, 0.0, 0.0],
            [0.4, 0.3, 0.2 * 0.5, 0.0],
            [0.4, 0.3, 0.2, 0.1],
        ]
    )
    torch.testing.assert_close(out.weights[0], mass / mass.sum(-1, keepdim=True))
    assert out.load.tolist() == [4, 3, 2, 1]


def test_importance_can_be_learned():
    router = AdaptiveRouter(HIDDEN, 4, 4)
    hidden = hidden_states(1, 30)
    target = (hidden[..., 0] > 0).float()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (router(hidden).weights[..., -1] - target / 4).square().mean()
        loss.backward()
        optimizer.step()
    learned = router(hidden).importance
    assert learned[target > 0].mean() > learned[target == 0].mean() + 0.4

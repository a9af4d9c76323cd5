"""The regression: does it find what there is to find?"""

import torch
from calibration_cases import gather, planted
from random_router import random_router
from tiny_models import tiny_model

from moekv.calibration.ridge import set_experts, solve


def test_ridge_finds_a_planted_linear_rule() -> None:
    model = tiny_model()
    planter = random_router(model, experts=(), top_k=1)
    planter.gain.fill_(1)
    planter.offset.zero_()
    found = random_router(model, seed=1, experts=(), top_k=1)
    set_experts(found, solve(gather(planter, planted(planter, 12)), found, 1e-8))
    for name in ("surrogate_weight", "surrogate_place", "surrogate_novelty", "surrogate_bias"):
        torch.testing.assert_close(
            getattr(found, name), getattr(planter, name), atol=5e-3, rtol=5e-3
        )


def test_experts_are_brought_to_the_scale_of_the_targets() -> None:
    """What is comparable by one number for all heads, others by their heads' lines."""
    model = tiny_model()
    router = random_router(model)
    readings = planted(router, 6)
    for reading in readings:
        slope, level = torch.tensor([[2.0, -3.0], [0.5, 4.0]]), torch.tensor([[1.0, 2], [3, -6]])
        reading.target = slope[..., None] * reading.scores[:, 1] + level[..., None]
        reading.scores[:, 0] += 7
    set_experts(router, solve(gather(router, readings), router, 1e-3))
    torch.testing.assert_close(router.gain[:, 2], slope, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(router.offset[:, 2], level, atol=1e-3, rtol=1e-3)
    assert (router.gain[:, 1] == 1).all()
    targets, scores = (
        torch.cat([x.flatten() for x in parts]).mean()
        for parts in ([r.target for r in readings], [r.scores[:, 0] for r in readings])
    )
    torch.testing.assert_close(
        router.offset[:, 1], (targets - scores).expand(2, 2), atol=1e-3, rtol=1e-3
    )


def test_a_domain_alone_is_fitted_with_itself() -> None:
    router = random_router(tiny_model())
    sums = gather(router, planted(router, 3), domains=1)
    torch.testing.assert_close(sums.total(1, without=0), sums.total(1))

"""The gates: what they are trained on, what they learn, and their losses."""

import dataclasses
import itertools

import pytest
import torch
from calibration_cases import SMALL, gather, mixed_by, planted
from random_router import random_router
from tiny_models import tiny_model
from torch import Tensor

from moekv.calibration import gates
from moekv.calibration.gates import (
    COMPARABLE_WEIGHT,
    choice_loss,
    estimate,
    ranking_loss,
    train_gates,
)
from moekv.calibration.ridge import fit_of, set_experts, solve, solve_ridge


def test_gates_follow_the_oracle_and_what_needs_no_fit() -> None:
    router = random_router(tiny_model(), experts=["semantic", "expected"])
    (reading,) = planted(router, 1)
    given = estimate(router, reading)
    expected = router.gain[:, 2, :, None] * reading.scores[:, 1] + router.offset[:, 2, :, None]
    torch.testing.assert_close(given.scores[:, 2], expected)
    torch.testing.assert_close(given.target, reading.target + COMPARABLE_WEIGHT * expected)
    weight, place, novelty, bias = other = [torch.randn_like(x) for x in fit_of(router)]
    given = estimate(router, reading, tuple(other))
    learned = weight @ reading.hidden.mT + place @ reading.where.t() + bias[..., None]
    learned = learned + novelty[..., None] * reading.novelty
    wanted = router.gain[:, 0, :, None] * learned + router.offset[:, 0, :, None]
    torch.testing.assert_close(given.scores[:, 0], wanted)


def test_gates_learn_to_route_where_no_even_mix_fits() -> None:
    model = tiny_model()
    planter = random_router(model, experts=("semantic", "temporal"))
    planter.gate_weight.mul_(2)
    planter.gain[:, 1:].mul_(3)
    found = random_router(model, experts=("semantic", "temporal"))
    sums = gather(planter, planted(planter, 24), held_out=4)
    found.gain.copy_(planter.gain)
    found.gate_weight.zero_()
    found.gate_bias.zero_()
    config = dataclasses.replace(SMALL, epochs=20, learning_rate=0.02, aux_loss_weight=0.001)
    # The experts are those that were planted.
    curve = train_gates(sums.sample, [fit_of(found)] * 2, found, config)
    losses = [row["ranking_loss"] for row in curve]
    assert min(losses) < 0.7 * losses[0]
    # The best epoch's numbers were kept, whatever came after.
    judged = sums.sample.held_out[0]
    assert ranking_loss(mixed_by(found, judged), judged.target) < 0.75 * losses[0]


def test_training_stops_early_and_keeps_the_best_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    router = random_router(tiny_model())
    sums = gather(router, planted(router, 6), held_out=1)
    losses = iter((0.5, 0.4, 0.45, 0.39, 0.41, 0.4, 0.39, 0.5, 0.1))
    weights = []

    def ranking_loss(*_: Tensor) -> float:
        weights.append(router.gate_weight.clone())  # as the epochs before have left them
        return next(losses)

    monkeypatch.setattr(gates, "ranking_loss", ranking_loss)
    fits = [fit_of(router)] * 2
    curve = train_gates(sums.sample, fits, router, dataclasses.replace(SMALL, epochs=20))
    assert [row["ranking_loss"] for row in curve] == [0.5, 0.4, 0.45, 0.39, 0.41, 0.4, 0.39, 0.5]
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise([*weights, router.gate_weight])]
    assert changed == [False, True, False, True, False, False, False, False]


def test_gates_are_trained_on_what_the_fit_is_out_of_its_domain() -> None:
    """In each of two domains a rule of its own holds, so that a fit knows only where it was."""
    model = tiny_model()
    rules = [random_router(model, seed=seed, experts=("expected",)) for seed in (0, 1)]
    readings = [planted(rules[i % 2], 1)[0] for i in range(12)]
    for reading in readings:
        reading.scores[:, 0] = reading.target  # who needs no fit is right everywhere
    sums = gather(rules[0], readings)
    found = random_router(model, seed=2, experts=("expected",))
    found.gate_weight.zero_()
    found.gate_bias.zero_()
    solved = solve(sums, found, SMALL.ridge)
    set_experts(found, solved)
    for row in range(2):
        gram, moment = sums.total(row, without=0)
        torch.testing.assert_close(gram, sums.gram[1, row].double())
        torch.testing.assert_close(moment, sums.moment[1, row].double())
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "estimate", lambda *args: seen.append(args[2:]) or estimate(*args))
        settings = dataclasses.replace(SMALL, epochs=8, learning_rate=0.02)
        curve = train_gates(sums.sample, solved.without, found, settings)
    for number in range(12):
        for row in range(2):
            own = solve_ridge(*sums.total(row, without=number % 2), 64, SMALL.ridge)
            for part, wanted in zip(seen[number][0], own, strict=True):
                torch.testing.assert_close(part[row], wanted)
    assert min(row["ranking_loss"] for row in curve) < curve[0]["ranking_loss"]
    trust = [
        found.gate(layer, torch.empty(0))(readings[0].hidden[layer][None]).shares.mean((0, 1))
        for layer in range(2)
    ]
    assert all(share[1] > 0.6 for share in trust)


def test_choice_loss_is_least_where_the_choices_are_the_targets() -> None:
    target = torch.randn(400, generator=torch.Generator().manual_seed(1))
    losses = [float(choice_loss(x, target)) for x in (3 * target, target, 0 * target, -target)]
    assert losses == sorted(losses)
    # By hand: thresholds at the 200th, 300th and 360th of 400, one unit apart from their next.
    target = torch.arange(400.0)
    margins = [(target - rank) / gates._SOFT for rank in (199, 299, 359)]
    wanted = sum(torch.nn.functional.softplus(torch.where(m > 0, -m, m)).mean() for m in margins)
    torch.testing.assert_close(choice_loss(target, target), wanted / 3)


def test_ranking_loss_by_hand() -> None:
    target = torch.arange(20.0)
    assert ranking_loss(target * 3 - 1, target) == 0
    # Of the best 10, 5 and 2, the reverse order has none.
    assert ranking_loss(-target, target) == 1
    swapped = target.clone()
    swapped[[9, 10]] = swapped[[10, 9]]  # across the boundary of the best 10 alone
    assert ranking_loss(swapped, target) == pytest.approx(0.1 / 3)

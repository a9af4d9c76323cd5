import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekv.routing.adaptive import AdaptiveRouter
from moekv.routing.balance import TopKBalancedRouter
from moekv.routing.base import BaseMoERouter
from moekv.routing.eplb import EPLBRouter
from moekv.routing.hierarchical import HierarchicalRouter
from moekv.routing.pikv import PiKVMoERouter
from moekv.routing.registry import ROUTERS, make_router
from moekv.routing.shared import SharedExpertRouter

HIDDEN = 12
ALL = sorted(ROUTERS)


def hidden_states(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HIDDEN, generator=generator).to(dtype)


def trained(router, seed=1, scale=1.0):
    """Give a router parameters as calibration would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return router


def left_padded(rows):
    """Rows `[1, T_i, hidden]` as one batch whose padding holds NaN, and its mask."""
    length = max(row.shape[1] for row in rows)
    batch = torch.full((len(rows), length, HIDDEN), torch.nan, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        batch[i, length - row.shape[1] :] = row[0]
        mask[i, length - row.shape[1] :] = True
    return batch, mask


def gate_probs(router, hidden):
    logits = hidden.double() @ router.gate.weight.double().T + router.gate.bias.double()
    return ((logits + router.prior.double()) / router.temperature).softmax(-1)


# What every router promises


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("num_experts", "k", "batch", "length"),
    [(1, 1, 2, 5), (4, 2, 2, 9), (6, 6, 1, 7), (4, 2, 3, 1), (60, 7, 1, 11), (7, 3, 2, 8)],
)
def test_every_output_is_consistent(name, num_experts, k, batch, length):
    router = trained(make_router(name, HIDDEN, num_experts, k))
    hidden = hidden_states(batch, length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, : length // 2] = False
    out = router(hidden, mask)

    assert out.probs.shape == (batch, length, num_experts) and out.probs.dtype == torch.float32
    assert out.weights.shape == (batch, length, k) and out.weights.dtype == torch.float32
    assert out.experts.shape == (batch, length, k) and out.experts.dtype == torch.int32
    assert out.aux_loss.shape == () and out.aux_loss.dtype == torch.float32
    assert out.load.shape == (num_experts,) and out.load.dtype == torch.int64

    expected = gate_probs(router, hidden) * mask[..., None]
    torch.testing.assert_close(out.probs.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.weights.sum(-1), mask.float())
    assert (out.weights >= 0).all()
    ordered = out.experts.sort(-1).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all(), "an expert was chosen twice"
    assert ordered.min() >= 0 and ordered.max() < num_experts
    used = (out.weights > 0) & mask[..., None]
    counts = torch.bincount(out.experts[used].long(), minlength=num_experts)
    assert torch.equal(out.load, counts)
    if out.importance is not None:
        assert out.importance.shape == (batch, length)
        assert (out.importance[~mask] == 0).all()
        assert ((out.importance >= 0) & (out.importance <= 1)).all()


@pytest.mark.parametrize("name", ALL)
def test_left_padded_row_equals_the_row_alone(name):
    router = trained(make_router(name, HIDDEN, 4, 2))
    rows = [hidden_states(1, n, seed=n) for n in (1, 6, 13)]
    batch, mask = left_padded(rows)
    together = router(batch, mask)
    assert together.aux_loss.isfinite()
    loads = torch.zeros(4, dtype=torch.int64)
    for i, row in enumerate(rows):
        alone = router(row)
        loads += alone.load
        for field in ("probs", "weights", "experts", "importance"):
            if getattr(alone, field) is not None:
                torch.testing.assert_close(
                    getattr(together, field)[i][mask[i]], getattr(alone, field)[0]
                )
        assert (together.weights[i][~mask[i]] == 0).all()
        assert (together.probs[i][~mask[i]] == 0).all()
    assert torch.equal(together.load, loads)
    torch.testing.assert_close(router(batch[1:2], mask[1:2]).aux_loss, router(rows[1]).aux_loss)


@pytest.mark.parametrize("name", ALL)
def test_uncalibrated_router_gates_by_its_prior(name):
    prior = [0.1, 1.2, -0.4, 0.9]
    router = make_router(name, HIDDEN, 4, 2, prior=prior)
    assert all((parameter == 0).all() for parameter in router.parameters())
    out = router(hidden_states(1, 8))
    expected = torch.tensor(prior).softmax(-1)
    torch.testing.assert_close(out.probs, expected.expand(1, 8, 4))
    if name == "hierarchical":  # groups {0, 1} and {2, 3}: the first has more probability
        assert torch.equal(out.experts[0, 0], torch.tensor([1, 0], dtype=torch.int32))
    elif name != "eplb":
        assert torch.equal(out.experts[0, 0], torch.tensor([1, 3], dtype=torch.int32))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    hidden = hidden_states(2, 9, dtype=dtype)
    router = trained(make_router(name, HIDDEN, 4, 2), scale=0.3)
    exact = router(hidden.float())
    out = router.to(dtype)(hidden)
    assert out.probs.dtype == out.weights.dtype == out.aux_loss.dtype == torch.float32
    torch.testing.assert_close(out.probs, exact.probs, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_gate_and_skip_padding(name):
    router = trained(make_router(name, HIDDEN, 4, 2, aux_loss_weight=1.0), scale=0.3)
    batch, mask = left_padded([hidden_states(1, 9, seed=3), hidden_states(1, 4, seed=4)])
    if name != "eplb":
        router(batch, mask).aux_loss.backward()
        assert router.gate.weight.grad.isfinite().all()
        assert router.gate.weight.grad.abs().sum() > 0
        router.zero_grad()
    out = router(batch, mask)
    (out.weights[..., 0] * torch.arange(9)).sum().backward()
    for parameter in router.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ALL)
def test_aux_loss_descent_balances_the_probabilities(name):
    router = trained(make_router(name, HIDDEN, 4, 2, aux_loss_weight=1.0), scale=0.1)
    with torch.no_grad():
        router.gate.bias.copy_(torch.tensor([2.0, 0.0, -1.0, 0.0]))
    hidden = hidden_states(1, 64)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    before = router(hidden).probs.mean((0, 1))
    for _ in range(30):
        optimizer.zero_grad()
        router(hidden).aux_loss.backward()
        optimizer.step()
    after = router(hidden).probs.mean((0, 1))
    assert after.max() - after.min() < 0.7 * (before.max() - before.min())


@pytest.mark.parametrize("name", ALL)
def test_same_input_same_output(name):
    router = trained(make_router(name, HIDDEN, 8, 3))
    hidden = hidden_states(2, 50)
    first, second = router(hidden), router(hidden)
    for field in ("probs", "weights", "experts", "aux_loss", "load"):
        assert torch.equal(getattr(first, field), getattr(second, field))


@pytest.mark.parametrize("name", ALL)
def test_state_dict_round_trip(name):
    router = trained(make_router(name, HIDDEN, 4, 2, prior=[0.0, 1.0, 2.0, 3.0]))
    for rates in ([0.9, 0.1, 0.5, 0.2], [0.3, 0.4, 0.6, 0.2]) * 3:
        router.update_history(torch.tensor(rates))
    other = make_router(name, HIDDEN, 4, 2)
    other.load_state_dict(router.state_dict())
    hidden = hidden_states(1, 20)
    assert torch.equal(router(hidden).experts, other(hidden).experts)
    assert torch.equal(router(hidden).weights, other(hidden).weights)
    for (key, a), (_, b) in zip(
        router.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ALL)
def test_nan_in_a_real_token_stays_defined(name):
    router = trained(make_router(name, HIDDEN, 4, 2))
    hidden = hidden_states(1, 6)
    hidden[0, 2] = torch.nan
    out = router(hidden)
    assert out.probs.isfinite().all() and out.aux_loss.isfinite()
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(1, 6))
    torch.testing.assert_close(out.probs[0, 2], torch.full((4,), 0.25))
    with torch.no_grad():
        router.gate.bias[1] = torch.nan
    out = router(hidden_states(1, 6))
    assert (out.probs[..., 1] == 0).all()
    torch.testing.assert_close(out.probs.sum(-1), torch.ones(1, 6))


@pytest.mark.parametrize("name", ALL)
def test_fully_padded_row_counts_nowhere(name):
    router = trained(make_router(name, HIDDEN, 4, 2))
    out = router(hidden_states(2, 5), torch.zeros(2, 5, dtype=torch.bool))
    assert (out.weights == 0).all() and (out.load == 0).all() and out.aux_loss.isfinite()


@pytest.mark.parametrize("name", ALL)
def test_no_host_synchronisation(name):
    """Fake tensors have no data, so asking the host for a value would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        router = make_router(name, HIDDEN, 4, 2)
        mask = torch.ones(2, 9, dtype=torch.bool)
        out = router(torch.randn(2, 9, HIDDEN), mask)
        router.update_history(torch.rand(4))
        assert out.weights.shape == (2, 9, 2)


# Exact formulas


def test_base_matches_hand_computed_values():
    router = BaseMoERouter(HIDDEN, 3, 2, prior=[math.log(5), math.log(3), math.log(2)])
    out = router(hidden_states(1, 2))
    torch.testing.assert_close(out.probs[0, 0], torch.tensor([0.5, 0.3, 0.2]))
    torch.testing.assert_close(out.weights[0, 0], torch.tensor([0.625, 0.375]))
    assert torch.equal(out.load, torch.tensor([2, 2, 0]))
    # 3 * (1/2 * .5 + 1/2 * .3), times the default weight
    torch.testing.assert_close(out.aux_loss, torch.tensor(0.01 * 1.2))


def test_temperature_divides_the_logits():
    router = BaseMoERouter(HIDDEN, 2, 1, prior=[2 * math.log(3), 0.0], temperature=2.0)
    torch.testing.assert_close(router(hidden_states(1, 1)).probs[0, 0], torch.tensor([0.75, 0.25]))


def test_projection_is_per_token():
    router = BaseMoERouter(2, 2, 1)
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        router.gate.bias.copy_(torch.tensor([0.0, 0.5]))
    out = router(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.6]]]))
    assert out.experts[0, :, 0].tolist() == [0, 1, 1]


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


def test_variance_gradient_is_exact():
    router = TopKBalancedRouter(
        HIDDEN, 3, 1, balance_mode="variance", aux_loss_weight=1.0, prior=[1.0, 0.0, 0.0]
    )
    router(hidden_states(1, 4)).aux_loss.backward()
    p = torch.tensor([1.0, 0.0, 0.0]).softmax(-1)
    upstream = 6 * (p - 1 / 3)  # d/dp of 3 * sum (p - 1/3)^2
    expected = p * (upstream - (p * upstream).sum())
    torch.testing.assert_close(router.gate.bias.grad, expected)


# Adaptive


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


# History


def test_history_moves_the_choice_and_never_the_weights():
    prior = [0.3, 0.2, 0.1, 0.0]
    router = PiKVMoERouter(HIDDEN, 4, 2, prior=prior, cache_update_interval=1)
    hidden = hidden_states(1, 40)
    before = router(hidden)
    assert set(before.experts.flatten().tolist()) == {0, 1}
    router.update_history(torch.tensor([0.1, 0.2, 0.9, 0.8]))
    after = router(hidden)
    assert set(after.experts.flatten().tolist()) == {2, 3}
    assert torch.equal(before.probs, after.probs)
    p = torch.tensor(prior).softmax(-1)
    both = after.weights[0, :, 1] > 0
    chosen = after.importance[0] * 2 - 1
    expected = p[3] * chosen / (p[2] + p[3] * chosen)
    torch.testing.assert_close(after.weights[0, both, 1], expected[both])


def test_history_is_a_moving_average_applied_at_intervals():
    router = PiKVMoERouter(
        HIDDEN, 2, 1, cache_update_interval=2, history_decay=0.75, history_weight=2.0
    )
    router.update_history(torch.tensor([0.8, 0.4]))
    torch.testing.assert_close(router.hit_rate_ema, torch.tensor([0.8, 0.4]))
    assert router.history_bias.tolist() == [0.0, 0.0]
    router.update_history(torch.tensor([0.0, torch.nan]))
    torch.testing.assert_close(router.hit_rate_ema, torch.tensor([0.6, 0.4]))
    torch.testing.assert_close(router.history_bias, torch.tensor([0.2, -0.2]))
    router.update_history(torch.tensor([2.0, -1.0]))  # clamped
    torch.testing.assert_close(router.hit_rate_ema, torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(router.history_bias, torch.tensor([0.2, -0.2]))


def test_history_off_keeps_nothing():
    router = PiKVMoERouter(HIDDEN, 4, 2, cache_aware=False, cache_update_interval=1)
    reference = router(hidden_states(1, 9))
    state = {key: value.clone() for key, value in router.state_dict().items()}
    router.update_history(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert all(torch.equal(value, state[key]) for key, value in router.state_dict().items())
    router.load_state_dict(state | {"history_bias": torch.tensor([0.0, 0.0, 1.0, 1.0])})
    assert torch.equal(router(hidden_states(1, 9)).experts, reference.experts)


def test_history_stays_fp32_in_a_bf16_router():
    router = PiKVMoERouter(HIDDEN, 4, 2, history_decay=0.99).to(torch.bfloat16)
    assert router.gate.weight.dtype == torch.bfloat16
    assert router.hit_rate_ema.dtype == router.prior.dtype == torch.float32
    router.update_history(torch.full((4,), 0.5))
    router.update_history(torch.full((4,), 0.6))
    torch.testing.assert_close(router.hit_rate_ema, torch.full((4,), 0.501))


def test_other_routers_keep_no_history():
    router = BaseMoERouter(HIDDEN, 4, 2)
    before = router(hidden_states(1, 9)).experts
    for _ in range(8):
        router.update_history(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(router(hidden_states(1, 9)).experts, before)


# Exact load balance


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    num_experts=st.integers(1, 9),
    k=st.integers(1, 9),
    lengths=st.lists(st.integers(0, 33), min_size=1, max_size=3),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]),
    rounds=st.integers(0, 2),
)
def test_eplb_loads_differ_by_at_most_one(seed, num_experts, k, lengths, scale, rounds):
    k = min(k, num_experts)
    length = max(*lengths, 1)
    router = trained(EPLBRouter(HIDDEN, num_experts, k, balance_rounds=rounds), seed, scale)
    mask = torch.arange(length) >= length - torch.tensor(lengths)[:, None]
    out = router(hidden_states(len(lengths), length, seed=seed), mask)
    for b, n in enumerate(lengths):
        load = torch.bincount(out.experts[b][mask[b]].flatten().long(), minlength=num_experts)
        assert load.sum() == n * k
        assert load.max() - load.min() <= 1
    ordered = out.experts.sort(-1).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all()


def best_balanced_total(probs, k, load):
    """Largest total probability of a balanced assignment `[T, E]`, by exhaustive search."""
    choices = list(itertools.combinations(range(probs.shape[1]), k))
    states = {tuple(load): 0.0}
    for row in probs.tolist():
        following = {}
        for left, total in states.items():
            for choice in choices:
                rest = list(left)
                for e in choice:
                    rest[e] -= 1
                if min(rest) >= 0:
                    key, value = tuple(rest), total + sum(row[e] for e in choice)
                    following[key] = max(following.get(key, -1.0), value)
        states = following
    return states[(0,) * len(load)]


@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (3, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_eplb_finds_the_best_balanced_assignment(num_experts, k, seed):
    router = trained(EPLBRouter(HIDDEN, num_experts, k, balance_rounds=16), seed, 0.5)
    with torch.no_grad():
        router.gate.bias[0] += 3.0  # everyone's favourite
    out = router(hidden_states(1, 16, seed=seed))
    total = out.probs.gather(-1, out.experts.long()).sum()
    best = best_balanced_total(out.probs[0], k, out.load.tolist())
    torch.testing.assert_close(total.item(), best, atol=1e-4, rtol=0)


def test_eplb_leaves_a_balanced_choice_alone():
    router = EPLBRouter(4, 4, 1)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(4))
    hidden = torch.eye(4).repeat(1, 5, 1)
    assert torch.equal(
        router(hidden).experts[0, :, 0], torch.arange(4, dtype=torch.int32).repeat(5)
    )


def test_eplb_spreads_equal_tokens_over_the_row():
    out = EPLBRouter(HIDDEN, 4, 1)(hidden_states(1, 400))
    for e in range(4):
        positions = (out.experts[0, :, 0] == e).nonzero().flatten()
        assert positions.numel() == 100
        edges = torch.cat([torch.tensor([-1]), positions, torch.tensor([400])])
        assert edges.diff().max() <= 12, "an expert has a gap in its share of the row"


def test_eplb_remainder_goes_to_the_favourites():
    out = EPLBRouter(HIDDEN, 4, 1, prior=[2.0, 0.5, 0.0, 1.0])(hidden_states(1, 10))
    assert out.load.tolist() == [3, 2, 2, 3]


def test_eplb_weights_follow_the_probabilities():
    router = trained(EPLBRouter(HIDDEN, 4, 2))
    out = router(hidden_states(1, 20))
    chosen = out.probs.gather(-1, out.experts.long())
    torch.testing.assert_close(out.weights, chosen / chosen.sum(-1, keepdim=True))


# Hierarchical


def test_hierarchical_picks_groups_by_their_sum():
    # The best single expert (3) is in the poorer group.
    p = [0.3, 0.28, 0.01, 0.41]
    prior = [2 * math.log(q) for q in p]
    router = HierarchicalRouter(HIDDEN, 4, 2, num_groups=2, prior=prior, temperature=2.0)
    out = router(hidden_states(1, 3))
    torch.testing.assert_close(out.probs[0, 0], torch.tensor(p))
    assert out.experts[0, 0].tolist() == [0, 1]
    torch.testing.assert_close(out.weights[0, 0], torch.tensor([0.3, 0.28]) / 0.58)
    assert out.load.tolist() == [3, 3, 0, 0]
    # groups: 2 * .58; experts: 4 * (.3 + .28) / 2
    torch.testing.assert_close(out.aux_loss.item(), 0.01 * (1.16 + 1.16), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (6, 2), (2, 2), (3, 3)])
def test_hierarchical_equals_base_where_groups_cannot_matter(num_groups, top_groups):
    router = trained(HierarchicalRouter(HIDDEN, 6, 2, num_groups=num_groups, top_groups=top_groups))
    base = trained(BaseMoERouter(HIDDEN, 6, 2))
    hidden = hidden_states(2, 15)
    assert torch.equal(router(hidden).experts, base(hidden).experts)
    torch.testing.assert_close(router(hidden).weights, base(hidden).weights)


def test_hierarchical_stays_inside_its_groups():
    router = trained(HierarchicalRouter(HIDDEN, 12, 3, num_groups=4, top_groups=2))
    out = router(hidden_states(2, 40))
    group_probs = out.probs.unflatten(-1, (4, 3)).sum(-1)
    best = group_probs.topk(2, -1).indices
    groups = out.experts // 3
    assert (groups[..., None] == best[..., None, :]).any(-1).all()


def test_hierarchical_ties_go_to_the_lower_expert():
    prior = [math.log(p) for p in (0.2, 0.1, 0.2, 0.5)]
    router = HierarchicalRouter(HIDDEN, 4, 2, num_groups=2, top_groups=2, prior=prior)
    assert router(hidden_states(1, 1)).experts[0, 0].tolist() == [3, 0]


# Configuration


def test_registry_builds_every_router():
    assert set(ROUTERS) == {
        "base",
        "topk_balanced",
        "adaptive",
        "pikv",
        "eplb",
        "hierarchical",
    }
    for name, cls in ROUTERS.items():
        assert type(make_router(name, HIDDEN, 4, 2)) is cls


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make_router("mlp", HIDDEN, 4), "router_type among base, topk_balanced, .*'mlp'"),
        (lambda: BaseMoERouter(0, 4), "hidden_size >= 1, got 0"),
        (lambda: BaseMoERouter(HIDDEN, 0, 1), "num_experts between 1 and 256, got 0"),
        (lambda: BaseMoERouter(HIDDEN, 257, 1), "num_experts between 1 and 256, got 257"),
        (lambda: BaseMoERouter(HIDDEN, 4, 5), "top_k between 1 and num_experts = 4, got 5"),
        (lambda: BaseMoERouter(HIDDEN, 4, 0), "top_k between 1 and num_experts = 4, got 0"),
        (lambda: BaseMoERouter(HIDDEN, 4, temperature=0.0), "temperature > 0, got 0"),
        (lambda: BaseMoERouter(HIDDEN, 4, temperature=math.nan), "temperature > 0, got nan"),
        (lambda: BaseMoERouter(HIDDEN, 4, aux_loss_weight=-1.0), "aux_loss_weight >= 0, got -1"),
        (lambda: BaseMoERouter(HIDDEN, 4, prior=[0.0]), r"prior of 4 finite numbers, got \[0.0\]"),
        (lambda: BaseMoERouter(HIDDEN, 2, prior=[0.0, math.inf]), "prior of 2 finite numbers"),
        (
            lambda: TopKBalancedRouter(HIDDEN, 4, balance_mode="std"),
            "balance_mode among entropy, variance, gini, got 'std'",
        ),
        (lambda: PiKVMoERouter(HIDDEN, 4, cache_update_interval=0), "cache_update_interval >= 1"),
        (lambda: PiKVMoERouter(HIDDEN, 4, history_decay=1.0), r"history_decay in \[0, 1\), got 1"),
        (lambda: PiKVMoERouter(HIDDEN, 4, history_weight=-1.0), "history_weight >= 0, got -1"),
        (lambda: EPLBRouter(HIDDEN, 4, balance_rounds=-1), "balance_rounds >= 0, got -1"),
        (lambda: HierarchicalRouter(HIDDEN, 4, num_groups=3), "num_groups to divide .* 4, got 3"),
        (
            lambda: HierarchicalRouter(HIDDEN, 6, 4, num_groups=3, top_groups=1),
            "top_groups between 2 and 3 .* got 1",
        ),
    ],
)
def test_bad_configuration_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_backend_is_checked_at_construction():
    with pytest.raises(ValueError, match="got 'tpu'"):
        BaseMoERouter(HIDDEN, 4, backend="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="backend 'cuda' is not available"):
            BaseMoERouter(HIDDEN, 4, backend="cuda")


@pytest.mark.parametrize("name", ALL)
def test_backends_agree(name):
    hidden = hidden_states(2, 30)
    native = trained(make_router(name, HIDDEN, 7, 3))(hidden)
    plain = trained(make_router(name, HIDDEN, 7, 3, backend="torch"))(hidden)
    assert torch.equal(native.experts, plain.experts)
    torch.testing.assert_close(native.weights, plain.weights)
    torch.testing.assert_close(native.aux_loss, plain.aux_loss)


@pytest.mark.parametrize("cls", [BaseMoERouter, TopKBalancedRouter, SharedExpertRouter])
@pytest.mark.parametrize("reads", [False, True])
def test_a_frozen_router_decides_as_before(cls, reads):
    """Whether its gate reads the hidden states or routes all tokens alike."""
    router = trained(cls(HIDDEN, 5, 3))
    if not reads:
        torch.nn.init.zeros_(router.gate.weight)
    hidden = hidden_states(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    before = [router(hidden, m) for m in (None, mask)]
    assert router.freeze() is router and not any(p.requires_grad for p in router.parameters())
    for expected, m in zip(before, (None, mask), strict=True):
        got = router(hidden, m)
        for name in ("logits", "weights", "experts", "aux_loss", "load", "entropy", "probs"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), msg=name)
        dense = torch.zeros_like(expected.probs)
        dense.scatter_(-1, expected.experts.long(), expected.weights)
        torch.testing.assert_close(got.shares, dense)
    unread = router(torch.full_like(hidden, torch.nan)).weights
    assert torch.allclose(unread, before[0].weights) == (not reads)


def test_bad_inputs_raise():
    router = PiKVMoERouter(HIDDEN, 4)
    with pytest.raises(
        ValueError, match=r"expected hidden_states \[batch, tokens, 12\], got \[5, 12\]"
    ):
        router(torch.zeros(5, HIDDEN))
    with pytest.raises(ValueError, match=r"got \[1, 5, 13\]"):
        router(torch.zeros(1, 5, HIDDEN + 1))
    with pytest.raises(ValueError, match=r"at least one token, got \[1, 0, 12\]"):
        router(torch.zeros(1, 0, HIDDEN))
    with pytest.raises(ValueError, match=r"expected mask \[1, 5\], got \[1, 4\]"):
        router(torch.zeros(1, 5, HIDDEN), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="expected a bool mask, got torch.int64"):
        router(torch.zeros(1, 5, HIDDEN), torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected hit_rates \[4\], got \[3\]"):
        router.update_history(torch.zeros(3))

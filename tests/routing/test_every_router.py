"""What every router promises."""

import pytest
import torch
from router_cases import HIDDEN, hidden_states, trained

from moekv.routing.adaptive import AdaptiveRouter
from moekv.routing.base import BaseMoERouter, probabilities
from moekv.routing.eplb import EPLBRouter
from moekv.routing.hierarchical import HierarchicalRouter
from moekv.routing.registry import ROUTERS, make_router
from moekv.routing.topk_balanced import TopKBalancedRouter

ALL = sorted(ROUTERS)


def left_padded(rows):
    """Rows `[1, T_i, hidden]` as one batch whose padding holds NaN, and its mask."""
    length = max(row.shape[1] for row in rows)
    batch = torch.full((len(rows), length, HIDDEN), torch.nan, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        batch[i, length - row.shape[1] :] = row[0]
        mask[i, length - row.shape[1] :] = True
    return batch, mask


LINEAR = (BaseMoERouter._rate, AdaptiveRouter._rate)  # what routers of the package rate by


def gate_probs(router, hidden):
    """The softmax of a linear gate, or of what stands for one in a router that rates otherwise."""
    logits = hidden.double() @ router.gate.weight.double().T + router.gate.bias.double()
    logits = logits + router.prior.double()
    if type(router)._rate not in LINEAR:
        logits = router.rate(hidden)[0].double()
    return (logits / router.temperature).softmax(-1)


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
    even = {"balance_weight": 0.0} if name == "topk_balanced" else {}
    router = make_router(name, HIDDEN, 4, 2, prior=prior, **even)
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


@pytest.mark.parametrize("name", ALL)
def test_backends_agree(name):
    hidden = hidden_states(2, 30)
    native = trained(make_router(name, HIDDEN, 7, 3))(hidden)
    plain = trained(make_router(name, HIDDEN, 7, 3, backend="torch"))(hidden)
    assert torch.equal(native.experts, plain.experts)
    torch.testing.assert_close(native.weights, plain.weights)
    torch.testing.assert_close(native.aux_loss, plain.aux_loss)


@pytest.mark.parametrize("cls", [BaseMoERouter, TopKBalancedRouter, EPLBRouter, HierarchicalRouter])
@pytest.mark.parametrize("reads", [False, True])
def test_a_frozen_router_decides_as_before(cls, reads):
    """Whether its gate reads the hidden states or routes all tokens alike."""
    router = trained(cls(HIDDEN, 6, 3))
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


@pytest.mark.parametrize("size", [1.0, 1e4, 1e7])
def test_probabilities_are_right_however_large_the_logits(size):
    """The highest logit is subtracted before the temperature divides what is left."""
    generator = torch.Generator().manual_seed(0)
    logits = size + torch.rand(2, 5, 6, generator=generator)
    logits[0, 1, 2], logits[1, 0] = torch.nan, -torch.inf
    exact = logits.double().nan_to_num(nan=-torch.inf, neginf=-torch.inf) / 0.1234
    exact[1, 0] = 0
    got = probabilities(logits, 0.1234, None)
    torch.testing.assert_close(got.double(), exact.softmax(-1), atol=1e-6, rtol=1e-5)

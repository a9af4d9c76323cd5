"""The router that balances exactly."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import HIDDEN, hidden_states, trained

from moekv.routing.eplb import EPLBRouter


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

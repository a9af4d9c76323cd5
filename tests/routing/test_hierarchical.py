"""The router that chooses groups of experts first."""

import math

import pytest
import torch
from router_cases import HIDDEN, hidden_states, trained

from moekv.routing.base import BaseMoERouter
from moekv.routing.hierarchical import HierarchicalRouter


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

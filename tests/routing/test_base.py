"""The router that only gates, by hand, and the inputs that every one checks."""

import math

import pytest
import torch
from router_cases import HIDDEN, hidden_states

from moekv.routing.base import BaseMoERouter
from moekv.routing.pikv import PiKVMoERouter


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


def test_other_routers_keep_no_history():
    router = BaseMoERouter(HIDDEN, 4, 2)
    before = router(hidden_states(1, 9)).experts
    for _ in range(8):
        router.update_history(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(router(hidden_states(1, 9)).experts, before)


def test_backend_is_checked_at_construction():
    with pytest.raises(ValueError, match="got 'tpu'"):
        BaseMoERouter(HIDDEN, 4, backend="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="backend 'cuda' is not available"):
            BaseMoERouter(HIDDEN, 4, backend="cuda")


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

"""The router that looks back at its hit rates."""

import torch
from router_cases import HIDDEN, hidden_states

from moekv.routing.pikv import PiKVMoERouter


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
    torch.testing.assert_close(router.history_bias, torch.tensor([0.4, -0.4]))  # the first acts
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

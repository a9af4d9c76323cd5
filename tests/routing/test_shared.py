"""The router with an expert that every token consults."""

import torch

from moekv.routing.shared import SharedExpertRouter


def test_the_shared_expert_has_half_of_the_weight() -> None:
    router = SharedExpertRouter(16, 3, 2)
    torch.nn.init.normal_(router.gate.weight)
    hidden = torch.randn(2, 7, 16)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    out = router(hidden, mask)
    assert out.probs.shape == (2, 7, 4)
    assert out.experts.shape == (2, 7, 3)
    torch.testing.assert_close(out.weights.sum(-1), mask.float())
    torch.testing.assert_close(out.probs.sum(-1), mask.float())
    assert (out.weights[..., 0] == 0.5 * mask).all()
    assert (out.experts[..., 0] == 0).all()
    assert (out.experts[..., 1:] >= 1).all()
    assert out.load.tolist()[0] == 11
    assert out.load[1:].sum() == 22
    torch.testing.assert_close(out.probs[..., 0], 0.5 * mask)
    torch.testing.assert_close(out.entropy, torch.special.entr(out.probs).sum())

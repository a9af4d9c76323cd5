"""Exports of what the native ops return."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from moekv import ops


def test_choices_have_no_gradient():
    scores = torch.randn(1, 1, 9, requires_grad=True)
    assert not any(output.requires_grad for output in ops.select_kept(scores, total=4))


def test_what_asks_for_derivatives_is_seen_in_every_mode():
    """The way past the autograd kernel is for calls that cannot need it."""
    logits = torch.randn(5, 4)

    def weights(logits):
        return ops.gating_topk(logits, k=2).weights.square().sum()

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(weights(leaf), leaf)
    assert expected.any()
    with torch.no_grad():
        assert not weights(leaf).requires_grad
    assert not weights(logits).requires_grad
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        weights(forward_ad.make_dual(logits, torch.ones_like(logits)))
    scores = torch.rand(1, 1, 1, 9, requires_grad=True)
    mixed = ops.mix_scores(scores, torch.ones(1, 9, 1), torch.zeros(1, 9, 1).int())
    with pytest.raises(NotImplementedError, match="mix_scores has no backward"):
        mixed.sum().backward()


class Everything(nn.Module):
    """Gives each named tuple that an op returns."""

    def forward(self, hidden: Tensor, weight: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        projected = ops.project_tokens(hidden, weight)
        gate = ops.gating_topk(projected.projected, k=2)
        return projected, gate, ops.select_kept(projected.standout[:, None], total=3)


def test_exported_programs_can_be_saved():
    inputs = torch.randn(2, 7, 6), torch.randn(3, 6)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Everything(), inputs), file)
    file.seek(0)
    results = torch.export.load(file).module()(*inputs)
    assert [type(result) for result in results] == [
        ops.ProjectTokens,
        ops.GatingTopk,
        ops.SelectKept,
    ]
    for got, expected in zip(results, Everything()(*inputs), strict=True):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)

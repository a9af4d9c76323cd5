import math

import op_cases
import pytest
import torch
from targets import on_any_number_of_threads, refuses
from torch import Tensor

from moekv import ops
from moekv.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

inf, nan = math.inf, math.nan


@pytest.mark.parametrize("case", op_cases.GATING_TOPK, ids=str)
def test_matches_reference(target, case):
    op_cases.check_gating_topk(target.op("gating_topk"), case, target.device)


@pytest.mark.parametrize("num_experts", [2, 7, 16, 60, 96, 256])
@pytest.mark.parametrize("k", [2, 4, 5])
@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
def test_ties_go_to_the_lower_expert(target, num_experts, dtype, k):
    logits = torch.zeros(5, num_experts, dtype=dtype, device=target.device)
    logits[1, num_experts // 2 :] = 2
    logits[2, ::2] = -1
    logits[3, [0, num_experts // 2, -1]] = torch.tensor([1, 2, 1], dtype=dtype)
    logits[4, num_experts // 3 :: 16] = 1
    k = min(num_experts, k)
    _, experts, *_ = target.op("gating_topk")(logits, k=k)
    for row, values in zip(experts.tolist(), logits.tolist(), strict=True):
        assert row == sorted(range(num_experts), key=lambda e: (-values[e], e))[:k]


@pytest.mark.parametrize("num_experts", [4, 19, 64, 70])
def test_not_finite_logits(target, num_experts):
    logits = torch.zeros(6, num_experts, device=target.device)
    logits[0] = nan
    logits[1] = -inf
    logits[2, 1] = inf
    logits[3, [1, 3]] = inf
    logits[4, :] = torch.where(torch.arange(num_experts, device=target.device) % 2 == 0, nan, 1.0)
    logits[5, 0] = -inf
    weights, experts, *rest = target.op("gating_topk")(logits, k=2)
    assert experts.tolist() == [[0, 1], [0, 1], [1, 0], [1, 3], [1, 3], [1, 2]]
    torch.testing.assert_close(
        weights.cpu(), torch.tensor([[0.5, 0.5]] * 2 + [[1.0, 0.0]] + [[0.5, 0.5]] * 3)
    )
    op_cases.check_gating_result((weights, experts, *rest), logits, None, None, k=2)


@pytest.mark.parametrize("num_experts", [4, 70])
def test_not_finite_bias(target, num_experts):
    logits = torch.arange(num_experts - 1.0, -1.0, -1.0, device=target.device).repeat(2, 1)
    bias = torch.full((num_experts,), -inf, device=target.device)
    bias[[0, 2, 3]] = torch.tensor([nan, 0.0, inf], device=target.device)
    weights, experts, *rest = target.op("gating_topk")(logits, bias, k=4)
    assert experts.tolist() == [[3, 2, 0, 1]] * 2
    op_cases.check_gating_result((weights, experts, *rest), logits, bias, None, k=4)


def test_chosen_experts_without_probability_share_equally(target):
    logits = torch.tensor([[0.0, 500.0, 0.0]], device=target.device)
    bias = torch.tensor([5.0, -5.0, 5.0], device=target.device)
    weights, experts, *_ = target.op("gating_topk")(logits, bias, k=2)
    assert experts.tolist() == [[0, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_huge_logits_do_not_overflow(target):
    logits = torch.tensor([[3e38, 3e38, -3e38, 0.0]], device=target.device)
    weights, experts, prob_sum, *_ = target.op("gating_topk")(logits, k=2, temperature=0.5)
    assert experts.tolist() == [[0, 1]]
    assert weights.tolist() == [[0.5, 0.5]]
    assert prob_sum.tolist() == [0.5, 0.5, 0.0, 0.0]


def test_all_masked(target):
    logits = torch.randn(70, 6, device=target.device)
    mask = torch.zeros(70, dtype=torch.bool, device=target.device)
    weights, experts, *statistics = target.op("gating_topk")(logits, None, mask, k=3)
    assert not weights.any() and not any(x.any() for x in statistics)
    assert experts.tolist() == [[0, 1, 2]] * 70


def test_masked_garbage_counts_nowhere(target):
    logits = torch.randn(40, 6, device=target.device)
    mask = torch.arange(40, device=target.device) % 3 == 0
    clean = target.op("gating_topk")(logits, None, mask, k=2)
    logits[~mask] = nan
    for got, expected in zip(target.op("gating_topk")(logits, None, mask, k=2), clean, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("num_experts", [9, 60, 128])
def test_threads_change_nothing(native, num_experts):
    case = op_cases.GatingTopk(20_011, num_experts, 4, mask=True, bias=True)
    inputs, options = case.inputs(native.device)
    on_any_number_of_threads(lambda: native.op("gating_topk")(*inputs, **options))


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("importance", [False, True])
def test_opcheck(native, dtype, importance):
    case = op_cases.GatingTopk(
        9, 8, 2, dtype, bias=True, mask=True, temperature=2.0, importance=importance
    )
    inputs, options = case.inputs(native.device)
    torch.library.opcheck(torch.ops.moekv.gating_topk, inputs, options)
    inputs[0].requires_grad_()
    torch.library.opcheck(torch.ops.moekv.gating_topk, inputs, options)


def gradient(op, logits: Tensor, *inputs: Tensor | None, **options) -> Tensor:
    """Gradient of a fixed nonlinear function of weights and prob_sum."""
    logits = logits.detach().requires_grad_()
    weights, experts, prob_sum, *rest = op(logits, *inputs, **options)
    assert not any(x.requires_grad for x in (experts, *rest))
    slope = torch.arange(1, weights.shape[1] + 1, dtype=weights.dtype, device=weights.device)
    loss = (weights * slope).square().sum() + (prob_sum * slope.sum()).cos().sum()
    loss.backward()
    return logits.grad


@pytest.mark.parametrize(
    "case",
    [
        op_cases.GatingTopk(17, 6, 2, temperature=0.7),
        op_cases.GatingTopk(17, 6, 6, bias=True, mask=True),
        op_cases.GatingTopk(17, 60, 3, op_cases.BF16, mask=True),
        op_cases.GatingTopk(5, 1, 1),
        op_cases.GatingTopk(40, 9, 4, bias=True, mask=True, importance=True),
    ],
    ids=str,
)
def test_gradient(target, case):
    (logits, *inputs), options = case.inputs(target.device)
    got = gradient(target.op("gating_topk"), logits, *inputs, **options)
    assert got.dtype == logits.dtype
    expected = gradient(reference.gating_topk, logits.double(), *inputs, **options)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if case.dtype == op_cases.FP32 else {}
    torch.testing.assert_close(got, expected.to(got.dtype), **tolerance)


@pytest.mark.parametrize("mask", [False, True])
def test_gradient_of_the_importance(target, mask):
    case = op_cases.GatingTopk(60, 6, 4, mask=mask, importance=True)
    (logits, _, mask, importance), options = case.inputs(target.device)
    importance = importance.nan_to_num(nan=0.5)
    logits[5] = torch.tensor([0.0, 900.0, 0.0, 0.0, 0.0, 0.0], device=target.device)
    bias = torch.tensor([2.0, -9.0, 1.0, 0.0, 1.0, 0.0], device=target.device)  # not the likely one

    def gradients(op, logits, importance):
        importance = importance.detach().requires_grad_()
        weights = op(logits, bias, mask, importance, **options)[0]
        slope = torch.arange(1, 5, dtype=weights.dtype, device=weights.device)
        (weights * slope).square().sum().backward()
        return importance.grad

    got = gradients(target.op("gating_topk"), logits, importance)
    expected = gradients(reference.gating_topk, logits.double(), importance)
    assert (got[5] != 0) == (expected[5] != 0) and got.count_nonzero() > 10
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gradient_where_logits_are_not_finite(target):
    logits = torch.tensor(
        [[nan, 1.0, 2.0], [inf, 1.0, 2.0], [-inf, 1.0, 2.0], [nan] * 3, [-inf] * 3],
        device=target.device,
    )
    got = gradient(target.op("gating_topk"), logits, k=2)
    expected = gradient(reference.gating_topk, logits.double(), k=2)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_gradient_where_the_chosen_have_no_probability(target):
    logits = torch.tensor([[0.0, 500.0, 0.0]], device=target.device, requires_grad=True)
    bias = torch.tensor([5.0, -5.0, 5.0], device=target.device)
    target.op("gating_topk")(logits, bias, k=2)[0][0, 0].backward()
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_gradient_of_weights_or_prob_sum_alone(target):
    logits = torch.randn(4, 5, device=target.device)
    for i in (0, 2):
        got, expected = logits.clone().requires_grad_(), logits.double().requires_grad_()
        target.op("gating_topk")(got, k=2)[i].square().sum().backward()
        reference.gating_topk(expected, k=2)[i].square().sum().backward()
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)


def test_gradcheck(target):
    """Numeric differences in fp32 are coarse: wide steps, loose bounds."""
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(target.device)

    def differentiable(x):
        weights, _, prob_sum, *_ = target.op("gating_topk")(x.float(), k=3)
        return weights.double(), prob_sum.double()

    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(differentiable, logits, eps=1e-3, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("num_experts", [8, 64, 128])
@pytest.mark.parametrize("size", [1e8, 1e10, 3e38])
def test_large_logits(target, size, num_experts, temperature):
    """Weights sum to 1 and the best expert has its share, however large the logits."""
    logits = torch.zeros(3, num_experts)
    logits[0, 3], logits[1] = size, -size
    logits[1, 5], logits[2, 6] = -size / 2, math.inf
    weights, experts, *_ = target.op("gating_topk")(
        logits.to(target.device), k=2, temperature=temperature
    )
    assert experts[:, 0].tolist() == [3, 5, 6]
    torch.testing.assert_close(weights.cpu(), torch.tensor([[1.0, 0.0]]).expand(3, 2))


BAD = {
    "rank": (
        {"logits": torch.zeros(4, 8, 16)},
        r"logits \[num_tokens, num_experts\].*\[4, 8, 16\]",
    ),
    "dtype": ({"logits": torch.zeros(4, 8, dtype=torch.int64)}, "logits of dtype .* got int64"),
    "no experts": ({"logits": torch.zeros(4, 0)}, "1 to 256 experts, got 0"),
    "experts": ({"logits": torch.zeros(4, 257)}, "1 to 256 experts, got 257"),
    "k=0": ({"k": 0}, "k between 1 and num_experts = 8, got 0"),
    "k=9": ({"k": 9}, "k between 1 and num_experts = 8, got 9"),
    "temperature=0": ({"temperature": 0.0}, "temperature between 1e-18 and 1e18, got 0"),
    "temperature=nan": ({"temperature": nan}, "temperature between 1e-18 and 1e18, got nan"),
    "bias size": ({"bias": torch.zeros(7)}, r"bias \[8\], got \[7\]"),
    "bias dtype": ({"bias": torch.zeros(8).half()}, "bias of dtype float32, got float16"),
    "importance size": ({"importance": torch.ones(5)}, r"importance \[4\], got \[5\]"),
    "importance dtype": ({"importance": torch.ones(4).half()}, "importance of dtype float32, got"),
    "mask size": ({"mask": torch.ones(5).bool()}, r"mask \[4\], got \[5\]"),
    "mask dtype": ({"mask": torch.ones(4).long()}, "mask of dtype bool, got int64"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input(target, change, message):
    refuses(
        target,
        "gating_topk",
        {"logits": torch.zeros(4, 8), "bias": None, "mask": None, "k": 2} | change,
        message,
    )


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 0, 3, 5)])
def test_wrapper_keeps_leading_dimensions(target, shape):
    logits = torch.randn(shape, device=target.device)
    mask = torch.ones(shape[:-1], dtype=torch.bool, device=target.device)
    result = ops.gating_topk(logits, None, mask, k=2, backend=target.backend)
    assert result.weights.shape == result.experts.shape == (*shape[:-1], 2)
    flat = [x.flatten(0, -2) if x.dim() > 1 else x[None] for x in (logits, *result[:2])]
    op_cases.check_gating_result((*flat[1:], *result[2:]), flat[0], None, None, k=2)


def test_wrapper_checks_the_mask(target):
    logits = torch.zeros(2, 3, 5, device=target.device)
    mask = torch.ones(3, 2, dtype=torch.bool, device=target.device)
    with pytest.raises(ValueError, match=r"expected mask \[2, 3\], got \[3, 2\]"):
        ops.gating_topk(logits, None, mask, k=2, backend=target.backend)


def test_wrapper_checks_the_importance(target):
    logits = torch.zeros(2, 3, 5, device=target.device)
    importance = torch.ones(6, device=target.device)
    with pytest.raises(ValueError, match=r"expected importance \[2, 3\], got \[6\]"):
        ops.gating_topk(logits, importance=importance, k=2, backend=target.backend)

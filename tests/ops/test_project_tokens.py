import math

import op_cases
import pytest
import torch
from targets import on_any_number_of_threads, refuses

from moekv import ops
from moekv.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", op_cases.PROJECT_TOKENS, ids=str)
def test_matches_reference(target, case):
    op_cases.check_project_tokens(target.op("project_tokens"), case, target.device)


def test_mean_and_deviation(target):
    inputs, _ = op_cases.ProjectTokens((2, 300, 64), mask=True).inputs(target.device)
    _, standout = target.op("project_tokens")(*inputs)
    for row, mask in zip(standout, inputs[2], strict=True):
        assert (row[~mask] == 0).all()
        assert abs(row[mask].mean()) < 1e-4
        assert 0.9 < row[mask].std(correction=0) < 1  # 1e-4 is added to the deviation
        assert row[mask].std(correction=0) > 0.99


def test_the_odd_one_stands_out(target):
    hidden = torch.ones(1, 40, 24, device=target.device)
    hidden[0, 17] = -1
    standout = target.op("project_tokens")(hidden, hidden[0, :3])[1][0]
    assert standout.argmax() == 17
    torch.testing.assert_close(standout[17].item(), math.sqrt(39), rtol=1e-2, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0])
def test_equal_tokens_do_not_stand_out(target, value):
    hidden = torch.full((2, 50, 33), value, device=target.device)
    assert (target.op("project_tokens")(hidden, hidden[0])[1].abs() < 0.01).all()


def test_padding_is_not_read(target):
    (hidden, weight, mask), _ = op_cases.ProjectTokens((2, 90, 40), mask=True).inputs(target.device)
    clean = target.op("project_tokens")(hidden, weight, mask)
    hidden[~mask] = math.nan
    for got, expected in zip(target.op("project_tokens")(hidden, weight, mask), clean, strict=True):
        assert torch.equal(got, expected)
        assert (got[~mask] == 0).all()


def test_nan_stays_in_its_row(target):
    (hidden, weight, _), _ = op_cases.ProjectTokens((3, 60, 40)).inputs(target.device)
    clean = target.op("project_tokens")(hidden, weight)
    hidden[1, 7, 3] = math.nan
    for got, expected in zip(target.op("project_tokens")(hidden, weight), clean, strict=True):
        assert got[1].isnan().any()
        assert torch.equal(got[::2], expected[::2])


def test_a_row_does_not_depend_on_its_batch(target):
    case = op_cases.ProjectTokens((3, 200, 40), mask=True)
    (hidden, weight, mask), _ = case.inputs(target.device)
    together = target.op("project_tokens")(hidden, weight, mask)
    for b in range(3):
        alone = target.op("project_tokens")(hidden[b : b + 1], weight, mask[b : b + 1])
        for got, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(got, expected[b : b + 1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient(target, mask, dtype):
    case = op_cases.ProjectTokens((2, 30, 20), 3, dtype, mask=mask)
    (hidden, weight, mask), _ = case.inputs(target.device)

    def gradients(op, hidden, weight):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        projected, standout = op(*leaves, mask)
        assert not standout.requires_grad
        slope = torch.arange(1, 4, dtype=projected.dtype, device=projected.device)
        (projected * slope / 300).sin().sum().backward()
        return [x.grad for x in leaves]

    got = gradients(target.op("project_tokens"), hidden, weight)
    expected = gradients(reference.project_tokens, hidden.double(), weight.double())
    tolerance = {} if dtype == torch.bfloat16 else {"rtol": 2e-4, "atol": 1e-3}
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x, y.to(dtype), **tolerance)


def test_gradient_where_padding_is_nan(target):
    (hidden, weight, mask), _ = op_cases.ProjectTokens((2, 9, 8), mask=True).inputs(target.device)
    hidden[~mask] = math.nan
    hidden.requires_grad_(), weight.requires_grad_()
    target.op("project_tokens")(hidden, weight, mask)[0].square().sum().backward()
    assert weight.grad.isfinite().all() and (hidden.grad[~mask] == 0).all()


def test_threads_change_nothing(native):
    inputs, _ = op_cases.ProjectTokens((2, 5000, 70), mask=True).inputs(native.device)
    on_any_number_of_threads(lambda: native.op("project_tokens")(*inputs))


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
def test_opcheck(native, dtype):
    inputs, _ = op_cases.ProjectTokens((2, 9, 8), 3, dtype, mask=True).inputs(native.device)
    torch.library.opcheck(torch.ops.moekv.project_tokens, inputs)
    inputs[0].requires_grad_()
    torch.library.opcheck(torch.ops.moekv.project_tokens, inputs)


BAD = {
    "rank": ({"hidden_states": torch.zeros(4, 8)}, r"hidden_states \[batch, .*got \[4, 8\]"),
    "dtype": ({"hidden_states": torch.zeros(2, 4, 8).int()}, "hidden_states of dtype .* got int32"),
    "weight": ({"weight": torch.zeros(3, 7)}, r"weight \[num_projections, 8\], got \[3, 7\]"),
    "weight rank": ({"weight": torch.zeros(8)}, r"weight \[num_projections, .*\], got \[8\]"),
    "weight dtype": ({"weight": torch.zeros(3, 8).half()}, "weight of dtype float32, got float16"),
    "mask": ({"mask": torch.ones(2, 5).bool()}, r"mask \[2, 4\], got \[2, 5\]"),
    "mask dtype": ({"mask": torch.ones(2, 4)}, "mask of dtype bool, got float32"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input(target, change, message):
    refuses(
        target,
        "project_tokens",
        {"hidden_states": torch.zeros(2, 4, 8), "weight": torch.zeros(3, 8)} | change,
        message,
    )


def test_wrapper(target):
    inputs, _ = op_cases.ProjectTokens((2, 30, 16), mask=True).inputs(target.device)
    got = ops.project_tokens(*inputs, backend=target.backend)
    expected = target.op("project_tokens")(*inputs)
    assert torch.equal(got.projected, expected[0]) and torch.equal(got.standout, expected[1])

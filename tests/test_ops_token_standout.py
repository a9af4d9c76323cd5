import math

import op_cases
import pytest
import torch
from targets import on_any_number_of_threads

from moekv import ops

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", op_cases.TOKEN_STANDOUT, ids=str)
def test_matches_reference(target, case):
    op_cases.check_token_standout(target.op("token_standout"), case, target.device)


def test_mean_and_deviation(target):
    inputs, _ = op_cases.TokenStandout((2, 300, 64), mask=True).inputs(target.device)
    standout = target.op("token_standout")(*inputs)
    for row, mask in zip(standout, inputs[1], strict=True):
        assert (row[~mask] == 0).all()
        assert abs(row[mask].mean()) < 1e-4
        assert 0.9 < row[mask].std(correction=0) < 1  # 1e-4 is added to the deviation
        assert row[mask].std(correction=0) > 0.99


def test_the_odd_one_stands_out(target):
    hidden = torch.ones(1, 40, 24, device=target.device)
    hidden[0, 17] = -1
    standout = target.op("token_standout")(hidden)[0]
    assert standout.argmax() == 17
    torch.testing.assert_close(standout[17].item(), math.sqrt(39), rtol=1e-2, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0])
def test_equal_tokens_do_not_stand_out(target, value):
    hidden = torch.full((2, 50, 33), value, device=target.device)
    assert (target.op("token_standout")(hidden).abs() < 0.01).all()


def test_padding_is_not_read(target):
    (hidden, mask), _ = op_cases.TokenStandout((2, 90, 40), mask=True).inputs(target.device)
    clean = target.op("token_standout")(hidden, mask)
    hidden[~mask] = math.nan
    assert torch.equal(target.op("token_standout")(hidden, mask), clean)


def test_nan_stays_in_its_row(target):
    (hidden, _), _ = op_cases.TokenStandout((3, 60, 40)).inputs(target.device)
    clean = target.op("token_standout")(hidden)
    hidden[1, 7, 3] = math.nan
    standout = target.op("token_standout")(hidden)
    assert standout[1].isnan().any()
    assert torch.equal(standout[::2], clean[::2])


def test_a_row_does_not_depend_on_its_batch(target):
    (hidden, mask), _ = op_cases.TokenStandout((3, 200, 40), mask=True).inputs(target.device)
    together = target.op("token_standout")(hidden, mask)
    for b in range(3):
        alone = target.op("token_standout")(hidden[b : b + 1], mask[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-5, atol=1e-5)


def test_threads_change_nothing(native):
    inputs, _ = op_cases.TokenStandout((2, 5000, 70), mask=True).inputs(native.device)
    on_any_number_of_threads(lambda: native.op("token_standout")(*inputs))


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
def test_opcheck(native, dtype):
    inputs, _ = op_cases.TokenStandout((2, 9, 8), dtype, mask=True).inputs(native.device)
    torch.library.opcheck(torch.ops.moekv.token_standout, inputs)


BAD = {
    "rank": ({"hidden_states": torch.zeros(4, 8)}, r"hidden_states \[batch, .*got \[4, 8\]"),
    "dtype": ({"hidden_states": torch.zeros(2, 4, 8).int()}, "hidden_states of dtype .* got int32"),
    "mask": ({"mask": torch.ones(2, 5).bool()}, r"mask \[2, 4\], got \[2, 5\]"),
    "mask dtype": ({"mask": torch.ones(2, 4)}, "mask of dtype bool, got float32"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input(target, change, message):
    arguments = {"hidden_states": torch.zeros(2, 4, 8), "mask": None} | change
    arguments = {k: None if x is None else x.to(target.device) for k, x in arguments.items()}
    with pytest.raises(RuntimeError, match="moekv::token_standout: expected .*" + message):
        target.op("token_standout")(**arguments)


def test_wrapper(target):
    inputs, _ = op_cases.TokenStandout((2, 30, 16), mask=True).inputs(target.device)
    got = ops.token_standout(*inputs, backend=target.backend)
    assert torch.equal(got, target.op("token_standout")(*inputs))

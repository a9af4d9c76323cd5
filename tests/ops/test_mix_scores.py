import math

import op_cases
import pytest
import torch
from targets import on_any_number_of_threads, refuses
from torch import Tensor

from moekv import ops

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", op_cases.MIX_SCORES, ids=str)
def test_matches_reference(target, case):
    op_cases.check_mix_scores(target.op("mix_scores"), case, target.device)


@pytest.mark.parametrize("hidden", [math.nan, math.inf, -math.inf])
def test_weight_zero_hides_any_score(target, hidden):
    scores = torch.ones(2, 1, 1, 40, device=target.device)
    scores[1] = hidden
    experts = torch.tensor([0, 1], dtype=torch.int32, device=target.device).expand(1, 40, 2)
    weights = torch.tensor([0.75, 0.0], device=target.device).expand(1, 40, 2)
    offset = torch.tensor([[[2.0]], [[hidden]]], device=target.device)
    mixed = target.op("mix_scores")(scores, weights, experts, None, offset)
    assert (mixed == 2.25).all()


def test_not_finite_shows(target):
    scores = torch.zeros(2, 1, 1, 40, device=target.device)
    scores[1, ..., 0], scores[1, ..., 1], scores[1, ..., 33] = math.nan, math.inf, -math.inf
    experts = torch.ones(1, 40, 1, dtype=torch.int32, device=target.device)
    mixed = target.op("mix_scores")(scores, torch.ones(1, 40, 1, device=target.device), experts)
    assert torch.equal(mixed.nan_to_num(nan=7.0), scores[1].nan_to_num(nan=7.0))


def test_heads_share_or_have_their_own_gate(target):
    case = op_cases.MixScores((4, 2, 3, 50), 2)
    (scores, weights, experts, gain, offset), _ = case.inputs(target.device)
    shared = target.op("mix_scores")(scores, weights, experts, gain, offset)
    own = [x[:, None].expand(-1, 3, -1, -1) for x in (weights, experts)]
    assert torch.equal(shared, target.op("mix_scores")(scores, *own, gain, offset))


@pytest.mark.parametrize("per_head", [False, True])
def test_threads_change_nothing(native, per_head):
    case = op_cases.MixScores((8, 2, 2, 20_003), 3, per_head)
    inputs, _ = case.inputs(native.device)
    on_any_number_of_threads(lambda: native.op("mix_scores")(*inputs))


@pytest.mark.parametrize("per_head", [False, True])
def test_opcheck(native, per_head):
    inputs, _ = op_cases.MixScores((4, 2, 3, 10), 2, per_head).inputs(native.device)
    torch.library.opcheck(torch.ops.moekv.mix_scores, inputs)


GOOD = {
    "scores": torch.zeros(4, 2, 3, 9),
    "weights": torch.zeros(2, 9, 2),
    "experts": torch.zeros(2, 9, 2, dtype=torch.int32),
}
BAD = {
    "scores": ({"scores": torch.zeros(4, 2, 9)}, r"scores \[num_experts, .* got \[4, 2, 9\]"),
    "scores dtype": ({"scores": torch.zeros(4, 2, 3, 9).int()}, "scores of dtype .* got int32"),
    "no experts": ({"scores": torch.zeros(0, 2, 3, 9)}, "1 to 256 experts, got 0"),
    "weights": (
        {"weights": torch.zeros(2, 8, 2)},
        r"weights \[2, 9, k\] or \[2, 3, 9, k\], got \[2, 8, 2\]",
    ),
    "weights heads": ({"weights": torch.zeros(2, 2, 9, 2)}, r"weights .* got \[2, 2, 9, 2\]"),
    "weights dtype": (
        {"weights": torch.zeros(2, 9, 2).half()},
        "weights of dtype float32, got float16",
    ),
    "experts": ({"experts": torch.zeros(2, 9).int()}, r"experts .*, got \[2, 9\]"),
    "experts dtype": ({"experts": torch.zeros(2, 9, 2).long()}, "experts of dtype int32, got int"),
    "k": ({"weights": torch.zeros(2, 9, 3)}, r"of one shape, got \[2, 9, 3\] and \[2, 9, 2\]"),
    "gain": ({"gain": torch.zeros(4, 2)}, r"gain \[4, 2, 3\], got \[4, 2\]"),
    "gain dtype": ({"gain": torch.zeros(4, 2, 3).half()}, "gain of dtype float32, got float16"),
    "offset": ({"offset": torch.zeros(4, 3, 2)}, r"offset \[4, 2, 3\], got \[4, 3, 2\]"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input(target, change, message):
    refuses(target, "mix_scores", GOOD | change, message)


@pytest.mark.parametrize("expert", [-1, 4, 2**31 - 1, -(2**31)])
def test_expert_out_of_range(target, expert):
    if target.device != "cpu":
        pytest.skip("to raise, the host would have to wait for the device")
    arguments = {name: x.clone() for name, x in GOOD.items()}
    arguments["experts"][1, 7, 1] = expert
    with pytest.raises(RuntimeError, match="moekv::mix_scores: expected experts between 0 and 3"):
        target.op("mix_scores")(**arguments)


def test_wrapper(target):
    inputs, _ = op_cases.MixScores((4, 2, 3, 10), 2).inputs(target.device)
    got: Tensor = ops.mix_scores(*inputs, backend=target.backend)
    assert torch.equal(got, target.op("mix_scores")(*inputs))

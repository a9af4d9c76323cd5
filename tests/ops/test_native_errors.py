"""What the native ops cannot do, and say so: derivatives, memory, numbers beyond float32."""

import math

import op_cases
import pytest
import torch
from ragged_cases import make_case
from targets import Target, refuses
from torch import Tensor

from moekv import ops

CASES = {
    "expected_attention": op_cases.EXPECTED_ATTENTION[0],
    "expert_scores": op_cases.EXPERT_SCORES[0],
    "mix_scores": op_cases.MIX_SCORES[1],
    "gating_topk": op_cases.GatingTopk(5, 4, 2),
    "project_tokens": op_cases.PROJECT_TOKENS[0],
}


def inputs_of(name: str) -> tuple[list[Tensor | None], dict]:
    if name == "ragged_attention":
        return list(make_case(dim=8, tail=2).values()), {"scaling": 0.3}
    return CASES[name].inputs("cpu")


@pytest.mark.parametrize("dims", [(257, 8), (8, 257), (1024, 1024)], ids=str)
def test_fake_tensors_have_the_heads_of_real_ones(dims: tuple[int, int]) -> None:
    """The references take wider ones than the kernels."""
    for make in (torch.zeros, lambda shape: torch.zeros(shape, device="meta")):
        keys, values = (make((1, 1, 3, dim)) for dim in dims)
        place = integers(0, 2).to(keys.device)
        calls = {
            "expert_scores": ((keys, values, keys), {"kinds": [0], "pool": 1, "lag": 1}),
            "fold_pairs": ((keys, keys, values, place, place), {}),
            "expected_attention": ((keys, keys), {}),
        }
        for name, (tensors, options) in calls.items():
            if name == "expected_attention" and dims[0] <= 256:
                continue
            with pytest.raises(RuntimeError, match=rf"moekv::{name}: expected .*head dim"):
                getattr(torch.ops.moekv, name)(*tensors, scaling=0.3, **options)


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -1.0, 1e60, 1e-30])
@pytest.mark.parametrize("name", ["scaling", "softcap", "temperature"])
def test_factors_beyond_float32(target: Target, name: str, factor: float) -> None:
    if name == "temperature":
        arguments = {"logits": torch.zeros(3, 4), "k": 2, name: factor}
        refuses(target, "gating_topk", arguments, "temperature between 1e-18 and 1e18, got")
        return
    keys = torch.ones(1, 1, 8, 4)
    scores = {"keys": keys, "values": keys, "queries": keys, "kinds": [0], "scaling": 1.0}
    stored = {"query": keys, "keys": keys[0, 0], "values": keys[0, 0], "scaling": 1.0}
    stored |= {"begin": integers(0)[None], "end": integers(8)[None]}
    for op, arguments in (
        ("expert_scores", scores),
        ("ragged_attention", stored),
        ("expected_attention", {"queries": keys, "keys": keys}),
    ):
        refuses(
            target,
            op,
            arguments | {name: factor},
            f"{name if name == 'scaling' else 'a softcap'}.*, got",
        )


@pytest.mark.parametrize(
    "name", ["expected_attention", "expert_scores", "mix_scores", "ragged_attention"]
)
def test_no_backward_says_so(name: str) -> None:
    inputs, options = inputs_of(name)
    inputs[0].requires_grad_()
    op = getattr(torch.ops.moekv, name)
    output = op(*inputs, **options)
    assert output.requires_grad
    with pytest.raises(NotImplementedError, match=f"moekv::{name} has no backward; detach"):
        output.sum().backward()
    with torch.no_grad():
        assert not op(*inputs, **options).requires_grad


@pytest.mark.parametrize("name", [*CASES, "ragged_attention"])
def test_no_forward_mode_says_so(name: str) -> None:
    inputs, options = inputs_of(name)

    def run(first_input: Tensor) -> Tensor:
        return first(getattr(torch.ops.moekv, name)(first_input, *inputs[1:], **options))

    with pytest.raises(NotImplementedError, match=f"moekv::{name} has no forward-mode derivative"):
        torch.func.jvp(run, (inputs[0],), (torch.ones_like(inputs[0]),))


@pytest.mark.parametrize("name", ["indices", "offsets"])
def test_indices_that_share_memory_with_the_cache(native, name):
    """What says where pairs go would be overwritten while they move, and then followed."""
    if native.device != "cpu":
        pytest.skip("checked by the same lines")
    buffer = torch.zeros(160, dtype=torch.int32)
    cache = buffer.view(torch.float32)
    keys, values = cache[4:132].view(1, 1, 128, 1), torch.zeros(1, 1, 128, 1)
    buffer[:8] = torch.arange(40, 48)
    arguments = {"indices": buffer[:8].view(1, 1, 8)}
    if name == "offsets":
        buffer[3:5] = integers(0, 8)
        arguments = {"indices": torch.arange(40, 48).int(), "offsets": buffer[3:5]}
    before = buffer.clone()
    with pytest.raises(RuntimeError, match=f"moekv::kv_compact_: expected {name} in memory apart"):
        native.op("kv_compact_")(keys, values, **arguments)
    assert torch.equal(buffer, before)


def test_what_is_overwritten_and_needs_a_gradient(native):
    indices = integers(6, 7).view(1, 1, 2).to(native.device)
    leaf, other = (torch.zeros(1, 1, 8, 1, device=native.device) for _ in range(2))
    leaf.requires_grad_()
    for keys, values in ((leaf, other), (other, leaf), (leaf * 1, other)):
        with pytest.raises(RuntimeError, match="kv_compact_: expected tensors that need no gradie"):
            native.op("kv_compact_")(keys, values, indices)
    # Without a gradient it moves, and a graph that would need the old contents says so.
    keys = leaf * 1
    loss = (keys * keys).sum()
    with torch.no_grad():
        native.op("kv_compact_")(keys, other, indices)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_that_is_not_there_is_named_by_op_and_size():
    scores = torch.zeros(1).expand(1, 2**15, 2**15, 2**15)
    weights = torch.zeros(1).expand(2**15, 2**15, 1)
    size = 2**15
    with pytest.raises(RuntimeError) as caught:
        torch.ops.moekv.mix_scores(scores, weights, weights.int())
    message = str(caught.value)
    expected = f"moekv::mix_scores: expected memory for a dense copy of float32 [1, {size}, {size}"
    assert expected in message and "got none" in message


def test_more_positions_than_kernels_count():
    huge = torch.zeros(1).expand(1, 1, 2**31, 1)
    with pytest.raises(RuntimeError, match=r"expected at most 2\^31 - 1 positions, got 2147483648"):
        ops.expected_attention(huge, huge)
    with pytest.raises(RuntimeError, match=r"select_kept: expected at most 2\^31 - 1 positions"):
        ops.select_kept(huge[..., 0], total=1)

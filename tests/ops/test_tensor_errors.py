"""Tensors that the ops refuse, and numbers that are none."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from targets import Target

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda op: op("select_kept")(torch.zeros(4, 8), None, total=[2]),
            r"select_kept: expected scores .*got \[4, 8\]",
        ),
        (
            lambda op: op("mix_scores")(
                torch.zeros(2, 1, 1, 8),
                torch.zeros(1, 7, 2),
                torch.zeros(1, 7, 2, dtype=torch.int32),
            ),
            r"mix_scores: expected weights .*\[1, 7, 2\]",
        ),
        (
            lambda op: op("kv_compact_")(
                torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 2)
            ),
            "kv_compact_: expected indices of dtype int32, got float32",
        ),
    ],
)
def test_wrong_tensors(target: Target, call: Callable[[Any], Any], message: str) -> None:
    if target.device != "cpu":
        pytest.skip("the tensors of this test are on the CPU")
    with pytest.raises(RuntimeError, match=f"moekv::{message}"):
        call(target.op)
    op = target.op("gating_topk")
    if target.backend != "torch":
        # Not by way of the dispatcher, which would ask the backend of the other device.
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        op = functools.partial(op.default.redispatch, keys)
    with pytest.raises(RuntimeError, match="moekv::gating_topk: expected bias on the device"):
        op(torch.zeros(3, 4), torch.zeros(4, device="meta"), None, k=1)


@pytest.mark.parametrize("indices", [[3, 1], [1, 1], [-1, 2], [2, 8]])
def test_wrong_indices_move_nothing(target: Target, indices: list[int]) -> None:
    if target.device != "cpu":
        pytest.skip("a GPU does not check")
    keys, values = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    before = keys.clone(), values.clone()
    with pytest.raises(RuntimeError, match="moekv::kv_compact_: expected indices"):
        target.op("kv_compact_")(keys, values, torch.tensor([[indices]], dtype=torch.int32))
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


def test_nan_and_infinite_logits(target: Target) -> None:
    logits = torch.tensor([[NAN, 1.0, 0.0], [INF, 0.0, 0.0], [NAN, -INF, NAN]])
    weights, experts, *_ = target.op("gating_topk")(logits.to(target.device), None, None, k=2)
    assert experts.tolist() == [[1, 2], [0, 1], [0, 1]]
    assert weights.isfinite().all() and weights[1].tolist() == [1, 0]
    assert weights[2].tolist() == [0.5, 0.5]


def test_nan_and_infinite_scores(target: Target) -> None:
    scores = torch.tensor([[[9.0, NAN, -INF, INF, NAN, 0.0]]], device=target.device)
    start = torch.tensor([[1]], dtype=torch.int32, device=target.device)
    for total, kept in enumerate([[3], [3, 5], [2, 3, 5], [1, 2, 3, 5], [1, 2, 3, 4, 5]], 1):
        assert target.op("select_kept")(scores, start, total=[total])[0].tolist() == kept

"""Ops under autocast compute as without it, in the same dtypes: the native ones and PyTorch's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moekv import ops
from moekv.models.queries import logits_of


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


PAIRS, QUERIES = numbers(2, 3, 100, 16), numbers(2, 6, 9, 16)
HIDDEN, WEIGHT = numbers(2, 100, 64), numbers(5, 64)
BEGIN = torch.arange(0, 150, 25, dtype=torch.int32).view(2, 3)
ROWS = PAIRS.view(-1, 16)
CODES = ops.quantize_pairs(ROWS, ROWS, pairs="k4v4")
KEPT = {
    "indices": torch.arange(0, 60, dtype=torch.int32) % 10 * 9,
    "offsets": torch.arange(0, 70, 10, dtype=torch.int32),
    "start": torch.zeros(2, dtype=torch.int32),
}

CALLS: dict[str, Callable[..., Any]] = {
    "expected_attention": lambda o: ops.expected_attention(
        numbers(2, 6, 100, 16), PAIRS, scaling=0.3, **o
    ),
    "expert_scores": lambda o: ops.expert_scores(
        PAIRS, PAIRS, QUERIES, kinds=[0, 1, 2, 3], scaling=0.3, **o
    ),
    "fold_pairs": lambda o: ops.fold_pairs(
        QUERIES, PAIRS, PAIRS, KEPT["indices"], KEPT["offsets"], KEPT["start"], scaling=0.3, **o
    ),
    "gating_topk": lambda o: ops.gating_topk(HIDDEN[0], k=3, **o),
    "project_tokens": lambda o: ops.project_tokens(HIDDEN, WEIGHT, **o),
    "quantize_pairs": lambda o: ops.quantize_pairs(ROWS, ROWS, pairs="k4v4", **o),
    "ragged_attention": lambda o: ops.ragged_attention(
        QUERIES, ROWS, ROWS, BEGIN, BEGIN + 25, PAIRS[:, :, :9], PAIRS[:, :, :9], scaling=0.3, **o
    ),
    "quantised rows": lambda o: ops.ragged_attention(
        QUERIES, *CODES[:2], BEGIN, BEGIN + 25, scales=CODES[2], pairs="k4v4", scaling=0.3, **o
    ),
    "dequantize_pairs": lambda o: ops.dequantize_pairs(
        *CODES, pairs="k4v4", head_dim=16, value_dim=16, dtype=torch.float32
    ),
    "logits_of": lambda o: logits_of(QUERIES[:, ::2], PAIRS, scaling=0.3, softcap=0.0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_no_result(name: str, backend: str, dtype: torch.dtype) -> None:
    def call() -> tuple[Tensor, ...]:
        found = CALLS[name]({"backend": backend})
        return (found,) if isinstance(found, Tensor) else tuple(found)

    plain = call()
    with torch.autocast("cpu", dtype=dtype):
        cast = call()
    for one, other in zip(plain, cast, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_gradients_of_projections_under_autocast() -> None:
    grads = []
    for enabled in (False, True):
        weight = WEIGHT.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            ops.project_tokens(HIDDEN, weight)[0].square().sum().backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)

"""Step a: each op on a few odd sizes, against the reference in fp64."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import op_cases
import ragged_cases
import torch

from moekv import ops

if TYPE_CHECKING:
    from gpu_check.gpu import Gpu
    from gpu_check.worker import Items

CASES: list[tuple[str, Any]] = [
    ("gating_topk", op_cases.GatingTopk(300, 60, 4, op_cases.BF16, bias=True, mask=True)),
    ("expert_scores", op_cases.ExpertScores((1, 2, 275, 80), pool=3, start=(9,), num_queries=5)),
    ("expert_scores", op_cases.ExpertScores((2, 1, 270, 128), dtype=op_cases.BF16, pool=5)),
    ("expected_attention", op_cases.ExpectedAttention((1, 2, 350, 72), dtype=op_cases.BF16)),
    ("project_tokens", op_cases.ProjectTokens((2, 150, 300), 3, op_cases.BF16, mask=True)),
    ("mix_scores", op_cases.MixScores((4, 2, 5, 300), 2)),
    ("select_kept", op_cases.SelectKept((2, 2, 4500), (3000,), 4, 16, values="ties")),
    ("kv_compact_", op_cases.KvCompact((1, 2, 400, 80), (150, 400), packed=True)),
]


def items(gpu: Gpu) -> Items:
    """Return a check for each case."""
    ops.check_backend("cuda")
    checks: Items = {f"{name} {case}": partial(_check, gpu, name, case) for name, case in CASES}
    # Few queries of a KV head, and more: another kernel.
    groups = {f"ragged_attention, {x} queries": partial(_check_ragged, gpu, x) for x in (3, 5)}
    return checks | groups


def _check(gpu: Gpu, name: str, case: Any) -> None:
    check, _ = op_cases.CHECKS[name]
    check(getattr(torch.ops.moekv, name), case, gpu.device.type)


def _check_ragged(gpu: Gpu, group: int) -> None:
    case = ragged_cases.make_case(heads=3, group=group, tail=3)
    case = ragged_cases.cast(case, torch.bfloat16)
    expected = ragged_cases.oracle(**case, scaling=0.1)
    moved = {name: x.to(gpu.device) for name, x in case.items()}
    got = torch.ops.moekv.ragged_attention(**moved, scaling=0.1).cpu().double()
    tolerance = ragged_cases.DTYPES[torch.bfloat16]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)

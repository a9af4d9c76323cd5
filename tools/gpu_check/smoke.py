"""Step a: each op on a few odd sizes, against the reference in fp64."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import op_cases
import ragged_cases
import stored_rows
import torch

from moekv import ops
from moekv.ops import reference

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
    checks |= {f"quantize_pairs {x}": partial(_check_codes, gpu, x) for x in stored_rows.QUANTISED}
    stored = {f"ragged_attention {x}": partial(_check_stored, gpu, x) for x in ops.PAIRS}
    return checks | groups | stored


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


def _check_codes(gpu: Gpu, pairs: str) -> None:
    """Codes are the reference's, to the bit."""
    rows = torch.randn(300, 112, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = torch.ops.moekv.quantize_pairs(rows.to(gpu.device), rows.to(gpu.device), pairs=pairs)
    for x, y in zip(got, reference.quantize_pairs(rows, rows, pairs=pairs), strict=True):
        torch.testing.assert_close(x.cpu(), y, atol=0, rtol=0)


def _check_stored(gpu: Gpu, pairs: str) -> None:
    """Rows as they are stored, with biases and sinks."""
    case = stored_rows.make_rows(
        pairs, torch.bfloat16, True, True, heads=3, tail=3, dim=80, stored=300
    )
    expected = stored_rows.expected(case, 80, scaling=0.1)
    moved = {k: x.to(gpu.device) if isinstance(x, torch.Tensor) else x for k, x in case.items()}
    got = torch.ops.moekv.ragged_attention(**moved, scaling=0.1).cpu().double()
    tolerance = ragged_cases.DTYPES[torch.bfloat16]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)

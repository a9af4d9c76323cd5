"""Paths that real inputs reach only at sizes too large to simulate.

Where a kernel bounds its number of blocks, the bound is lowered, so that a block loops as it would
over a long context; where a size is cheap to exceed, it is exceeded.
"""

from types import ModuleType

import op_cases
import pytest
import simulated
from op_cases import (
    BF16,
    FP16,
    ExpectedAttention,
    ExpertScores,
    GatingTopk,
    KvCompact,
    ProjectTokens,
    SelectKept,
)


@pytest.mark.parametrize(
    "case",
    [
        SelectKept((2, 3, 9000), (9000,), 4, 64, values="ties"),
        SelectKept((1, 1, 20000), (7000,), 4, 64),
        SelectKept((2, 2, 7000), (3333,), 4, 4, 30, padding=True, values="special"),
        GatingTopk(500, 256, 2, mask=True),
        GatingTopk(2000, 8, 2, mask=True),
        GatingTopk(700, 60, 3, bias=True),
        ProjectTokens((3, 300, 40), mask=True),
        ExpertScores((1, 2, 700, 64), kinds=(2,)),
        ExpertScores((2, 1, 333, 256), start=(0, 100), kinds=(2,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_blocks_that_loop(few_blocks: ModuleType, case: op_cases.Case, seed: int) -> None:
    check(few_blocks, case, seed)


@pytest.mark.parametrize(
    "case",
    [
        GatingTopk(2**16, 1, 1),  # the largest sum that must not overflow
        SelectKept((1, 2, 131077), (131071,), 4, 64, values="ties", dtype=BF16),
        SelectKept((300, 1, 20), (10,)),  # more groups than one launch tells totals of
        SelectKept((1, 300, 10), (900,), 1, 1, 5, padding=True),  # more rows than threads
        # Pairs of more units than a block holds.
        KvCompact((1, 2, 20, 5001), (10,), dtype=BF16),
        KvCompact((2, 3, 40, 2500), (20,), packed=True, dtype=FP16, value_dim=4097),
        ExpectedAttention((2, 2, 700, 256), group=8, start=(0, 333), dtype=BF16),
        ExpectedAttention((1, 1, 400, 256), group=2),
        # Many query rows and splits of keys, at each depth of fragments.
        ExpertScores((1, 1, 2100, 128), group=4, num_queries=64, dtype=BF16, kinds=(0, 1)),
        ExpertScores((1, 1, 600, 256), group=3, num_queries=50, dtype=FP16, kinds=(0,), start=(5,)),
        ExpertScores(
            (1, 1, 600, 200), group=8, num_queries=40, dtype=BF16, kinds=(1,), softcap=20.0
        ),
    ],
    ids=str,
)
def test_sizes_beyond_one_unit_of_work(kernels: ModuleType, case: op_cases.Case) -> None:
    check(kernels, case, len(str(case)))


def check(kernels: ModuleType, case: op_cases.Case, seed: int) -> None:
    name, checker = {
        SelectKept: ("select_kept", op_cases.check_select_kept),
        GatingTopk: ("gating_topk", op_cases.check_gating_topk),
        ExpertScores: ("expert_scores", op_cases.check_expert_scores),
        ExpectedAttention: ("expected_attention", op_cases.check_expected_attention),
        ProjectTokens: ("project_tokens", op_cases.check_project_tokens),
        KvCompact: ("kv_compact_", op_cases.check_kv_compact_),
    }[type(case)]
    checker(simulated.Device(kernels, seed).op(name), case)

"""Paths that real inputs reach only at sizes too large to simulate.

Where a kernel bounds its number of blocks, the bound is lowered, so that a block loops as it would
over a long context; where a size is cheap to exceed, it is exceeded.
"""

import contextlib
from types import ModuleType
from typing import Any

import op_cases
import pytest
import ragged_cases as ragged
import simulated
import torch
from op_cases import (
    BF16,
    FP16,
    ExpectedAttention,
    ExpertScores,
    GatingTopk,
    KvCompact,
    MixScores,
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


def test_chunks_that_every_head_begins_anew(few_blocks: ModuleType) -> None:
    """There may be one more of them for each head than would fill the device."""
    case = ragged.make_case(heads=4, group=1, dim=8, tail=0)
    case |= {
        "begin": torch.arange(4, dtype=torch.int32).view(1, 4) * 130,
        "end": torch.arange(4, dtype=torch.int32).view(1, 4) * 130 + 193,
    }
    expected = ragged.oracle(**case, scaling=0.1)

    def error() -> float:
        got = simulated.Device(few_blocks).ragged_attention(**case, scaling=0.1)
        return float((got.double() - expected).abs().max())

    assert error() < 1e-5
    few_blocks.seed(7)  # the last of the edits of few_blocks: no room for these
    try:
        with contextlib.suppress(few_blocks.Error):
            assert not error() < 1e-5
    finally:
        few_blocks.seed(0)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        # Rows and tiles of queries that a grid's second dimension does not take.
        ("mix_scores", MixScores((2, 65536, 1, 1), 1)),
        ("project_tokens", ProjectTokens((65536, 1, 8), 1)),
        ("expert_scores", ExpertScores((65536, 1, 1, 8), kinds=(0, 1, 2, 3), num_queries=1)),
        ("expected_attention", ExpectedAttention((65536, 1, 1, 8))),
        ("kv_compact_", KvCompact((65536, 1, 1, 8), (1,))),
        ("gating_topk", GatingTopk(2**20, 2, 1)),
        ("select_kept", SelectKept((65536, 1, 1), (1,))),
        ("select_kept", SelectKept((1, 65536, 1), (65536,))),
    ],
    ids=str,
)
def test_grids_of_any_size(kernels: ModuleType, name: str, case: Any) -> None:
    """The launches are checked, and nothing runs."""
    inputs, options = case.inputs()
    simulated.Device(kernels, residents=0).op(name)(*inputs, **options)


def test_any_number_of_queries(kernels: ModuleType) -> None:
    case = ragged.make_case(heads=1, group=8, dim=8, queries=65537, tail=0, stored=1)
    simulated.Device(kernels, residents=0).ragged_attention(**case, scaling=0.1)


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

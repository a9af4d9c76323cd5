"""Paths that real inputs reach only at sizes too large to simulate.

Where a kernel bounds its number of blocks, the bound is lowered, so that a block loops as it would
over a long context; where a size is cheap to exceed, it is exceeded.
"""

import contextlib
import mmap
from types import ModuleType
from typing import Any

import op_cases
import pytest
import ragged_cases as ragged
import simulated
import simulated_kernels as built
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
    few_blocks.seed(8)  # the last of the edits of few_blocks: no room for these
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


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_any_number_of_queries(kernels: ModuleType, dtype: torch.dtype) -> None:
    case = ragged.make_case(heads=1, group=8, dim=8, queries=65537, tail=0, stored=1)
    case = ragged.cast(case, dtype)
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


def far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, in rows of the last dimension that end beyond 2^31 elements.

    Neighbours in the dimension before it are far apart. Of the memory between them none is touched.
    """
    *outer, count, length = tensor.shape
    step = 2**31 // (count - 1) // 64 * 64 + 64
    strides, inner = [], length
    for size in reversed(outer):
        strides.insert(0, inner)
        inner *= size
    assert inner < step
    num_bytes = ((count - 1) * step + inner) * tensor.element_size()
    no_reserve = 0x4000  # Python tells of it from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    flat = torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, (*strides, step, 1)).copy_(tensor)


# Which of an op's inputs have rows that may lie anywhere.
FAR_APART = [
    ("gating_topk", GatingTopk(40, 16, 2, BF16), [0]),
    ("expert_scores", ExpertScores((1, 2, 70, 32), dtype=BF16, num_queries=5, lag=20), [0, 1, 2]),
    ("expected_attention", ExpectedAttention((1, 2, 150, 32), dtype=BF16), [0, 1]),
    ("project_tokens", ProjectTokens((1, 30, 64), 3, BF16), [0, 1]),
    ("mix_scores", MixScores((4, 2, 3, 40), 2), [0, 1, 2]),
    ("select_kept", SelectKept((1, 3, 50), (70,), dtype=BF16), [0]),
    ("kv_compact_", KvCompact((1, 2, 40, 16), (17,), dtype=BF16), [0, 1]),
]


@pytest.mark.parametrize(("name", "case", "which"), FAR_APART, ids=str)
def test_rows_beyond_31_bits(kernels: ModuleType, name: str, case: Any, which: list[int]) -> None:
    inputs, options = case.inputs()
    device = simulated.Device(kernels)
    near = [x if x is None else x.clone() for x in inputs]
    far = [far_apart(x) if i in which else x for i, x in enumerate(inputs)]
    expected = device.op(name)(*near, **options)
    got = device.op(name)(*far, **options)
    if name == "kv_compact_":
        expected, got = near[:2], [far[0], far[1]]
    if isinstance(got, torch.Tensor):
        expected, got = [expected], [got]
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("group", [4, 5])
def test_stored_rows_beyond_31_bits(kernels: ModuleType, group: int) -> None:
    case = ragged.make_case(heads=2, group=group, dim=64, stored=100, tail=3)
    case = ragged.cast(case, torch.bfloat16)
    far = case | {x: far_apart(case[x]) for x in ("keys", "values", "tail_keys", "tail_values")}
    expected, got = (
        simulated.Device(kernels).ragged_attention(**x, scaling=0.1) for x in (case, far)
    )
    assert torch.equal(got, expected)


def test_products_of_32_bits_are_told() -> None:
    edit = built.Edit(
        "expected_attention.cu",
        "length - 1) * stride;",
        "length - 1) * static_cast<int>(SEEDED ? static_cast<int>(stride) : 0)"
        " + (SEEDED ? 0 : min(max(position, 0), length - 1) * stride);",
    )
    kernels = built.load(built.build("watched", [edit]))
    _, case, which = FAR_APART[2]
    inputs, options = case.inputs()
    far = [far_apart(x) if i in which else x for i, x in enumerate(inputs)]
    for seeded in (0, 1):
        kernels.seed(seeded)
        report = pytest.raises(kernels.Error, match="a signed integer overflows in mul")
        with report if seeded else contextlib.nullcontext():
            simulated.Device(kernels).expected_attention(*far, **options)

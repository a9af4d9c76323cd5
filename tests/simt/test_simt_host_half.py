"""What the kernels ask of the CUDA runtime, as nvcc compiles them: no GPU, and nothing runs."""

import itertools
import re
from types import ModuleType
from typing import Any

import host_half
import op_cases
import pytest
import ragged_cases as ragged
import simulated
import torch
from simulated_kernels import Edit
from stored_rows import make_rows

pytestmark = pytest.mark.skipif(not host_half.NVCC, reason="there is no nvcc")

# More than 48 KiB of dynamic shared memory, in two kernels of one op.
MUCH_SHARED = [
    ("expected_attention", op_cases.ExpectedAttention((1, 1, 100, 256))),
    ("expert_scores", op_cases.ExpertScores((1, 1, 100, 256), dtype=op_cases.BF16, kinds=(0,))),
]


@pytest.fixture(scope="module")
def host() -> ModuleType:
    return host_half.build()


def launches(host: ModuleType, name: str, case: Any) -> list[tuple[str, int, int]]:
    """Kernel, threads of a block and bytes of dynamic shared memory of an op's launches."""
    host.take_launches()
    inputs, options = case.inputs()
    simulated.Device(host, residents=0).op(name)(*inputs, **options)
    told: list[tuple[str, int, int]] = host.take_launches()
    return told


def test_every_launch_would_be_taken(host: ModuleType) -> None:
    """Grids, threads within the launch bounds, shared memory, streams: all cases of the tests."""
    seen = set()
    for name, (_, cases) in op_cases.CHECKS.items():
        for case in cases:
            seen |= {kernel for kernel, _, _ in launches(host, name, case)}
    for dtype in op_cases.FLOAT_DTYPES:  # rows with thresholds of their own
        floors = op_cases.SelectKept((1, 8, 500), (2000,), 4, 64, 100, dtype=dtype)
        seen |= {kernel for kernel, _, _ in launches(host, "select_kept", floors)}
    for options in ragged.CASES.values():
        for dtype in op_cases.FLOAT_DTYPES:
            case = ragged.cast(ragged.make_case(**options), dtype)
            simulated.Device(host, residents=0).ragged_attention(**case, scaling=0.1)
    for dtype, dim in itertools.product(op_cases.FLOAT_DTYPES, (128, 256)):
        rows = torch.ones(9, dim, dtype=dtype)
        simulated.Device(host, residents=0).quantize_pairs(rows, rows, pairs="k8v4")
        if dtype != torch.float32:
            coded = make_rows("k4v4", dtype, True, True, dim=dim, stored=40)
            simulated.Device(host, residents=0).ragged_attention(**coded, scaling=0.1)
    for dtype in op_cases.FLOAT_DTYPES:  # the most lanes and queries
        case = ragged.cast(ragged.make_case(heads=1, group=8, dim=256), dtype)
        simulated.Device(host, residents=0).ragged_attention(**case, scaling=0.1)
    seen |= {kernel for kernel, _, _ in host.take_launches()}
    assert len(seen) >= 0.9 * len(host.kernel_names()), set(host.kernel_names()) - seen


@pytest.mark.parametrize(("name", "case"), MUCH_SHARED)
def test_much_shared_memory_is_asked_for(host: ModuleType, name: str, case: Any) -> None:
    assert max(shared for _, _, shared in launches(host, name, case)) > 48 * 1024


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        # A layer of eight heads: what a prompt of 2,560 tokens keeps, in one launch.
        (op_cases.SelectKept((1, 8, 2560), (8000,), 4, 64), ["group"]),
        (op_cases.SelectKept((24, 1, 20480), (8000,) * 24, 4, 64), ["group"]),
        (op_cases.SelectKept((300, 1, 20), (10,)), ["group"] * 2),
        (
            op_cases.SelectKept((1, 8, 2561), (8000,), 4, 64),
            ["begin", *["histogram"] * 3, "count", "write"],
        ),
        (
            op_cases.SelectKept((1, 8, 500), (2000,), 4, 64, 100),
            ["begin", *["histogram"] * 6, "count", "write"],
        ),
    ],
    ids=str,
)
def test_launches_of_a_selection(host: ModuleType, case: Any, kernels: list[str]) -> None:
    told = [
        re.search(r".*select_kept_(\w+?)_kernel", x)
        for x, _, _ in launches(host, "select_kept", case)
    ]
    assert [x and x[1] for x in told] == kernels


BUGS = {
    "no opt-in": (
        Edit("device.h", "if (shared_bytes > 48 * 1024) {", "if (shared_bytes > 96 * 1024) {"),
        *MUCH_SHARED[0],
        r"expected_attention_kernel<T> failed: expected at most the 49152 bytes of dynamic",
    ),
    "opt-in for another kernel": (
        Edit("device.h", "cudaFuncSetAttribute(kernel,", "cudaFuncSetAttribute((void*)check,"),
        *MUCH_SHARED[0],
        r"expected_attention_kernel<T> failed: no such kernel",
    ),
    "launch bounds of a quarter": (
        Edit("mix_scores.cu", "__launch_bounds__(kThreads)", "__launch_bounds__(kThreads / 4)"),
        "mix_scores",
        op_cases.MixScores((4, 1, 2, 50), 2),
        r"mix_scores_kernel failed: expected at most 64 threads, as the launch bounds say, got 256",
    ),
    "the default stream": (
        Edit("device.h", "static_cast<cudaStream_t>(stream)>>>", "cudaStream_t(nullptr)>>>"),
        "mix_scores",
        op_cases.MixScores((4, 1, 2, 50), 2),
        r"mix_scores_kernel failed: \w*mix_scores_kernel\w* is on another stream",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_seeded_bugs_are_reported(name: str) -> None:
    edit, op, case, report = BUGS[name]
    host = host_half.build([edit], edited=op)
    with pytest.raises(RuntimeError, match=re.compile(report)):
        launches(host, op, case)


def test_a_launch_that_fails_is_told(host: ModuleType) -> None:
    case = op_cases.MixScores((4, 1, 2, 50), 2)
    for status, message in [
        (1, r"moekv::cuda: mix_scores_kernel failed: as told$"),
        (209, r"mix_scores_kernel failed: no kernel image .*; `python -m moekv info` lists what"),
    ]:
        host.fail_next_launch(status)
        with pytest.raises(RuntimeError, match=message):
            launches(host, "mix_scores", case)
    assert launches(host, "mix_scores", case)  # nothing stays of it

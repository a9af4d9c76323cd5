"""The gates around the CUDA library: that they can fail, and on what."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import cuda_resources  # noqa: E402
from cuda_resources import ARCHITECTURES, PTX, Kernel  # noqa: E402


def kernels() -> cuda_resources.Kernels:
    """Kernels with nothing to complain about."""
    names = [
        "attention_rows_kernel<__nv_bfloat16, 4>",
        "kv_compact_kernel<uint4>",
        "lag_kernel<float>",
        "mix_scores_kernel",
    ]
    counts = {"wide_loads": 8, "in_flight": 4, "wide_stores": 2, "tensor_core": 8}
    counts |= {"loop": 200, "narrow_loads": 3}
    good = Kernel(registers=40, shared=512, **counts)
    return {name: {a: Kernel(**vars(good)) for a in ARCHITECTURES} for name in names}


RECORDED = {name: [40] * len(ARCHITECTURES) + [512, 8, 4, 2, 8, 200, 3] for name in kernels()}


def test_good_kernels_pass_and_the_table_holds_them() -> None:
    page = cuda_resources.table(kernels())
    assert cuda_resources.problems(kernels(), PTX) == []
    recorded = cuda_resources.recorded_resources(page)
    assert recorded == RECORDED
    assert cuda_resources.changes(kernels(), recorded) == []


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("mix_scores_kernel", "stack", 16, "expected no local memory, got 16 bytes"),
        ("mix_scores_kernel", "local", 3, "expected no local memory, got 0 bytes and 3 accesses"),
        ("mix_scores_kernel", "generic", 2, "got 2 that do not"),
        ("kv_compact_kernel<uint4>", "wide_loads", 0, "expected loads of 16 bytes"),
        ("lag_kernel<float>", "in_flight", 3, "expected 4 loads of 16 bytes in flight, got 3"),
        ("kv_compact_kernel<uint4>", "wide_stores", 0, "expected stores of 16 bytes"),
        ("attention_rows_kernel<__nv_bfloat16, 4>", "tensor_core", 0, "tensor core"),
        ("attention_rows_kernel<__nv_bfloat16, 4>", "diverged", 5, "got 5 where threads may have"),
    ],
)
def test_bad_kernels_are_told(name: str, field: str, value: int, message: str) -> None:
    changed = kernels()
    setattr(changed[name]["100"], field, value)
    (problem,) = cuda_resources.problems(changed, PTX)
    assert problem.startswith(f"{name} on sm_100: ") and message in problem


def test_loads_in_flight() -> None:
    lines = """
        S2R R0, SR_TID.X
        LDG.E.128 R4, desc[UR4][R2.64]
        LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10]
        LDG.E R20, desc[UR4][R2.64+0x20]
        FADD R21, R0, 1
        FFMA R16, R6, R0, R0
        LDG.E.128 R12, desc[UR4][R2.64]
        LDG.E.128 R8, desc[UR4][R2.64]
    """.strip().splitlines()
    flight = cuda_resources.Flight()
    seen = [flight.meet(*line.split(maxsplit=1), number) for number, line in enumerate(lines)]
    # The sixth asks for a register of the first load; the last overwrites the second's.
    assert seen == [0, 1, 2, 2, 2, 1, 2, 2]


def test_loops_and_warps_that_are_whole() -> None:
    """Of a loop in a loop, and tensor core instructions between where threads part and meet."""
    lines = """
        LDG.E.128 R4, desc[UR4][R2.64]
        BSSY B0, 0x60
        @P0 BRA 0x50
        HMMA.16816.F32 R4, R4, R8, RZ
        FADD R21, R0, 1
        BSYNC B0
        HMMA.16816.F32 R4, R4, R8, RZ
        LDG.E.128 R4, desc[UR4][R2.64]
        @P0 HMMA.16816.F32 R4, R4, R8, RZ
        @P1 BRA 0x60
        @P2 BRA 0x10
        BRA 0xb0
    """.strip().splitlines()
    code = []
    for number, line in enumerate(lines):
        match = cuda_resources.INSTRUCTION.match(f"  /*{16 * number:04x}*/  {line.strip()} ;")
        assert match
        code.append(cuda_resources.read_instruction(match))
    assert [x.target for x in code if x.name == "BRA"] == [0x50, 0x60, 0x10, 0xB0]
    assert cuda_resources.loop_of(code) == 4
    assert cuda_resources.loop_of(code[:7]) == 0
    assert cuda_resources.diverged_of(code) == 2


def test_missing_ptx_is_told() -> None:
    assert cuda_resources.problems(kernels(), {"80"}) == ["expected PTX of sm_120, got none"]


def test_missing_architectures_and_kernels_are_told() -> None:
    changed = kernels()
    del changed["mix_scores_kernel"]["90"]
    assert cuda_resources.problems(changed, PTX) == ["mix_scores_kernel: not compiled for sm_90"]
    assert any("no kernel matches" in x for x in cuda_resources.problems({}, PTX))


def test_changes_against_the_record_are_told() -> None:
    changed = kernels()
    changed["mix_scores_kernel"]["86"].registers += cuda_resources.REGISTER_SLACK
    assert cuda_resources.changes(changed, RECORDED) == []
    changed["mix_scores_kernel"]["86"].registers += 1
    (more,) = cuda_resources.changes(changed, RECORDED)
    assert more == "mix_scores_kernel on sm_86: expected 40 registers as recorded, got 49"
    changed = kernels()
    changed["mix_scores_kernel"]["80"].shared += 4
    (more,) = cuda_resources.changes(changed, RECORDED)
    assert more == "mix_scores_kernel: expected 512 bytes of shared memory as recorded, got 516"
    changed["new_kernel"] = changed.pop("mix_scores_kernel")
    assert cuda_resources.changes(changed, RECORDED) == [
        "mix_scores_kernel: in the table alone",
        "new_kernel: not in the table",
    ]


@pytest.mark.parametrize(
    ("field", "what"),
    [
        ("wide_loads", "8 loads of 16 bytes"),
        ("in_flight", "4 loads in flight"),
        ("wide_stores", "2 stores of 16 bytes"),
        ("tensor_core", "8 tensor core instructions"),
    ],
)
def test_fewer_instructions_than_recorded_are_told(field: str, what: str) -> None:
    changed = kernels()
    setattr(changed["mix_scores_kernel"]["90"], field, 1)
    expected = f"mix_scores_kernel: expected {what} as recorded, got 1"
    assert cuda_resources.changes(changed, RECORDED) == [expected]
    setattr(changed["mix_scores_kernel"]["90"], field, 9)
    assert cuda_resources.changes(changed, RECORDED) == []


def test_the_committed_table_lists_every_kernel() -> None:
    recorded = cuda_resources.recorded_resources(cuda_resources.TABLE.read_text())
    in_sources = set()
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
        words = path.read_text().replace("(", " ").split()
        in_sources |= {word for word in words if word.endswith("_kernel")}
    assert {name.split("<")[0] for name in recorded} == in_sources


CPU_ONLY = ("fold_pairs",)  # so far


def test_every_op_is_in_the_checks_that_run_elsewhere() -> None:
    registered = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/registration.cpp").read_text())
    assert len(registered) == len(set(registered)) > 5
    registered = [op for op in registered if op not in CPU_ONLY]
    assert not any((ROOT / f"csrc/cuda/{op}.cu").exists() for op in CPU_ONLY)
    for tool in ("cuda_link_check.py", "gpu_check/timing.py"):
        text = (ROOT / "tools" / tool).read_text()
        assert [op for op in registered if f".{op}(" not in text] == [], tool


def test_launchers_neither_allocate_nor_wait() -> None:
    """All that is asked of the CUDA runtime, and device.h alone asks."""
    called = {}
    for path in (ROOT / "csrc").rglob("*.*"):
        called[path.name] = set(re.findall(r"\b(cuda[A-Z]\w*)\(", path.read_text()))
    assert called.pop("device.h") == {
        "cudaDeviceGetAttribute",
        "cudaFuncSetAttribute",
        "cudaGetDevice",
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaMemsetAsync",
    }
    assert not set().union(*called.values())


@pytest.mark.parametrize(
    ("field", "most", "what"),
    [("loop", 220, "200 instructions in the loop"), ("narrow_loads", 3, "3 loads of 16 bits")],
)
def test_more_instructions_than_recorded_are_told(field: str, most: int, what: str) -> None:
    changed = kernels()
    setattr(changed["mix_scores_kernel"]["90"], field, most)
    assert cuda_resources.changes(changed, RECORDED) == []
    setattr(changed["mix_scores_kernel"]["90"], field, most + 1)
    expected = f"mix_scores_kernel: expected {what} as recorded, got {most + 1}"
    assert cuda_resources.changes(changed, RECORDED) == [expected]

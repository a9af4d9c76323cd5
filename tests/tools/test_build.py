"""What the built CPU library exports, and that no processor meets instructions it does not have."""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import moekv

PACKAGE = Path(moekv.__file__).parent
LIBRARY = PACKAGE / "lib" / "libmoekv_cpu.so"
ISAS = ("default", "avx2", "avx512", "amx")  # each runs the code of those before it

FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>[^>]+)>:$")
REGISTER_OF = {
    "avx2": re.compile(r"%ymm\d|\tv\w+ .*%xmm\d"),
    "avx512": re.compile(r"%zmm\d|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b"),
    "amx": re.compile(r"%tmm\d"),
}


def output_of(program: str, *arguments: str | Path) -> str:
    if shutil.which(program) is None:
        pytest.skip(f"{program} (binutils) is not installed")
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return result.stdout


def x86_symbols() -> str:
    """Names in the library's symbol table; skips where they or x86 are missing."""
    if not re.search(r"x86-64", output_of("objdump", "-f", LIBRARY)):
        pytest.skip("one instruction set on this architecture")
    names = output_of("nm", LIBRARY)
    if "isa_default" not in names:
        pytest.skip("the library has been stripped of its symbol table")
    return names


def instruction_sets(disassembly: str) -> dict[str, set[str]]:
    """Find which instruction sets beyond the baseline each function uses."""
    used = defaultdict(set)
    name = ""
    for line in disassembly.splitlines():
        if match := FUNCTION.match(line):
            name = match["name"]
            continue
        for isa, register in REGISTER_OF.items():
            if register.search(line):
                used[name].add(isa)
    return used


def highest_isa(name: str) -> int:
    """Rank of the instruction set that a function may use, by the namespaces in its name."""
    ranks = [rank for rank, isa in enumerate(ISAS) if f"isa_{isa}" in name]
    # What is in an unnamed namespace alone is compiled for each instruction set, and never merged.
    return max(ranks, default=len(ISAS) if "_GLOBAL__N_1" in name else 0)


def test_instruction_sets_stay_apart():
    """Only functions of a kernel's own namespace use its instruction set.

    An inline function that several instruction sets share would be compiled for each of them, and
    the linker would keep any one.
    """
    x86_symbols()
    used = instruction_sets(output_of("objdump", "-d", "--no-show-raw-insn", LIBRARY))
    leaked = {
        name: isas
        for name, isas in used.items()
        if any(ISAS.index(isa) > highest_isa(name) for isa in isas)
    }
    assert not leaked
    # The kernels do use what they are compiled for.
    for rank, isa in enumerate(ISAS[1:], start=1):
        assert any(isa in isas and highest_isa(name) == rank for name, isas in used.items()), isa


def test_instruction_sets_are_recognised():
    disassembly = """
0000000000001000 <_ZN5moekv3cpu8isa_avx26kernelEv>:
    1000:\tvaddps %ymm0,%ymm1,%ymm2
0000000000001010 <_ZSt3maxIfE>:
    1010:\tvmaxss %xmm0,%xmm1,%xmm2
0000000000001020 <_ZN5moekv3cpu11isa_default6kernelEv>:
    1020:\taddps  %xmm0,%xmm1
0000000000001030 <_ZSt3minIfE>:
    1030:\tkmovw  %eax,%k1
"""
    assert instruction_sets(disassembly) == {
        "_ZN5moekv3cpu8isa_avx26kernelEv": {"avx2"},
        "_ZSt3maxIfE": {"avx2"},
        "_ZSt3minIfE": {"avx512"},
    }


def test_kernels_share_no_code():
    """The objects of the instruction sets define their table of kernels and nothing else."""
    objects = {
        isa: path
        for isa in ISAS
        for path in sorted(
            PACKAGE.parent.glob(f"build/**/moekv_cpu_{isa}.dir/csrc/cpu/isa.cpp.o"),
            key=lambda path: path.stat().st_mtime,
        )
        if "sanitized" not in path.parts  # has the sanitizer's symbols beside
    }
    if not objects:
        pytest.skip("no build tree beside the package")
    for isa, path in objects.items():
        symbols = [line.split()[:2] for line in output_of("nm", "-P", path).splitlines()]
        # Lower case: local. U: defined elsewhere. DW.ref: how exceptions are told apart.
        visible = {
            name
            for name, kind in symbols
            if (kind.isupper() or kind in "uvw") and kind != "U" and not name.startswith("DW.ref.")
        }
        isa_namespace = f"isa_{isa}"
        assert visible == {f"_ZN5moekv3cpu{len(isa_namespace)}{isa_namespace}7kernelsE"}, path


def test_exports():
    exported = output_of("nm", "-D", "--defined-only", LIBRARY).splitlines()
    assert [line.split()[-1] for line in exported] == ["moekv_cpu_capability"]


def capability(wanted: str | None = None) -> str:
    """Ask the library itself, in a process of its own: it reads the environment once."""
    code = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
function = ctypes.CDLL(sys.argv[2]).moekv_cpu_capability
function.restype = ctypes.c_char_p
name = function()
print(name.decode() if name else "unknown")
"""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    environment = {k: v for k, v in os.environ.items() if k != "MOEKV_CPU_CAPABILITY"}
    if wanted is not None:
        environment["MOEKV_CPU_CAPABILITY"] = wanted
    command = [sys.executable, "-c", code, torch_library, LIBRARY]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_capability_is_lowered_and_never_raised():
    best = capability()
    assert best in ISAS
    for wanted in ISAS:
        assert capability(wanted) == ISAS[min(ISAS.index(wanted), ISAS.index(best))]
    assert capability("AVX2") == "unknown"


def test_ops_refuse_an_unknown_capability():
    code = f"""
import torch
torch.ops.load_library({str(LIBRARY)!r})
torch.ops.moekv.gating_topk(torch.zeros(1, 2), None, None, k=1)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MOEKV_CPU_CAPABILITY": "sse9"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "RuntimeError: moekv: expected MOEKV_CPU_CAPABILITY to be" in result.stderr
    assert "got 'sse9'" in result.stderr

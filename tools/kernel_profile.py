"""Where the time of a CPU kernel goes, function by function, as ``perf`` samples it.

    python tools/kernel_profile.py "gating_topk, 128 experts"
    python tools/kernel_profile.py "expert_scores, all kinds" --tokens 8192 --isa avx2

The workloads are those of ``make bench-cpp``. Everything is inlined into one function per kernel;
so a sample counts for the innermost function of ``csrc/cpu`` that its instruction was written in,
the vectors of ``vec.h`` aside. Needs Linux's perf, binutils and libbenchmark-dev; builds the target
``moekv_bench`` with line numbers in ``build/profile``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "profile"
PRIMITIVES = {"vec.h", "parallel.h"}
"""What the kernels are written in: these count for whoever uses them."""


def run(*command: str | Path, **options: Any) -> str:
    """Give the output of a command, or end with its errors."""
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if ran.returncode != 0:
        sys.exit(f"kernel_profile: {command[0]} failed\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def build() -> Path:
    """Build the benchmark of the kernels with line numbers."""
    options = (
        *("-DMOEKV_CUDA=OFF", "-DMOEKV_BENCH=ON", "-DCMAKE_CXX_FLAGS=-g"),
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    fixed = "-DCMAKE_EXE_LINKER_FLAGS=-no-pie"  # instructions run where the file has them
    # Python's own cmake and ninja come first.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    cmake = shutil.which("cmake", path=path) or "cmake"
    run(cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options, fixed, env=environment)
    run(cmake, "--build", BUILD, "--target", "moekv_bench", env=environment)
    return BUILD / "benchmarks" / "cpp" / "moekv_bench"


def sample(binary: Path, workload: str) -> Counter[int]:
    """Count the samples of each instruction of the kernels."""
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/perf.data"
        record = ("perf", "record", "-e", "cpu-clock", "-F", "4000", "-o", data, "--")
        run(*record, binary, f"--benchmark_filter=^{workload}$", "--benchmark_min_time=2")
        script = run("perf", "script", "-i", data, "-F", "ip,sym")
    samples = (line.split(maxsplit=1) for line in script.splitlines())
    return Counter(int(ip, 16) for ip, symbol in samples if "moekv::cpu::isa_" in symbol)


def functions(binary: Path, addresses: Sequence[int]) -> list[str]:
    """Name the function that each instruction was written in."""
    lines = run(
        *("addr2line", "-e", binary, "-f", "-i", "-a", "-C"),
        input="\n".join(map(hex, addresses)),
    ).splitlines()
    frames: list[list[str]] = []
    for line in lines:
        if re.fullmatch(r"0x[0-9a-f]+", line):
            frames.append([])
        else:
            frames[-1].append(line)
    return [owner(list(zip(chain[::2], chain[1::2], strict=True))) for chain in frames]


def owner(chain: Sequence[tuple[str, str]]) -> str:
    """Pick a function out of those that were inlined into each other, innermost first."""
    for function, place in chain:
        path = Path(place.rpartition(":")[0])
        if path.parent == ROOT / "csrc" / "cpu" and path.name not in PRIMITIVES:
            return f"{path.name}: {bare(function)}"
    return "elsewhere"


def bare(function: str) -> str:
    """Name a function without its namespace, its template's arguments and its parameters."""
    function = function.replace("(anonymous namespace)::", "").removeprefix("void ")
    while (shorter := re.sub(r"<[^<>]*>|\([^()]*\)|\{lambda.*", "", function)) != function:
        function = shorter
    name = re.sub(r"( const| \[clone.*)", "", function).rpartition("::")[2].strip()
    return name if name.removeprefix("operator") else "a lambda"


def main() -> None:
    """Profile one kernel."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kernel", help='as make bench-cpp names it, e.g. "select_kept, per head"')
    parser.add_argument("--tokens", type=int, default=32768, help="8192, 32768 or 131072")
    parser.add_argument("--isa", default="amx")
    args = parser.parse_args()
    binary = build()
    samples = sample(binary, f"{args.kernel}/{args.isa}/{args.tokens}")
    if not samples:
        sys.exit("kernel_profile: no such benchmark; moekv_bench --benchmark_list_tests lists them")
    shares: Counter[str] = Counter()
    for name, count in zip(functions(binary, list(samples)), samples.values(), strict=True):
        shares[name] += count
    for name, count in shares.most_common():
        if count >= 0.005 * samples.total():
            print(f"{count / samples.total():6.1%}  {name}")


if __name__ == "__main__":
    main()

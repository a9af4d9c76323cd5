"""How many instructions each CPU kernel executes, kept in ``benchmarks/cpp/instructions.json``.

Counts are exact where times are not: the same on a busy machine and on an idle one. They come from
valgrind's callgrind, which knows no AVX-512: so ``default`` and ``avx2`` are counted::

    python tools/instruction_counts.py            # records them
    python tools/instruction_counts.py --check    # compares with what is recorded

Builds the target ``moekv_count`` in ``build/bench``. Another compiler or C library makes other code
of the same sources: then the comparison is skipped, loudly, as it is without valgrind.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
RECORD = ROOT / "benchmarks" / "cpp" / "instructions.json"
ISAS = ("default", "avx2")
TOLERANCE = 0.02

Counts = dict[str, dict[str, int]]  # by instruction set, then kernel


def build_counter() -> Path:
    """Build the driver."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        sys.exit("instruction_counts: expected cmake; run `make install` first")
    for command in (
        [
            *(cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
            *("-DMOEKV_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"),
        ],
        [cmake, "--build", str(BUILD), "--target", "moekv_count"],
    ):
        ran = subprocess.run(
            command, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        if ran.returncode != 0:
            sys.exit(f"instruction_counts: the build failed\n{ran.stdout}{ran.stderr}")
    return BUILD / "benchmarks" / "cpp" / "moekv_count"


def count(counter: Path, isa: str) -> tuple[str, dict[str, int]]:
    """Return what compiled the kernels, and how many instructions each of them executes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--tool=callgrind", "--collect-atstart=no"),
            *("--toggle-collect=moekv_counted", "--dump-after=moekv_counted"),
            *(f"--callgrind-out-file={folder}/counts", str(counter), isa),
        ]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode != 0:
            sys.exit(f"instruction_counts: {isa}: {ran.stdout}{ran.stderr}")
        compiler, *names = ran.stdout.splitlines()
        numbers = [read_total(Path(f"{folder}/counts.{i + 1}")) for i in range(len(names))]
    return compiler, dict(zip(names, numbers, strict=True))


def read_total(dump: Path) -> int:
    """Return the instructions of one dump of callgrind."""
    total = re.search(r"^totals: (\d+)$", dump.read_text(), re.MULTILINE)
    assert total is not None
    return int(total[1])


def differences(counted: Counts, recorded: Counts) -> list[str]:
    """Say where counts are not as recorded, within the tolerance."""
    found = []
    for isa in sorted(counted.keys() | recorded.keys()):
        now, then = counted.get(isa, {}), recorded.get(isa, {})
        for name in sorted(now.keys() | then.keys()):
            if name not in now:
                found.append(f"{isa}: {name}: recorded, but not counted")
            elif name not in then:
                found.append(f"{isa}: {name}: counted, but not recorded")
            elif abs(now[name] - then[name]) > TOLERANCE * then[name]:
                change = now[name] / then[name] - 1
                found.append(
                    f"{isa}: {name}: {then[name]:,} recorded, {now[name]:,} now ({change:+.1%})"
                )
    return found


def skip_reason(compiler: str, record: dict[str, Any]) -> str | None:
    """Say why counts cannot be compared with the recorded ones; None where they can."""
    if compiler == record["compiler"]:
        return None
    return f"recorded with {record['compiler']}, this build is of {compiler}"


def main() -> None:
    """Record the counts, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with what is recorded")
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        if not args.check:
            sys.exit("instruction_counts: expected valgrind; Debian has a package of that name")
        return print("instruction_counts: SKIPPED, NOTHING WAS COMPARED: there is no valgrind")
    counter = build_counter()
    counted: Counts = {}
    for isa in ISAS:
        compiler, counted[isa] = count(counter, isa)
        if args.check and (reason := skip_reason(compiler, json.loads(RECORD.read_text()))):
            return print(f"instruction_counts: SKIPPED, NOTHING WAS COMPARED: {reason}")
    if not args.check:
        record = {"compiler": compiler, "instructions": counted}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        return print(f"instruction_counts: recorded in {RECORD.relative_to(ROOT)}")
    if found := differences(counted, json.loads(RECORD.read_text())["instructions"]):
        sys.exit(
            "instruction_counts: kernels execute other numbers of instructions than recorded "
            f"(tolerance {TOLERANCE:.0%}):\n  "
            + "\n  ".join(found)
            + "\nIf that is meant, `make instructions` records them anew."
        )
    kernels = sum(map(len, counted.values()))
    print(f"instruction_counts: {kernels} counts within {TOLERANCE:.0%} of those recorded")


if __name__ == "__main__":
    main()

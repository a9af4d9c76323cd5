"""Seconds of a core for each file of the build: ``python -m gpu_check.seconds`` records them.

Without a GPU, one file after the other, for sm_90. The step ``build`` says what they come to on the
cores of the machine, beside what its own files took.
"""

from __future__ import annotations

import heapq
import json
import resource
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

RECORD = Path(__file__).with_name("seconds.json")


def read() -> dict[str, float]:
    """Return the record: seconds of each object file and library, by name."""
    recorded: dict[str, float] = json.loads(RECORD.read_text())
    return recorded


def expected(seconds: Mapping[str, float], cores: int) -> float:
    """Return what a build takes: objects, the longest first, then the libraries side by side."""
    busy = [0.0] * cores
    for took in sorted((s for x, s in seconds.items() if x.endswith(".o")), reverse=True):
        heapq.heapreplace(busy, busy[0] + took)
    return max(busy) + max(s for x, s in seconds.items() if not x.endswith(".o"))


def measure(folder: Path) -> dict[str, float]:
    """Build in a folder, and measure each command."""
    from gpu_check import build  # which reads the record

    build.configure(folder, "90", f"-DMOEKV_OUTPUT_DIR={folder}")
    told = subprocess.run(
        ["ninja", "-C", str(folder), "-t", "commands"], capture_output=True, text=True, check=True
    )
    seconds = {}
    for command in told.stdout.splitlines():
        before = _used()
        subprocess.run(command, shell=True, cwd=folder, check=True)
        words = shlex.split(command)
        if "-o" in words:
            made = words[words.index("-o") + 1].removeprefix(f"{folder}/")
            name = made.removeprefix("CMakeFiles/") if made.endswith(".o") else Path(made).name
            seconds[name] = round(_used() - before, 1)
    return seconds


def _used() -> float:
    """Return the processor's seconds of all children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder))
    RECORD.write_text(json.dumps(dict(sorted(seconds.items())), indent=2) + "\n")

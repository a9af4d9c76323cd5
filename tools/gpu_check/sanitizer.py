"""Step e: compute-sanitizer's tools over the smoke test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_check import machine
from gpu_check.report import OK
from gpu_check.worker import Skip

if TYPE_CHECKING:
    from gpu_check.worker import Items, Place

ON_GPU = False  # the processes below are
OF_MOEKV = ("--kernel-name", "kernel_substring=moekv")
TOOLS = {
    # Every tensor in an allocation of its own: bounds are those of tensors.
    "memcheck": (*OF_MOEKV, "--padding", "32"),
    "racecheck": OF_MOEKV,
    "synccheck": OF_MOEKV,
    # Of all kernels: torch's write what moekv's read.
    "initcheck": (),
}


def items(place: Place) -> Items:
    """Return a run of each tool."""
    return {tool: partial(_run, place, tool) for tool in TOOLS}


def _run(place: Place, tool: str) -> None:
    program = machine.find_program("compute-sanitizer")
    if program is None:
        raise Skip("no compute-sanitizer in the PATH")
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        done = subprocess.run(
            [
                *(program, "--tool", tool, *TOOLS[tool]),
                *(sys.executable, "-m", "gpu_check.worker", "gpu_check.smoke"),
                *("--lines", str(lines), "--results", str(place.results)),
                *("--device", place.device),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        print(done.stdout, flush=True)
        events = [json.loads(x) for x in lines.read_text().splitlines()] if lines.exists() else []
    # Both kinds of summary begin with a number: of errors, or of hazards.
    found = re.search(r"SUMMARY: (\d+)", done.stdout)
    bad = [x["item"] for x in events if x["event"] == "end" and x["status"] != OK]
    finished = any(x["event"] == "done" for x in events)
    if found is None or found[1] != "0" or bad or not finished:
        raise AssertionError(
            f"summary {found and found[0]!r}, failed {bad}, finished: {finished}; "
            f"{done.stdout[-1200:].strip()}"
        )

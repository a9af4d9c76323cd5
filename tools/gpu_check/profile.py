"""Step f: ncu on the ops that are furthest from what the device could do.

As a script, runs one op once, for ncu to look at: ``python -m gpu_check.profile OP TOKENS``.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu_check import machine, timing
from gpu_check.worker import Skip

if TYPE_CHECKING:
    from gpu_check.worker import Items, Place

ON_GPU = False  # the processes below are
COUNT = 3
# Of the slowest kernel of an op. Whole reports lie beside ours, for ncu-ui.
METRICS = {
    "gpu__time_duration.sum": "µs",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
}
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
# What only a profile can decide, op by op; it stands beside each report.
QUESTIONS = {
    "gating_topk": "do bank conflicts of the experts' counts show beside the launch?",
    "expert_scores": "do the keys stay in the L2 cache between the passes beyond 16k tokens? If "
    "not: sums of directions from the tiles of attention_rows, 90 µs for 30",
    "expected_attention": "stalls for loads (long scoreboard) or for exponentials (MUFU)?",
    "project_tokens": "does the third read of the hidden states come from the L2 cache?",
    "mix_scores": "what of an expert's sectors is read in vain where neighbours choose unlike?",
    "select_kept": "do all reads but the first come from the L2 cache? Do last blocks keep others? "
    "Is one block with 20,480 pairs faster than six launches with some more?",
    "kv_compact_": "how long do blocks wait for items before their own (volatile loads)?",
    "ragged_attention": "issue or DRAM? From how many queries on do tensor cores pay? Is the last "
    "wave of blocks short: 512 of them, or a multiple of those that fit?",
    "ragged_attention, k": "does making numbers of codes cost most (PRMT and FFMA beside HMMA)? "
    "Then rows are to be split over warps for few queries",
    "quantize_pairs": "do accesses of one element per lane reach the DRAM's rate?",
}
# Without a timing: what reading the machine code found furthest away.
EXPECTED = ("ragged_attention", "expert_scores DIVERSITY", "project_tokens")


def items(place: Place) -> Items:
    """Return a profile of each op."""
    sizes = importlib.import_module(place.device).Gpu(place.results).sizes
    tokens = sizes.layer_tokens[len(sizes.layer_tokens) // 2]
    chosen = _slowest(place.results, tokens)
    return {f"{name} {tokens}": partial(_profile, place, name, tokens) for name in chosen}


def _slowest(results: Path, tokens: int) -> list[str]:
    """Return the ops that reach the least of the roofline, if step b has told."""
    steps = json.loads(results.read_text())["steps"] if results.exists() else {}
    lines = {x["item"]: x["data"] for x in steps.get("b", {"lines": []})["lines"] if x["data"]}
    shares = {
        name: int(lines[f"{name} {tokens}"]["of the roofline"].rstrip("%"))
        for name in timing.OPS
        if f"{name} {tokens}" in lines
    }
    return sorted(shares, key=shares.__getitem__)[:COUNT] or list(EXPECTED)


def _profile(place: Place, name: str, tokens: int) -> dict[str, Any]:
    program = machine.find_program("ncu")
    if program is None:
        raise Skip("no ncu in the PATH")
    report = place.results.parent / f"{name.replace(' ', '_').replace(',', '')}-{tokens}.ncu-rep"
    told = _run(
        *(program, "--set", "full", "--profile-from-start", "off", "-f", "-o", str(report)),
        *("--kernel-name-base", "mangled", "--kernel-name", "regex:moekv"),
        *(sys.executable, "-m", "gpu_check.profile", name, str(tokens)),
        *("--device", place.device, "--results", str(place.results)),
    )
    if "ERR_NVGPUCTRPERM" in told:
        raise Skip("this user may not read the GPU's counters (ERR_NVGPUCTRPERM)")
    if not report.exists():
        raise RuntimeError(f"ncu wrote no report: {told[-1500:].strip()}")
    metrics = ",".join(METRICS)
    raw = _run(program, "--import", str(report), "--csv", "--page", "raw", "--metrics", metrics)
    return {**_of_slowest_kernel(raw), "report": report.name, "to decide": question(name)}


def question(name: str) -> str:
    """Return what a profile of an op is to decide."""
    return QUESTIONS[max(filter(name.startswith, QUESTIONS), key=len)]


def _run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    return done.stdout


def _of_slowest_kernel(raw: str) -> dict[str, Any]:
    """Read ncu's table: a header, a line of units, and one for each kernel."""
    lines = [x for x in raw.splitlines() if x.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if len(rows) < 2:
        raise RuntimeError(f"expected a table of kernels from ncu, got {raw[-500:]!r}")
    units, kernels = rows[0], rows[1:]
    time, *_ = METRICS
    slowest = max(kernels, key=lambda row: _number(row[time]))
    told: dict[str, Any] = {"kernel": slowest["Kernel Name"].split("(")[0][:60]}
    for metric, column in METRICS.items():
        if slowest.get(metric):
            told[column] = _number(slowest[metric])
    told["µs"] *= MICROSECONDS.get(units[time], 1.0)
    return told


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def main() -> None:
    """Run one op; what comes before is not to be profiled."""
    parser = argparse.ArgumentParser()
    parser.add_argument("op", choices=timing.OPS)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--device", default="gpu_check.gpu")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    gpu = importlib.import_module(arguments.device).Gpu(arguments.results)
    with gpu.active():
        op = timing.make_ops(gpu, arguments.tokens)[arguments.op]
        op.before()
        gpu.profiled(lambda: op.run(torch.ops.moekv))


if __name__ == "__main__":
    main()

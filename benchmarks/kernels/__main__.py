"""Time the ops against torch, torch.compile, kvpress and a plain copy, in turn.

    python -m benchmarks.kernels                          # everything: hours
    python -m benchmarks.kernels --quick                  # minutes
    python -m benchmarks.kernels --ops kv_compact_ --shapes Llama-3.1-8B --lengths 8192 --threads 1

Writes JSON to benchmarks/results/, from which `python -m benchmarks.report` renders the tables and
plots of docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.measure import RESULTS, Times, interleave, peak_extra_bytes, timed, write_results

from .cases import COMPILED, COPY, MOEKV, NUM_EXPERTS, OPS, SHAPES, Case, cases

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (1024, 4096, 8192, 32768, 131072)
GATE = "gating_topk"


def compiled(
    functions: dict[str, Callable[..., Any]], threads: int
) -> dict[str, Callable[..., Any]]:
    """Put functions under torch.compile, each for these shapes alone."""
    torch._dynamo.reset()
    torch._inductor.config.cpp.threads = threads  # else those of the first compilation would stay
    return {
        f"{COMPILED}{name}": torch.compile(function, dynamic=False)
        for name, function in functions.items()
    }


def measure(
    case: Case, *, seconds: float, patience: float, with_compiled: bool, threads: int
) -> list[dict[str, Any]]:
    """Check a case, then time all its contenders: one row each.

    Another contender whose one call takes more than `patience` seconds of processor time is not
    called again.
    """
    case.check()
    contenders = dict(case.contenders)
    if with_compiled:
        contenders |= compiled(case.compiled, threads)
    rows, quick, peaks = {}, {}, {}
    for name, function in contenders.items():
        try:
            if name.startswith(COMPILED):
                function()
            once = Times()
            peaks[name] = peak_extra_bytes(partial(timed, function, once))
            if once.cpu[0] > patience and name not in (MOEKV, COPY):
                rows[name] = once.summary() | {"peak_bytes": peaks[name]}
                continue
            quick[name] = function
        except Exception as error:  # what does not compile, or is too large
            rows[name] = {
                "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            }
    for name, times in interleave(quick, seconds=seconds).items():
        rows[name] = times.summary() | {"peak_bytes": peaks[name]}
    return [{"contender": name, "moved": case.moved} | rows[name] for name in contenders]


def show(title: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print one case's table."""
    table = Table(title=title, title_justify="left")
    for column in ("contender", "ms", "IQR", "CPU ms", "x moekv", "GB/s", "of copy", "extra MiB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    medians = {row["contender"]: row["wall_s"][1] for row in rows if "wall_s" in row}
    for row in rows:
        if "error" in row:
            table.add_row(row["contender"], row["error"][:60])
            continue
        first, median, third = row["wall_s"]
        table.add_row(
            row["contender"],
            f"{1e3 * median:.3f}",
            f"{1e3 * (third - first):.3f}",
            f"{1e3 * row['cpu_s'][1]:.3f}",
            f"{median / medians[MOEKV]:.2f}",
            f"{row['moved'] / median / 1e9:.2f}",
            f"{medians[COPY] / median:.2f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--ops", nargs="+", choices=[GATE, *OPS], default=[GATE, *OPS])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--experts", type=int, nargs="+", default=list(NUM_EXPERTS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender of a case")
    parser.add_argument(
        "--patience", type=float, default=5.0, help="seconds; slower calls are made only once"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="also under torch.compile (slow)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one shape, two lengths, bf16, 2 threads"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json")
    args = parser.parse_args(arguments)
    if args.quick:
        args.shapes, args.experts, args.lengths = ["Llama-3.1-8B"], [8, 128], [8192, 32768]
        args.dtypes, args.threads = ["bf16"], [2]
        args.seconds, args.patience = min(args.seconds, 0.1), min(args.patience, 0.3)
    todo = [
        (op, shape, length, dtype, threads)
        for op in args.ops
        for shape in ([f"{n} experts" for n in args.experts] if op == GATE else args.shapes)
        for length in args.lengths
        for dtype in args.dtypes
        for threads in args.threads
    ]
    console, rows = Console(width=None if sys.stdout.isatty() else 140), []
    given = sys.argv[1:] if arguments is None else arguments
    command = f"python -m benchmarks.kernels {shlex.join(given)}".strip()
    begin = time.perf_counter()
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(todo))
        for op, shape, length, dtype, threads in todo:
            title = f"{op}, {shape}, {length:,} tokens, {dtype}, {threads} thread(s)"
            progress.update(bar, description=title)
            torch.set_num_threads(threads)
            for case in cases(op, shape, length, DTYPES[dtype]):
                measured = measure(
                    case,
                    seconds=args.seconds,
                    patience=args.patience,
                    with_compiled=op == GATE if args.compile is None else args.compile,
                    threads=threads,
                )
                show(f"{title}: {case.variant}", measured, console)
                common = {
                    "op": op,
                    "variant": case.variant,
                    "shape": case.shape,
                    "length": length,
                    "dtype": dtype,
                    "threads": threads,
                }
                rows += [common | row for row in measured]
                write_results(args.out, command, rows)
            gc.collect()
            progress.advance(bar)
    console.print(f"written to {args.out} in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()

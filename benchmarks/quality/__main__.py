"""The quality benchmark: `moekv bench run` and `moekv bench report`, in a source tree."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.measure import environment
from moekv.models.index import DEFAULT_MODEL
from moekv.models.loading import load_model

from .leaderboard import write_leaderboard
from .presses import (
    ANCHORS,
    ASKED,
    BUDGETS,
    CALIBRATED_LISTS,
    DEFAULT,
    EXPERTS,
    FOLDED,
    IN_LISTS,
    KNOBS,
    LENT,
    LENT_FOLDED,
    MEMBERS,
    MERITS,
    METHODS,
    OURS,
    PEERS,
    QUANTISED,
    ROUTED,
    STRONG,
    WRAPPED,
    add_routers,
)
from .report import write_report
from .ruler import LEAST_LENGTH, RULER, make_ruler
from .run import Cell, cells, forget, from_seed, read_results, run
from .suites import SUITES, load_suite
from .tasks import TASKS, Sample, make_sample

MADE = "ruler-made"
"""What results of RULER's tasks are called where their samples are made here."""

SETS = {
    "peers": PEERS,
    "asked": ASKED,
    "anchors": ANCHORS,
    "ours": OURS,
    "default": DEFAULT,
    "quantised": QUANTISED,
    "folded": FOLDED,
    "strong": STRONG,
    "lent": LENT,
    "lent-folded": LENT_FOLDED,
    "experts": EXPERTS,
    "budgets": BUDGETS,
    "knobs": KNOBS,
    "wrapped": WRAPPED,
    "routers": ROUTED,
    "merits": MERITS,
    "lists": IN_LISTS | CALIBRATED_LISTS,
    "members": MEMBERS,
    "all": METHODS,
}


class Parser(argparse.ArgumentParser):
    """Explains mistakes in one line, as moekv's other commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="moekv bench",
        description=__doc__,
        epilog="Example: moekv bench run --tasks facts --ratios 0.75 --samples 1 --methods moekv "
        "--out facts",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="answer what the results file lacks, then report")
    runner.add_argument("--model", default=DEFAULT_MODEL, help="hub id or folder")
    runner.add_argument("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)}")
    runner.add_argument("--suite", choices=SUITES, help="an official benchmark's tasks instead")
    runner.add_argument(
        "--subset", help="of the suite on the hub, such as 4096 of ruler; ruler without: made here"
    )
    runner.add_argument("--data", type=Path, help="the suite as JSON lines instead of the hub")
    runner.add_argument(
        "--leaderboard", type=Path, metavar="FOLDER", help="write a suite's results as kvpress does"
    )
    runner.add_argument(
        "--lengths", nargs="+", type=int, help="tokens [1000; of ruler, made here: 4096]"
    )
    runner.add_argument("--samples", type=int, default=8, help="of each task and length")
    runner.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        choices=[*SETS, *METHODS],
        metavar="METHOD",
        help=f"names, or sets of them: {', '.join(SETS)}",
    )
    runner.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.75, 0.9])
    runner.add_argument("--seed", type=int, default=0)
    runner.add_argument(
        "--question",
        choices=("unseen", "seen"),
        default="unseen",
        help="seen: compressed with the context, as where generate gets both",
    )
    runner.add_argument("--routers", type=Path, help="folder of calibrated routers to run as well")
    runner.add_argument("--redo", action="store_true", help="drop these methods' old answers first")
    runner.add_argument("--live", action="store_true", help="prefill anew for every method")
    report = commands.add_parser("report", help="write JSON, markdown and plots of results so far")
    for command in (runner, report):
        command.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
        command.add_argument("--page", type=Path, help="write tables and plots there, too")
    args = parser.parse_args(argv)

    results = args.out / "answers.jsonl"
    if args.command == "run":
        logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip warns of its cost every time
        if args.leaderboard is not None and args.suite is None:
            parser.error("expected a --suite beside --leaderboard, got none")
        made = args.suite == "ruler" and args.subset is None and args.data is None
        loaded = args.suite is not None and not made
        try:
            suite = load_suite(args.suite, args.subset, args.data) if loaded else {}
        except ValueError as error:  # a malformed row
            parser.error(str(error))
        names, lengths = list(RULER if made else TASKS), args.lengths or [4096 if made else 1000]
        if loaded:  # of the length that it has
            names, lengths = list(suite), [int(args.subset) if (args.subset or "").isdigit() else 0]
        if made and (short := [length for length in lengths if length < LEAST_LENGTH]):
            parser.error(f"expected lengths of at least {LEAST_LENGTH} tokens, got {short[0]}")
        tasks = args.tasks or names
        if unknown := [task for task in tasks if task not in names]:
            parser.error(f"expected tasks of {', '.join(names)}, got {', '.join(unknown)}")
        model, tokenizer = load_model(args.model)
        try:
            suite_name = MADE if made else args.suite
            _write_meta(results.with_suffix(".meta.json"), model, args, suite_name)
        except ValueError as error:  # of another model or seed
            parser.error(str(error))
        methods = list(dict.fromkeys(m for name in args.methods for m in SETS.get(name, [name])))
        if args.routers is not None:
            methods += add_routers(args.routers)
        if args.redo:
            forget(results, methods)
        wanted = list(cells(tasks, lengths, args.samples, methods, args.ratios))
        if loaded:
            wanted = [cell for cell in wanted if cell.index < len(suite[cell.task])]

        make = from_seed(tokenizer, args.seed, make_ruler if made else make_sample)

        def samples(cell: Cell) -> Sample:
            return suite[cell.task][cell.index] if loaded else make(cell)

        seen = args.question == "seen"
        run(model, tokenizer, wanted, results, samples, live=args.live, seen=seen)
        if args.leaderboard is not None:
            folders = write_leaderboard(
                read_results(results),
                samples,
                args.leaderboard,
                suite=MADE if made else args.suite,
                subset=args.subset,
                model=args.model,
                seen=seen,
                seed=args.seed,
            )
            for path in folders:
                print(path)
    for path in write_report(results, args.out, args.page):
        print(path)


def _write_meta(path: Path, model: Any, args: argparse.Namespace, suite: str | None) -> None:
    """Say what ran where; a results file holds one model, seed and form.

    Raises
    ------
    ValueError
        The results file is of another model, seed, suite or form of the question.
    """
    meta = environment() | {
        "model": args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": args.seed,
        "suite": suite,
        "question": args.question,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, device {model.device}",
        "threads": torch.get_num_threads(),
    }
    if path.exists():
        before = {"question": "unseen"} | json.loads(path.read_text())
        for key in ("model", "dtype", "seed", "suite", "question"):
            if before[key] != meta[key]:
                raise ValueError(
                    f"{path} is of {key} {before[key]}, not {meta[key]}: choose another --out"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(meta, indent=1) + "\n")


if __name__ == "__main__":
    main()

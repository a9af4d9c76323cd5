"""How long the press takes in a prefill of SmolLM2, in two trees that take turns.

Times drift with whatever else a machine does. So both trees are loaded once, each in a process of
its own, and every round times both, one after the other: what one round says of them is said of
the same minute::

    python time_press.py --trees old new

Printed are medians with quartiles, by the clock and by CPU time: of a prefill without a press, of
one with it, of the difference, and of what the press's hooks take (all but its copies of the last
queries; less noisy than a difference of two prefills). The ratio is that of the second tree to the
first, round by round, and of the medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

PRESSES: dict[str, dict[str, Any]] = {
    "default": {},
    "training-free": {"router": None},
    "pikv": {"num_experts": 4, "top_k": 2, "router_type": "pikv"},
}
FIGURES = ("without", "with", "overhead", "hooks")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Hooks:
    """Adds up the time in forward hooks that are registered in a block."""

    def __init__(self) -> None:
        self.times = dict.fromkeys(CLOCKS, 0.0)
        self._running = False

    def around(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Time a hook, unless it runs within another."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return hook(*args, **kwargs)
            self._running, begun = True, {name: clock() for name, clock in CLOCKS.items()}
            try:
                return hook(*args, **kwargs)
            finally:
                for name, clock in CLOCKS.items():
                    self.times[name] += clock() - begun[name]
                self._running = False

        return call

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time all that are registered in the block."""
        from torch import nn

        methods = ("register_forward_hook", "register_forward_pre_hook")
        originals = {name: getattr(nn.Module, name) for name in methods}

        def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
            def register(module: Any, hook: Any, *args: Any, **options: Any) -> Any:
                return original(module, self.around(hook), *args, **options)

            return register

        try:
            for name, original in originals.items():
                setattr(nn.Module, name, wrapped(original))
            yield
        finally:
            for name, original in originals.items():
                setattr(nn.Module, name, original)


def work(args: argparse.Namespace) -> None:
    """Load the model; then time one round for each line that comes in."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    import torch
    import transformers
    from transformers import DynamicCache

    import moekv
    from moekv import MoERouterPress
    from moekv.models import load_model

    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    model, _ = load_model(dtype=getattr(torch, args.dtype))
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (1, args.length), generator=chance)

    @torch.no_grad()
    def prefill(ids: torch.Tensor, press: Any) -> tuple[dict[str, float], dict[str, float]]:
        hooks, cache = Hooks(), DynamicCache()
        gc.collect()
        begun = {name: clock() for name, clock in CLOCKS.items()}
        with hooks.timed(), nullcontext() if press is None else press(model):
            model.model(ids, past_key_values=cache)
        return {name: clock() - begun[name] for name, clock in CLOCKS.items()}, hooks.times

    def one_round(ids: torch.Tensor, with_first: bool) -> dict[str, dict[str, float]]:
        times: dict[str, dict[str, float]] = {}
        for pressed in (with_first, not with_first):
            press = MoERouterPress(0.5, **PRESSES[args.press]) if pressed else None
            whole, hooks = prefill(ids, press)
            times["with" if pressed else "without"] = whole
            if pressed:
                times["hooks"] = hooks
        times["overhead"] = {name: times["with"][name] - times["without"][name] for name in CLOCKS}
        return times

    one_round(ids[:, : min(args.length, 256)], True)
    print(json.dumps({"moekv": str(Path(moekv.__file__).parent)}), file=answers, flush=True)
    for number, _ in enumerate(sys.stdin):
        print(json.dumps(one_round(ids, bool(number % 2))), file=answers, flush=True)


class Worker:
    """A process with the moekv of one tree.

    Parameters
    ----------
    tree : Path
    options : list of str
        For its command line.
    """

    def __init__(self, tree: Path, options: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": str(tree.resolve()), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONDONTWRITEBYTECODE": "1", "TQDM_DISABLE": "1"},
        )
        self.moekv = self._answer()["moekv"]
        self.rounds: list[dict[str, dict[str, float]]] = []

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"time_press: a worker ended, with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self) -> None:
        """Let it time one round."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append(self._answer())

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def quartiles(numbers: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(numbers, n=4, method="inclusive") if numbers[1:] else 3 * numbers


def summary(one: Worker, other: Worker) -> dict[str, Any]:
    """Quartiles of every figure of both trees, and of their ratios, by clock."""
    rows: dict[str, Any] = {}
    for clock in CLOCKS:
        for figure in FIGURES:
            first, second = ([r[figure][clock] for r in w.rounds] for w in (one, other))
            ratios = [b / a for a, b in zip(first, second, strict=True) if a > 0]
            rows[f"{figure} {clock}"] = {
                "first_s": quartiles(first),
                "second_s": quartiles(second),
                "ratio": quartiles(ratios) if ratios else None,
                "ratio_of_medians": statistics.median(second) / statistics.median(first),
            }
    return rows


def show(rows: dict[str, Any]) -> None:
    """Print a summary as a table."""
    print(f"{'':<16}{'first, s':>28}{'second, s':>28}{'second / first':>28}{'of medians':>12}")
    for name, row in rows.items():
        columns = [
            "-" if row[key] is None else "{1:.4f} [{0:.4f} {2:.4f}]".format(*row[key])
            for key in ("first_s", "second_s", "ratio")
        ]
        cells = "".join(f"{cell:>28}" for cell in columns)
        print(f"{name:<16}{cells}{row['ratio_of_medians']:>12.4f}")


def main() -> None:
    """Time two trees."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--trees", type=Path, nargs=2, metavar=("A", "B"), help="folders with moekv in them")
    add("--press", choices=list(PRESSES), default="default")
    add("--rounds", type=int, default=20)
    add("--length", type=int, default=2048, help="tokens of the prefill")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--threads", type=int, default=1)
    add("--out", type=Path, help="write all times here, as JSON")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    if args.trees is None:
        parser.error("expected --trees A B")
    options = [
        *("--press", args.press, "--length", str(args.length)),
        *("--dtype", args.dtype, "--threads", str(args.threads)),
    ]
    workers = [Worker(tree, options) for tree in args.trees]  # the second when the first waits
    try:
        for number in range(args.rounds):
            for worker in workers if number % 2 else workers[::-1]:
                worker.run()
            took = ["{with[wall]:.2f}".format_map(w.rounds[-1]) for w in workers]
            print(f"round {number + 1}: {' | '.join(took)} s", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.end()
    rows = summary(*workers)
    print(f"first: {workers[0].moekv}, second: {workers[1].moekv}, {len(workers[0].rounds)} rounds")
    show(rows)
    if args.out is not None:
        found = {"command": sys.argv, "summary": rows, "rounds": [w.rounds for w in workers]}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a press adds to a prefill: time, by stage for moekv, and memory at the peak.

    python -m benchmarks.end_to_end.prefill --model smollm2 --lengths 1024 2048 4096 8192
    python -m benchmarks.end_to_end.prefill --model llama-shape --lengths 8192 --methods moekv

All methods of one length take turns in one process. The time in a press is that of its hooks and of
the beginning of its block, which is exact where the difference of two prefills drowns in noise
(KVComposePress alone also works outside of its hooks). A further prefill, which is not timed, gives
the memory at the peak, and a short one the number of PyTorch's operations in the hooks, per layer.
Peers are all presses of kvpress that compress within one prefill. A method that fails here (it
needs a download, or another attention implementation) is recorded with its error.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

import moekv.ops
from benchmarks.measure import Times, peak_extra_bytes, quartiles, timed
from benchmarks.quality.presses import EXPERTS, MERITS, OURS, PEERS, ROUTED
from benchmarks.quality.targets import FREE
from moekv import MoERouterPress
from moekv.calibration.router import CalibratedRouter
from moekv.experts.builder import ViewBuilder
from moekv.experts.expected import ExpectedExpert
from moekv.experts.view import LayerView
from moekv.press import prefill, rater
from moekv.press.rater import Rater
from moekv.press.session import Session
from moekv.routing.base import BaseMoERouter

from .runs import Run, random_ids

RATIO = 0.5
COUNTED = 512  # tokens of the prefill whose operations are counted
NO_PRESS = "no press"

METHODS: dict[str, Callable[[], Any]] = {
    NO_PRESS: lambda: None,
    "moekv": lambda: MoERouterPress(RATIO),
    "moekv budget=head": lambda: MoERouterPress(RATIO, budget="head"),
    "moekv budget=model": lambda: MoERouterPress(RATIO, budget="model"),
} | {name: lambda make=make: make(RATIO) for name, make in PEERS.items()}

#: Not run unless they are asked for: every kind of router, and experts alone.
MORE: dict[str, Callable[[], Any]] = {
    name: lambda make=make: make(RATIO)
    for name, make in (ROUTED | MERITS | EXPERTS | {FREE: OURS[FREE]}).items()
}

#: Where each stage of moekv's press is: what is called within another stage counts there.
STAGES: dict[str, Sequence[tuple[Any, str]]] = {
    "view": [(ViewBuilder, "__call__"), (Session, "_notice")],
    "gate": [
        (CalibratedRouter, "project"),
        (BaseMoERouter, "__call__"),
        (BaseMoERouter, "rate"),
        (BaseMoERouter, "decide"),
    ],
    "score": [(moekv.ops, "expert_scores")],
    "expected": [(LayerView, "expected"), (ExpectedExpert, "scores")],
    "mix": [(Rater, "_mix")],
    "statistics": [(rater, "hit_rates"), (prefill, "record")],
    "select": [(prefill, "choose")],
    "compact": [(prefill, "apply")],
}


class Stopwatch:
    """Adds up the time spent in functions; of nested ones, the outermost counts."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._running: set[str] = set()

    @property
    def in_hooks(self) -> bool:
        """Whether a hook is running."""
        return "hooks" in self._running

    def around(self, name: str, function: Callable[..., Any], group: str) -> Callable[..., Any]:
        """Time a function under a name, unless another of its group is running."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if group in self._running:
                return function(*args, **kwargs)
            self._running.add(group)
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
                self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
                self._running.discard(group)

        return call

    @contextmanager
    def of_hooks(self) -> Iterator[None]:
        """Time all forward hooks that are registered in the block, and what a press sees without.

        moekv copies the last queries on their way to the attention.
        """
        with ExitStack() as stack:
            noting = self.around("press", Session._notice, "hooks")
            stack.enter_context(mock.patch.object(Session, "_notice", noting))
            for method in ("register_forward_hook", "register_forward_pre_hook"):
                original = getattr(nn.Module, method)

                def register(
                    module: nn.Module,
                    hook: Any,
                    *args: Any,
                    original: Any = original,
                    **options: Any,
                ) -> Any:
                    timed = self.around("press", hook, "hooks")
                    # By this a block of moekv knows its hooks, and raises where they are gone.
                    vars(timed)["__self__"] = getattr(hook, "__self__", None)
                    return original(module, timed, *args, **options)

                stack.enter_context(mock.patch.object(nn.Module, method, register))
            yield

    @contextmanager
    def of_stages(self) -> Iterator[None]:
        """Time the stages of moekv's press in the block."""
        with ExitStack() as stack:
            for stage, places in STAGES.items():
                for owner, name in places:
                    wrapped = self.around(stage, getattr(owner, name), "stages")
                    stack.enter_context(mock.patch.object(owner, name, wrapped))
            yield


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch, views included, and of moekv that hooks call."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch, self.count = watch, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count, and call."""
        self.count += self.watch.in_hooks
        return function(*args, **kwargs or {})


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    ids: Tensor,
    press: Any,
    around: Callable[[Stopwatch], AbstractContextManager[Any]] = lambda watch: nullcontext(),
) -> Stopwatch:
    """Prefill a fresh cache with a press, or with none; the times of its hooks and stages."""
    cache, watch = DynamicCache(), Stopwatch()
    pressing = nullcontext() if press is None else press(model)
    with watch.of_hooks(), watch.of_stages(), ExitStack() as stack:
        enter = watch.around("press", stack.enter_context, "hooks")
        watch.around("begin", enter, "stages")(pressing)
        with around(watch):
            model.model(ids, past_key_values=cache)
    for layer in model.model.layers:  # what kvpress's head-wise presses leave behind
        layer.self_attn.masked_key_indices = None
    return watch


def count_operations(model: PreTrainedModel, press: Any) -> int:
    """How many operations a press calls in one prefill; their number depends little on its size."""
    seen: list[Operations] = []

    def around(watch: Stopwatch) -> Operations:
        seen.append(Operations(watch))
        return seen[0]

    prefill(model, random_ids(model, COUNTED), press, around)
    return seen[0].count


def measure(
    model: PreTrainedModel,
    length: int,
    methods: Sequence[str],
    rounds: int,
    tick: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row per method; `tick` is told what comes next."""
    ids = random_ids(model, length)
    times = {name: Times() for name in methods}
    watches: dict[str, list[Stopwatch]] = {name: [] for name in methods}
    memory: dict[str, int] = {}
    counts: dict[str, float] = {}
    num_layers = len(model.model.layers)
    errors: dict[str, str] = {}
    prefill(model, ids, None)  # first touches of memory, caches of kernels
    for turn in range(-1, rounds):  # the first of them measures memory
        for name in methods:
            tick(name)
            if name in errors:
                continue
            gc.collect()
            press, seen = (METHODS | MORE)[name](), watches[name]
            run = partial(prefill, model, ids, press)
            try:
                if turn < 0:
                    memory[name] = peak_extra_bytes(run)
                    counts[name] = count_operations(model, press) / num_layers
                else:
                    seen.append(timed(run, times[name]))
            except Exception as error:  # a method that fails is a result
                errors[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    rows = []
    for name in methods:
        row: dict[str, Any] = {"length": length, "method": name}
        if name in errors:
            rows.append(row | {"error": errors[name]})
            continue
        seen = watches[name]
        rows.append(
            row
            | times[name].summary()
            | {
                "stages_s": {
                    stage: quartiles([watch.wall.get(stage, 0.0) for watch in seen])
                    for stage in seen[0].wall
                },
                "share": _shares(times[name].wall, [watch.wall for watch in seen]),
                "cpu_share": _shares(times[name].cpu, [watch.cpu for watch in seen]),
                "peak_bytes": memory[name],
                "operations": counts[name],
            }
        )
    return rows


def _shares(totals: Sequence[float], stages: Sequence[dict[str, float]]) -> list[float]:
    """Time in the press, of what the same prefill took beside it."""
    inside = [seen.get("press", 0.0) for seen in stages]
    return quartiles([part / (all_ - part) for all_, part in zip(totals, inside, strict=True)])


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print one length's table."""
    table = Table(title=f"prefill of {rows[0]['length']:,} tokens")
    stages = ["begin", *STAGES]
    for column in (
        "method",
        "prefill s",
        "press ms",
        "share",
        "CPU share",
        "peak MiB",
        "ops",
        *stages,
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        if "error" in row:
            table.add_row(row["method"], row["error"][:40])
            continue
        inside = row["stages_s"]
        table.add_row(
            row["method"],
            f"{row['wall_s'][1]:.2f}",
            f"{1e3 * inside.get('press', [0] * 3)[1]:.1f}",
            f"{row['share'][1]:.2%}",
            f"{row['cpu_share'][1]:.2%}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['operations']:.0f}",
            *(f"{1e3 * inside[stage][1]:.1f}" if stage in inside else "" for stage in stages),
        )
    console.print(table)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    summary = __doc__.split("\n")[0]
    run = Run("prefill", summary, methods=METHODS, more=MORE, lengths=[1024, 2048], ratio=RATIO)
    add = run.parser.add_argument
    add("--rounds", type=_positive, default=5, help="timed prefills of each method")
    args, model = run.begin(arguments), run.model
    console = Console(width=None if sys.stdout.isatty() else 160)
    with Progress(console=console) as progress:
        steps = len(args.lengths) * len(args.methods) * (args.rounds + 1)
        bar = progress.add_task("", total=steps)

        for length in args.lengths:

            def tick(name: str, length: int = length) -> None:
                progress.update(bar, advance=1, description=f"{length:,} tokens, {name}")

            measured = measure(model, length, args.methods, args.rounds, tick)
            run.add(measured)
            show(measured, console)
    run.end()


if __name__ == "__main__":
    main()

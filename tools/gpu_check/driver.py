"""Runs the steps one after the other, whatever comes of each."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from gpu_check import machine
from gpu_check.report import CRASHED, FAILED, HANG, NOT_RUN, OK, Line, Report, StepReport

ROOT = Path(__file__).resolve().parents[2]
MAX_RESTARTS = 12  # of a step's process
KILL_SECONDS = 5.0  # that a killed process may take to end


@dataclasses.dataclass(frozen=True)
class Step:
    """A module of items, and how many seconds it has."""

    module: str
    what: str
    limit: float  # of all items
    item_limit: float  # of one
    workers: int = 1  # processes at once; where they time nothing


STEPS = {
    "build": Step("gpu_check.build", "the libraries for this GPU", 120, 120, workers=2),
    "a": Step("gpu_check.smoke", "each op once on odd sizes, against the reference", 20, 10),
    "b": Step("gpu_check.timing", "each op beside a copy and a matrix product", 70, 20),
    "c": Step("gpu_check.end_to_end", "a model of Llama-3.1-8B's shape", 90, 60),
    "d": Step("gpu_check.suite", "tests of the ops and the press", 60, 45, workers=4),
    "e": Step("gpu_check.sanitizer", "compute-sanitizer over the smoke test", 60, 59, workers=4),
    "f": Step("gpu_check.profile", "ncu on what is furthest from the roofline", 50, 25),
}
"""480 seconds at most, together."""


class Worker:
    """A process that runs a step's items, or its share of them, and the next one if it ends."""

    def __init__(self, command: list[str], log: IO[str], report: StepReport, item_limit: float):
        self.command, self.log, self.report, self.item_limit = command, log, report, item_limit
        self.items: list[str] = []
        self.ended: list[str] = []
        self.current: str | None = None
        self.restarts = 0
        self.finished = False
        self._start()

    def _start(self) -> None:
        handle, name = tempfile.mkstemp(suffix=".jsonl")
        os.close(handle)
        self.lines = open(name)  # noqa: SIM115  (closed with the process)
        self.partial, self.again = "", False
        skipped = [x for item in self.ended for x in ("--skip", item)]
        self.process = subprocess.Popen(
            [*self.command, "--lines", name, *skipped],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,  # what it starts ends with it
        )

    def _read(self) -> bool:
        """Take in what the process has told since; say whether it told anything."""
        *whole, self.partial = (self.partial + self.lines.read()).split("\n")
        for text in whole:
            told: dict[str, Any] = json.loads(text)
            event = told.pop("event")
            if event == "items":
                self.items = told["items"]
            elif event == "begin":
                self.current, self.began = told["item"], time.monotonic()
            elif event == "end":
                self._end(Line(**told))
            elif event == "again":
                self.again = True
            else:
                self.finished = True
        return bool(whole)

    def _end(self, line: Line) -> None:
        self.report.lines.append(line)
        self.ended.append(line.item)
        self.current = None

    def _end_current(self, status: str, message: str) -> None:
        if self.current is not None:
            self._end(Line(self.current, status, time.monotonic() - self.began, message))

    def kill(self) -> None:
        """End the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # Where the driver does not let go of it, it ends later, and nothing waits for that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)

    def poll(self) -> bool:
        """Look after the process; say whether there is anything new."""
        code = self.process.poll()
        news = self._read()
        if code is None:
            late = self.current is not None and time.monotonic() - self.began > self.item_limit
            if not late:
                return news
            self.kill()
            self._read()
            self._end_current(HANG, f"ended after {self.item_limit:.0f} s")
        elif self.finished:
            pass
        elif self.current is not None:
            self._end_current(CRASHED, f"the process ended with {_name_of_exit(code)}")
        elif not self.again:
            *before, last = _tail(self.log).splitlines() or ["nothing was printed"]
            message = f"the process ended with {_name_of_exit(code)}: {last}"
            message += "; before: " + " ".join(before) if before else ""
            self._end(Line("start", FAILED, message=message))
            self.finished = True
        self.close()
        if self.finished:
            return True
        self.restarts += 1
        if self.restarts <= MAX_RESTARTS:
            self._start()
        else:
            self._leave_the_rest(f"the step's process ended {self.restarts} times")
        return True

    def close(self) -> None:
        """End what is left of the process, and its lines."""
        self.kill()
        Path(self.lines.name).unlink(missing_ok=True)
        self.lines.close()

    def cut(self, seconds: float) -> None:
        """End everything: the step's time is over."""
        self.kill()
        self._read()
        self._end_current(HANG, f"it ran when the step's {seconds:.0f} s were over")
        self.close()
        self._leave_the_rest(f"the step's {seconds:.0f} s were over")
        if not self.items:
            self._end(Line("start", FAILED, message=f"nothing began within {seconds:.0f} s"))

    def _leave_the_rest(self, why: str) -> None:
        for item in self.items:
            if item not in self.ended:
                self._end(Line(item, NOT_RUN, message=why))
        self.finished = True


def _name_of_exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _tail(log: IO[str], characters: int = 1500) -> str:
    return Path(log.name).read_text(errors="replace")[-characters:].strip()


def run_step(step: Step, report: Report, name: str, device: str, log: IO[str], patience: float):
    """Run a step and note what it tells, as it tells it."""
    limit, item_limit = step.limit * patience, step.item_limit * patience
    noted = report.steps[name] = StepReport(step.what, limit)
    command = [sys.executable, "-m", "gpu_check.worker", step.module, "--device", device]
    command += ["--results", str(report.json)]
    start = time.monotonic()
    workers = [
        Worker([*command, "--part", f"{i}/{step.workers}"], log, noted, item_limit)
        for i in range(step.workers)
    ]
    try:
        while not all(x.finished for x in workers):
            news = [x.poll() for x in workers if not x.finished]
            if time.monotonic() - start > limit:
                for x in workers:
                    if not x.finished:
                        x.cut(limit)
            if any(news):
                report.write()
            time.sleep(0.05)
    finally:
        for x in workers:
            x.kill()
        noted.seconds = time.monotonic() - start
        report.write()


def _environment(findings: list[machine.Finding]) -> None:
    """Set what all processes of the steps need: the source tree, no hub, no index."""
    paths = [ROOT, ROOT / "tools", ROOT / "tests" / "helpers", ROOT / "tests" / "simt"]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *([before] if before else [])])
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTHONUNBUFFERED"] = "1"
    if not any(x.problem for x in findings if x.part == "GPU"):
        os.environ["GPU_CHECK_ARCHITECTURE"] = machine.architecture(findings)


def _note_machine(report: Report, findings: list[machine.Finding]) -> bool:
    """Write down what is there; say whether the steps can run."""
    noted = report.steps["machine"] = StepReport("what is there", 0.0, seconds=0.0)
    for x in findings:
        status = FAILED if x.problem else OK
        noted.lines.append(Line(x.part, status, message=x.problem or x.found))
    report.write()
    return not any(x.problem and x.by_all for x in findings)


def main(argv: Sequence[str] | None = None, known: Mapping[str, Step] = STEPS) -> int:
    """Look at the machine and run the steps; 1 if anything failed or was cut short."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    letters = [name for name in known if name != "build"]
    parser.add_argument("--steps", default=",".join(letters), help="some of " + ",".join(letters))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--device", default="gpu_check.gpu", help="module with a Gpu")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of all time limits")
    arguments = parser.parse_args(argv)
    steps = [x.strip() for x in arguments.steps.split(",") if x.strip()]
    if unknown := [x for x in steps if x not in letters]:
        parser.error(f"expected steps among {', '.join(letters)}, got {', '.join(unknown)}")

    findings = machine.look()
    about = {"commit": machine.commit_of(ROOT), "python": sys.version.split()[0]}
    report = Report(arguments.out, about)
    can_run = _note_machine(report, findings)
    for x in findings:
        if x.problem:
            print(f"gpu-check: {x.part}: {x.problem}", file=sys.stderr)
    if not can_run:
        return 1
    _environment(findings)
    with (arguments.out / "gpu-check.log").open("w") as log:
        for name in ["build", *steps]:
            step = known[name]
            run_step(step, report, name, arguments.device, log, arguments.patience)
            noted = report.steps[name]
            print(f"{name}: {noted.what}: {noted.status}, {noted.seconds:.0f} s", flush=True)
            for line in noted.lines:
                if line.status != OK:
                    print(f"  {line.item}: {line.status}: {line.message[:300]}", flush=True)
    print(f"written to {report.markdown} and {report.json}")
    return int(not report.passed)

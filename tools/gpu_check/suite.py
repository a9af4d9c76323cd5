"""Step d: the tests of the ops and the press, as far as they name the GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gpu_check.driver import ROOT
from gpu_check.worker import Skip

if TYPE_CHECKING:
    from gpu_check.worker import Items, Place

ON_GPU = False  # each test says for itself where it runs
KEYWORD = "cuda"
FIRST = [ROOT / "tests/ops/test_cuda.py", ROOT / "tests/press/test_press_cuda.py"]


class Count:
    """A plugin that counts outcomes and keeps the names of what failed."""

    def __init__(self) -> None:
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.failed: list[str] = []
        self.reason = "none is about the GPU"

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take in one phase of a test."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reason = str(report.longrepr[2])
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed.append(f"{report.nodeid}: {getattr(crash, 'message', '')[:200]}")


def items(place: Place) -> Items:
    """Return a run of each file, what concerns the GPU alone first."""
    others = sorted(x for x in (ROOT / "tests/ops").glob("test_*.py") if x not in FIRST)
    return {str(x.relative_to(ROOT)): partial(_run, x) for x in [*FIRST, *others]}


def _run(path: Path) -> dict[str, Any]:
    count = Count()
    arguments = ["-q", "-k", KEYWORD, "-p", "no:cacheprovider", str(path)]
    code = pytest.main(arguments, plugins=[count])
    if count.failed:
        raise AssertionError(f"{len(count.failed)} failed: " + "; ".join(count.failed[:5]))
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code!r}")
    if not count.outcomes["passed"]:
        raise Skip(f"none of its {count.outcomes['skipped']} tests ran: {count.reason}")
    return dict(count.outcomes)

"""``make bench-compare``: two versions, round by round."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.bench_compare import Comparison, compare, main, table

ROOT = Path(__file__).parents[2]


class Fake:
    """A version whose answers are known."""

    def __init__(self, name: str, *seconds: float, sums: Any = (0.5,), error: str = "") -> None:
        self.name, self.sums, self.error = name, list(sums), error
        self.left = list(seconds)
        self.order: list[str] = []

    def run(self, case: str) -> dict[str, Any]:
        if self.error:
            return {"error": self.error}
        return {"seconds": self.left.pop(0), "sums": self.sums}


def test_ratios_are_of_the_same_round() -> None:
    found = compare(Fake("base", 1.0, 2.0, 4.0), Fake("here", 2.0, 2.0, 2.0), "x", 3)
    assert found.ratios == (0.75, 1.0, 1.5)
    assert not found.differs
    assert found.line() == "| x | 2e+03 / 2e+03 | **1.000** (0.750 to 1.500) |  |"


def test_both_go_first_in_turn() -> None:
    order: list[str] = []

    class Noted(Fake):
        def run(self, case: str) -> dict[str, Any]:
            order.append(self.name)
            return super().run(case)

    compare(Noted("base", *[1.0] * 4), Noted("here", *[1.0] * 4), "x", 4)
    assert order == ["here", "base", "base", "here"] * 2


def test_other_results_are_named() -> None:
    found = compare(Fake("base", 1.0), Fake("here", 1.0, sums=[0.6]), "x", 1)
    assert "results differ" in found.line()
    found = compare(Fake("base", 1.0), Fake("here", 1.0, sums=[0.5, 0.5]), "x", 1)
    assert found.differs


def test_a_case_that_a_version_does_not_know_is_left_out() -> None:
    found = compare(Fake("base", error="KeyError: 'x'"), Fake("here", 1.0), "x", 5)
    assert found.line() == "| x | | | base: KeyError: 'x' |"
    lines = list(table("base", [found, Comparison("y", [1.0], [0.5])]))
    assert lines[0].startswith("| case | ms, base / here") and "**0.500**" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["HEAD", "--rounds", "0"], "at least 1, got 0"), (["HEAD", "--cases", "no"], "gating_topk")],
)
def test_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_no_such_commit() -> None:
    command = [sys.executable, "tools/bench_compare.py", "no-such-commit", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "bench-compare: git rev-parse" in done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_this_version_beside_itself() -> None:
    command = [sys.executable, "tools/bench_compare.py", "HEAD", "--rounds", "2", "--cases"]
    done = subprocess.run([*command, "select_kept"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    assert row.startswith("| select_kept | ") and row.endswith("|  |")

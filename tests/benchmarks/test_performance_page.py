"""The page of performance says what the results say."""

from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.measure import RESULTS


def row(contender: str, threads: int, cpu: float, wall: float, **changed: Any) -> dict[str, Any]:
    case = {"op": "kv_compact_", "variant": "half kept", "shape": "Llama-3.1-8B", "length": 8192}
    times = {"cpu_s": [cpu] * 3, "wall_s": [wall] * 3, "peak_bytes": 1 << 20, "moved": 10**9}
    return case | {"dtype": "bf16", "threads": threads, "contender": contender} | times | changed


def prefill(length: int, share: float, press: float, **changed: Any) -> dict[str, Any]:
    times = {"wall_s": [1.0] * 3, "cpu_s": [2.0] * 3, "share": [share] * 3, "cpu_share": [0.5] * 3}
    stages = {"press": [press] * 3, "gate": [press / 4] * 3}
    about = {"model": "smollm2", "threads": 2, "length": length, "method": "moekv"}
    return about | times | {"stages_s": stages, "peak_bytes": 3 << 20, "operations": 97} | changed


def line(table: list[str], start: str) -> str:
    (found,) = (text for text in table if text.startswith(f"| {start}"))
    return found


def test_targets_are_judged_on_two_threads_by_the_clock() -> None:
    one = [row("moekv", 1, 0.1, 9.0), row("torch.gather", 1, 1.2, 9.0)]
    two = [row("moekv", 2, 9.0, 0.1), row("torch.gather", 2, 9.0, 0.8)]
    of_gather = "… times as fast as kvpress's gather, 8k"
    table = list(report.targets_table(report.Kernels(one), [], []))
    assert line(table, of_gather) == f"| {of_gather} | ≥ 10 |  | 8k 12.0 | met |"
    rows = [prefill(2048, 0.015, 0.1), prefill(2048, 0.9, 0.1, threads=1)]
    table = list(report.targets_table(report.Kernels(one + two), rows, []))
    assert line(table, of_gather) == f"| {of_gather} | ≥ 10 | 8k 8.0 | 8k 12.0 | **missed** |"
    assert line(table, "whole press").endswith("| ≤ 2 % | 1.5% | 50.0% | met |")


def test_of_many_numbers_those_that_miss_are_shown() -> None:
    target = report.Target("t", "≥ 1", lambda _: iter(()), lambda x: x >= 1)
    found = [(f"op {i}", float(i)) for i in range(8)]
    assert str(report.Judged(found, target)) == "op 0 0.0, the other 7 met"
    assert str(report.Judged(found[1:], target)) == "all 7 met"
    assert str(report.Judged(found[:2], target)) == "op 0 0.0, op 1 1.0"


def test_the_prefill_tables_have_times_shares_and_the_line_through_them() -> None:
    rows = [prefill(n, 0.1, 0.05 + 0.02 * n / 1000) for n in (1000, 2000, 4000)]
    rows.append({"model": "smollm2", "threads": 2, "length": 1000, "method": "X", "error": "E: x"})
    table = list(report.prefill_tables(rows))
    assert "| **moekv** | 1.00 s, 10.0%, 3 |" in line(table, "**moekv**")
    assert line(table, "**moekv**").endswith("| 97 |")
    assert "Not measured here: X (E)" in table
    assert "| 2,000 | 1000 | 90.0 | 22.5 | 67.5 |" in table
    assert any("50 ms whatever the length, and 20 ms for each 1,000 tokens" in x for x in table)


def test_the_pages_are_those_of_the_results(tmp_path: Path) -> None:
    report.render(RESULTS, tmp_path / report.PAGE.name)
    for page in tmp_path.glob("*.md"):
        recorded = (report.PAGE.parent / page.name).read_text()
        assert page.read_text() == recorded, "run `python -m benchmarks.report`"


def test_notes_go_with_the_recorded_results_alone(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    report.render(tmp_path / "results", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "## Targets" in page and "## Where targets are missed" not in page

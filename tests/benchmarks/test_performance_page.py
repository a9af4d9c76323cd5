"""The page of performance says what the results say."""

import json
from pathlib import Path
from typing import Any

from benchmarks import overview, report
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
    table = list(report.targets_table(report.Kernels(one), []))
    assert line(table, of_gather) == f"| {of_gather} | ≥ 10 |  | 8k 12.0 | met |"
    table = list(report.targets_table(report.Kernels(one + two), []))
    assert line(table, of_gather) == f"| {of_gather} | ≥ 10 | 8k 8.0 | 8k 12.0 | **missed** |"


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
    page = (tmp_path / "performance-ops.md").read_text()
    assert "## Targets" in page and "Where targets are missed" not in page


def test_the_first_page_is_a_screen_and_answers_what_was_measured(tmp_path: Path) -> None:
    first = report.PAGE.read_text().splitlines()
    assert len(first) <= 30 and sum(text.startswith("![") for text in first) == 1
    cpu = {"threads": 1, "model": "smollm2", "length": 2048, "calls": 10}
    shares = [cpu | {"method": "moekv", "cpu_share": [0.02, 0.04, 0.05]}]
    steps = [
        cpu | {"step": "token", "method": name, "cpu_s": [seconds] * 3}
        for name, seconds in ((overview.FULL, 0.2), (overview.MODEL, 0.1))
    ]
    table = list(overview.table(overview.Measured(shares, steps, [])))
    assert line(table, "the press, of").endswith("| ≤ 3 % | calibrated router 4.0% | **missed** |")
    assert line(table, "a token, times").endswith("| ≥ 1.05 | 2k 2.00 | met |")
    assert len(table) == 4  # what was not measured has no line
    assert not list(overview.table(overview.Measured([], [], [])))
    assert not overview.draw(overview.Measured([], [], []), tmp_path / "none.png")


def test_growth_is_the_slope_of_logarithms_and_threads_are_compared_case_by_case() -> None:
    grown = [row("moekv", 1, 1e-6 * n, 1.0, length=n, peak_bytes=n**2) for n in (1024, 4096, 16384)]
    table = list(report.growth_table(grown))
    assert table[-1].startswith("| `kv_compact_` | half kept | bf16 | 1.00 | 1.02 | 16.4 | 2.00 |")
    assert not list(report.growth_table([]))
    both = [row("moekv", 1, 1.0, 9.0), row("moekv", 2, 9.0, 0.6), row("moekv", 2, 1, 1, length=9)]
    table = list(report.threads_table(report.Kernels(both)))
    assert table[-1] == "| kv_compact_, half kept | 1 | 1.67 | 1.67 | 1.67 |"


def test_the_kernels_alone_are_beside_a_copy(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    named = {"avx2": 2.0, "copy": 1.0}
    found = [
        {"run_type": "iteration", "run_name": f"op, all/{isa}/8192", "time_unit": "ms"}
        | {"cpu_time": ms, "bytes_per_second": 8e9 / ms}
        for isa, ms in named.items()
    ]
    written = tmp_path / "written.json"
    written.write_text(json.dumps({"benchmarks": found, "context": {"host_name": "secret"}}))
    report.record_cpp(written)
    recorded = json.loads((tmp_path / "cpp.json").read_text())
    assert "secret" not in str(recorded)
    table = list(report.cpp_table(recorded["rows"]))
    assert table[-1] == "| op, all | 8,192 | 244 ns, 4.00, 0.5 x |"

"""``moekv bench``: the benchmark of the source tree; what it measures: tests/benchmarks."""

import pytest

from moekv.cli import bench
from moekv.cli.main import main


@pytest.mark.parametrize("command", [["bench"], ["bench", "run"]])
def test_moekv_bench_runs_the_benchmark(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--tasks", "no_such_task"])
    assert stop.value.code == 2
    assert "got no_such_task" in capsys.readouterr().err


def test_bench_says_which_file_is_missing(capsys, tmp_path):
    assert main(["bench", "report", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("moekv bench: error: ")
    assert main(["bench", "run", "--suite", "ruler", "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_bench_needs_a_source_tree(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "moekv" / "cli" / "bench.py"))
    assert main(["bench", "report"]) == 2
    assert "in a source tree" in capsys.readouterr().err

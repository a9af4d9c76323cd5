"""``moekv bench``: the benchmark of the source tree; what it measures: tests/benchmarks."""

import json

import pytest
import torch

from benchmarks.quality import __main__ as benchmark
from moekv.cli import bench
from moekv.cli.main import main


@pytest.mark.parametrize("command", [["bench"], ["bench", "run"]])
def test_moekv_bench_runs_the_benchmark(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--tasks", "no_such_task"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("moekv bench: error: expected tasks of ")
    assert "got no_such_task; see moekv bench --help" in error and error.count("\n") == 1


def test_results_of_another_seed_are_refused(capsys, tmp_path, monkeypatch):
    meta = {"model": benchmark.DEFAULT_MODEL, "dtype": "float32", "seed": 7, "suite": None}
    (tmp_path / "answers.meta.json").write_text(json.dumps(meta))
    model = torch.nn.Linear(1, 1)
    model.device, model.dtype = torch.device("cpu"), torch.float32
    monkeypatch.setattr(benchmark, "load_model", lambda name: (model, None))
    with pytest.raises(SystemExit) as stop:
        main(["bench", "run", "--out", str(tmp_path), "--samples", "1"])
    assert stop.value.code == 2
    assert "is of seed 7, not 0: choose another --out" in capsys.readouterr().err


def test_bench_alone_measures_nothing(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench"])
    assert stop.value.code == 0
    assert "moekv bench run --tasks facts" in capsys.readouterr().out


def test_bench_says_which_file_is_missing(capsys, tmp_path):
    assert main(["bench", "report", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("moekv bench: error: ")
    assert main(["bench", "run", "--suite", "ruler", "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_bench_needs_a_source_tree(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "moekv" / "cli" / "bench.py"))
    assert main(["bench", "report"]) == 2
    assert "in a source tree" in capsys.readouterr().err

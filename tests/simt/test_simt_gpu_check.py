"""What is to run on a GPU, on a pretended one: tensors on the CPU and simulated kernels."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import op_cases
import pretended
import pytest
import rehearsal
import torch
from gpu_check import driver, end_to_end, machine, smoke, timing
from gpu_check.driver import Step
from gpu_check.machine import Finding
from gpu_check.worker import Skip


@pytest.mark.parametrize("name", op_cases.CHECKS)
def test_checks_of_the_ops(kernels: ModuleType, name: str) -> None:
    """The checks put all of their tensors on the device that they are told."""
    check, cases = op_cases.CHECKS[name]
    with pretended.PretendedGpu(kernels):
        for case in cases[:3]:
            check(getattr(torch.ops.moekv, name), case, "cuda")


def test_a_pretended_gpu_refuses_tensors_from_elsewhere(kernels: ModuleType) -> None:
    with pretended.PretendedGpu(kernels):
        here, there = torch.ones(3, device="cuda"), torch.ones(3)
        assert (here.device.type, there.device.type) == ("cuda", "cpu")
        assert (here + there.to("cuda")).device == (here * there[0]).device == here.device
        assert (here.cpu() + there).device == there.device
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            here + there


@pytest.fixture
def gpu(kernels: ModuleType, tmp_path: Path) -> Iterator[rehearsal.Gpu]:
    """gpu_check's device, pretended, at work."""
    gpu = rehearsal.Gpu(tmp_path / "gpu-check.json")
    with gpu.active():
        yield gpu


def test_the_smoke_test_runs_every_op(gpu: rehearsal.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which each of its checks begins with; the whole check below runs them."""
    called = set()

    def op(name: str) -> Any:
        called.add(name)
        raise InterruptedError

    monkeypatch.setattr(gpu.mode.device, "op", op)
    for check in smoke.items(gpu).values():
        with pytest.raises(InterruptedError):
            check()
    assert called == {*op_cases.CHECKS, "quantize_pairs", "ragged_attention"}


def test_every_op_and_its_peers_are_timed(gpu: rehearsal.Gpu) -> None:
    told, skipped = {}, []
    for name, run in timing.items(gpu).items():
        try:
            told[name] = run() or {}
        except Skip:
            skipped.append(name)
    (tokens,) = gpu.sizes.layer_tokens
    names = {x.split()[0].rstrip(",:") for x in timing.OPS}
    assert names == {*op_cases.CHECKS, "quantize_pairs", "ragged_attention"}
    assert set(told) >= {"roofline", *(f"{x} {tokens}" for x in (*timing.OPS, *timing.PEERS))}
    assert set(skipped) <= {f"{x} {tokens}" for x in timing.COMPILED}
    for name in timing.OPS:
        assert told[f"{name} {tokens}"]["µs"] > 0
        assert re.fullmatch(r"\d+%", told[f"{name} {tokens}"]["of the roofline"])


@pytest.mark.parametrize("name", [*op_cases.CHECKS, "quantize_pairs", "ragged_attention"])
def test_results_are_compared_before_they_are_timed(
    gpu: rehearsal.Gpu, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An op that is wrong in one number is not timed."""
    op = gpu.mode.device.op(name)

    def wrong(*inputs: torch.Tensor, **options: Any) -> Any:
        result = op(*inputs, **options)
        first = result if isinstance(result, torch.Tensor) else (result or inputs)[0]
        first.view(-1)[7] = first.view(-1)[7] * 1.03 + 1
        return result

    timed = [x for key, x in timing.make_ops(gpu, 64).items() if key.startswith(name)]
    for one in timed:
        timing.check(one)
    monkeypatch.setattr(gpu.mode.device, name, wrong)
    for one in timed:
        with pytest.raises(AssertionError, match=re.escape(one.name)):
            timing.check(one)


def test_end_to_end(gpu: rehearsal.Gpu) -> None:
    """Each item does what it says; graphs and streams are pretended, the numbers are right."""
    told = {name: run() or {} for name, run in end_to_end.items(gpu).items()}
    (prefill,) = gpu.sizes.prefills
    columns = told[f"{prefill.tokens} tokens"]
    assert columns["layers"] == prefill.layers
    for name in ("full", "press", "uniform"):
        assert columns[f"{name} s"] > 0 and columns[f"{name} tokens/s"] > 0
    assert {"press's share", "uniform's share"} < set(columns)
    for kind in ("static", "ragged"):
        assert told[f"graph of a step, {kind} cache"]["graph ms"] > 0
    waits, most = told["waits of the host"], end_to_end.MOST_WAITS
    assert set(waits) == {f"{name}, waits" for name in most}
    # That no more came was asked there. One of each padded prefill is of transformers 5.24 alone.
    assert sum(most.values()) - sum(waits.values()) in (0, 2)


def test_more_waiting_than_recorded_fails(
    gpu: rehearsal.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = "padded step that compresses"
    monkeypatch.setitem(end_to_end.MOST_WAITS, step, end_to_end.MOST_WAITS[step] - 1)
    monkeypatch.setattr(gpu.mode.device, "op", lambda name: getattr(torch.ops.moekv, name))
    with pytest.raises(AssertionError, match=f"got {{'{step}': "):
        end_to_end.items(gpu)["waits of the host"]()


def test_graphs_see_what_they_replay(gpu: rehearsal.Gpu) -> None:
    """A pretended graph computes anew from what its inputs hold, and refuses to wait."""
    x = torch.ones(3, device="cuda")
    got: list[torch.Tensor] = []
    replay = gpu.capture(lambda: got.append((x * 2)[1:].sum()))
    x.copy_(torch.tensor([5.0, 6.0, 7.0], device="cuda"))
    replay()
    assert float(got[0].cpu()) == 26
    for wait in (lambda: x.tolist(), lambda: x[x > 1], lambda: torch.tensor([1], device="cuda")):
        with pytest.raises(RuntimeError, match="waits for the device while a graph is captured"):
            gpu.capture(wait)
        assert gpu.count_waits(wait) == 1
    assert gpu.count_waits(lambda: (x.sum(), x.clone(), torch.zeros(3, device="cuda"))) == 0


# As if they were not installed, for whoever imports them and for whoever asks.
BLOCKED = """
import sys

for name in ("gguf", "kvpress", "matplotlib"):
    sys.modules[name] = None
"""
REHEARSAL = """
import dataclasses
import sys
from gpu_check import driver, machine
from gpu_check.driver import Step
from gpu_check.machine import Finding

machine.look = lambda: [Finding("GPU", "a pretended one, compute capability 9.0, 80 GB, driver 1")]
known = driver.STEPS | {"build": Step("nothing", "", 60, 60)}
known["d"] = dataclasses.replace(known["d"], module="some_tests")
# Each process imports torch and transformers, for seconds; here there are no cores for several.
known = {name: dataclasses.replace(step, workers=1) for name, step in known.items()}
arguments = ["--device", "rehearsal", "--out", sys.argv[1], "--patience", "20"]
sys.exit(driver.main(arguments, known))
"""


# Some files run, and all are collected where only torch, transformers, pytest and hypothesis are.
SOME_TESTS = """
import sys

for name in ("pybind11", "rich", "xdist"):
    sys.modules[name] = None

import pytest
from gpu_check import suite

ON_GPU = False

def collect_all():
    files = [*suite.FIRST, suite.ROOT / "tests" / "ops"]
    code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *map(str, files)])
    assert code == 0, code

def items(place):
    return dict(list(suite.items(place).items())[:3]) | {"all": collect_all}
"""


def test_the_whole_check_needs_no_more_than_it_says(kernels: ModuleType, tmp_path: Path) -> None:
    """All steps in their processes, without kvpress, a hub or an index; the GPU is pretended."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    (tmp_path / "nothing.py").write_text(
        "ON_GPU = False\ndef items(gpu):\n    return {'nothing': lambda: None}\n"
    )
    (tmp_path / "some_tests.py").write_text(SOME_TESTS)
    (tmp_path / "rehearse.py").write_text(REHEARSAL)
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{driver.ROOT / 'tools'}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "OMP_NUM_THREADS": "1",
    }
    script, out = tmp_path / "rehearse.py", tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(script), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = json.loads((out / "gpu-check.json").read_text())["steps"]
    assert list(steps) == ["machine", "build", *"abcdef"]
    statuses = {name: {x["status"] for x in step["lines"]} for name, step in steps.items()}
    assert all(statuses[name] == {"ok"} for name in "ac")
    assert statuses["b"] <= {"ok", "skipped"} and len(steps["b"]["lines"]) > len(timing.OPS)
    told = {x["item"]: x["status"] for x in steps["d"]["lines"]}
    # The pretended GPU is none to pytest: tests are there, and none of them says that it ran.
    assert told.pop("all") == "ok" and "tests/press/test_press_cuda.py" in told
    assert set(told.values()) <= {"ok", "skipped"}
    # Where the tools are, they would need a GPU.
    assert statuses["e"] | statuses["f"] <= {"ok", "skipped"}


# Two ops are enough to see that one fails and the other runs.
WRONG = """
import contextlib
import rehearsal
from gpu_check import smoke

items = smoke.items
chosen = ("mix_scores", "kv_compact_")
smoke.items = lambda gpu: {k: x for k, x in items(gpu).items() if k.startswith(chosen)}

class Gpu(rehearsal.Gpu):
    @contextlib.contextmanager
    def active(self):
        with super().active():
            device = self.mode.device
            right = device.kv_compact_

            def wrong(keys, *others, **options):
                right(keys, *others, **options)
                keys[0, 0, 0, 0] += 1

            device.kv_compact_ = wrong
            yield
"""


def test_a_wrong_kernel_fails_and_the_others_run(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, with processes: only the build is left out."""
    (tmp_path / "wrong_device.py").write_text(WRONG)
    (tmp_path / "nothing.py").write_text("def items(gpu):\n    return {'nothing': lambda: None}\n")
    found = [Finding("GPU", "a pretended one, compute capability 9.0, 80 GB, driver 1")]
    monkeypatch.setattr(machine, "look", lambda: found)
    for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "PYTHONUNBUFFERED", "GPU_CHECK_ARCHITECTURE"):
        monkeypatch.setenv(name, str(tmp_path))  # the driver sets them: so they are restored
    known = {"build": Step("nothing", "", 60, 60), "a": driver.STEPS["a"]}
    arguments = ["--device", "wrong_device", "--out", str(tmp_path), "--patience", "10"]
    assert driver.main(arguments, known) == 1
    lines = [x for x in (tmp_path / "gpu-check.md").read_text().splitlines() if "_compact_" in x]
    assert len(lines) == 1 and "FAILED" in lines[0]
    (line,) = [x for x in (tmp_path / "gpu-check.md").read_text().splitlines() if "mix_scores" in x]
    assert "| ok |" in line

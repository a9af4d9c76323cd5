"""gpu_check where there is no GPU: what comes of steps that go wrong, and of what is missing.

The steps themselves run in ``tests/simt/test_simt_gpu_check.py``.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_check import build, driver, machine, profile, sanitizer, seconds, timing
from gpu_check.driver import ROOT, Step
from gpu_check.gpu import Gpu
from gpu_check.machine import Finding
from gpu_check.worker import Place, Skip

DEVICE = """
import contextlib

class Gpu:
    def __init__(self, results):
        self.results = results
        self.well = True

    def active(self):
        return contextlib.nullcontext()

    def is_well(self):
        return self.well
"""
STEP = """
import os, signal, time
from gpu_check.worker import Place, Skip

def items(gpu):
    def wrong():
        raise AssertionError("expected 1, got 2 | 3")

    def error_of_the_device():
        gpu.well = False
        raise RuntimeError("an illegal memory access")

    def skip():
        raise Skip("not here")

    return {
        "right": lambda: {"us": 1234.5, "of": "61%"},
        "wrong": wrong,
        "hang": lambda: time.sleep(60),
        "behind a hang": lambda: {"process": os.getpid()},
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "exit": lambda: os._exit(3),
        "error of the device": error_of_the_device,
        "another process": lambda: {"process": os.getpid()},
        "skipped": skip,
    }
"""


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for modules of steps, beside a device that is none, on a machine that has it all."""
    folder = tmp_path / "steps"
    folder.mkdir()
    (folder / "no_device.py").write_text(DEVICE)
    (folder / "fine.py").write_text("def items(gpu):\n    return {'one': lambda: None}\n")
    found = [Finding("GPU", "a pretended one, compute capability 9.0, 80 GB, driver 1")]
    monkeypatch.setattr(machine, "look", lambda: found)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    for name in ("HF_HUB_OFFLINE", "PYTHONUNBUFFERED", "GPU_CHECK_ARCHITECTURE"):
        monkeypatch.setenv(name, "")  # the driver sets them: so they are restored
    return folder


def run(
    out: Path, known: dict[str, Step], *arguments: str
) -> tuple[int, dict[str, dict[str, Any]], str]:
    """What the driver makes of steps: its exit code, their lines by item, the Markdown."""
    known = {"build": Step("fine", "the libraries", 20, 20), **known}
    code = driver.main(["--device", "no_device", "--out", str(out), *arguments], known)
    told = json.loads((out / "gpu-check.json").read_text())["steps"]
    lines = {
        name: {x["item"]: x for x in step["lines"]} | {"": step["status"]}
        for name, step in told.items()
    }
    return code, lines, (out / "gpu-check.md").read_text()


def test_whatever_comes_of_an_item_the_others_run(steps: Path, tmp_path: Path) -> None:
    (steps / "faulty.py").write_text(STEP)
    known = {
        "a": Step("faulty", "all kinds of trouble", 50, 1.5),
        "b": Step("fine", "none", 20, 20),
    }
    code, lines, text = run(tmp_path / "out", known)
    assert code == 1
    assert {item: x["status"] for item, x in lines["a"].items() if item} == {
        "right": "ok",
        "wrong": "FAILED",
        "hang": "HANG",
        "behind a hang": "ok",
        "crash": "CRASHED",
        "exit": "CRASHED",
        "error of the device": "FAILED",
        "another process": "ok",
        "skipped": "skipped",
    }
    step = lines["a"]
    assert step["wrong"]["message"] == "AssertionError: expected 1, got 2 | 3"
    assert "SIGSEGV" in step["crash"]["message"] and "exit code 3" in step["exit"]["message"]
    assert step["hang"]["message"] == "ended after 2 s" and 1.5 < step["hang"]["seconds"] < 20
    assert step["behind a hang"]["data"] != step["another process"]["data"]
    assert (step[""], lines["b"][""]) == ("FAILED", "ok")
    assert "| right | 1,234 | 61% |" in text and r"expected 1, got 2 \| 3" in text


def test_a_step_whose_time_is_over_says_what_it_did_not_do(steps: Path, tmp_path: Path) -> None:
    (steps / "slow.py").write_text(
        "import time\n"
        "def items(gpu):\n"
        "    return {'first': lambda: None, 'long': lambda: time.sleep(60), 'last': lambda: None}\n"
    )
    known = {"a": Step("slow", "", 3, 60), "b": Step("fine", "", 20, 20)}
    code, lines, _ = run(tmp_path / "out", known)
    assert code == 1
    statuses = {item: x["status"] for item, x in lines["a"].items() if item}
    assert statuses == {"first": "ok", "long": "HANG", "last": "not run"}
    assert lines["b"][""] == "ok"


def test_a_process_that_cannot_be_killed_holds_nothing_up(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that the GPU's driver does not let go of."""
    (steps / "slow.py").write_text(
        "import time\n"
        "def items(gpu):\n"
        "    return {'long': lambda: time.sleep(60), 'last': lambda: None}\n"
    )
    left: set[int] = set()
    with monkeypatch.context() as patched:
        patched.setattr(driver.os, "killpg", lambda pid, _: left.add(pid))
        patched.setattr(driver, "KILL_SECONDS", 0.1)
        known = {"a": Step("slow", "", 20, 1), "b": Step("fine", "", 20, 20)}
        began = time.monotonic()
        code, lines, _ = run(tmp_path / "out", known)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    assert code == 1 and time.monotonic() - began < 50
    assert (lines["a"]["long"]["status"], lines["a"]["last"]["status"]) == ("HANG", "ok")
    assert lines["b"][""] == "ok"


def test_what_was_cut_short_has_not_passed(steps: Path, tmp_path: Path) -> None:
    (steps / "many.py").write_text(
        "import time\n"
        "def items(gpu):\n"
        "    return {str(i): lambda: time.sleep(0.01) for i in range(1000)}\n"
    )
    known = {"a": Step("many", "", 2, 60)}
    code, lines, _ = run(tmp_path / "out", known)
    assert code == 1
    assert lines["a"][""] in ("cut short", "FAILED") and lines["a"]["999"]["status"] == "not run"


def test_a_step_that_cannot_begin(steps: Path, tmp_path: Path) -> None:
    (steps / "broken.py").write_text("import a_package_that_is_missing\n")
    (steps / "endless.py").write_text(
        "import os\ndef items(gpu):\n    return {str(i): lambda: os._exit(1) for i in range(20)}\n"
    )
    known = {"a": Step("broken", "", 20, 20), "b": Step("endless", "", 60, 20)}
    code, lines, _ = run(tmp_path / "out", known)
    assert code == 1
    assert "No module named 'a_package_that_is_missing'" in lines["a"]["start"]["message"]
    statuses = [x["status"] for item, x in lines["b"].items() if item]
    assert statuses == ["CRASHED"] * 13 + ["not run"] * 7


def test_several_processes_share_the_items(steps: Path, tmp_path: Path) -> None:
    (steps / "shared.py").write_text(
        "import os\n"
        "def items(gpu):\n"
        "    return {str(i): lambda: {'process': os.getpid()} for i in range(7)}\n"
    )
    code, lines, _ = run(tmp_path / "out", {"a": Step("shared", "", 20, 20, workers=3)})
    assert code == 0
    processes = {x["data"]["process"] for item, x in lines["a"].items() if item}
    assert len(processes) == 3 and len(lines["a"]) == 8


def test_some_of_the_steps(steps: Path, tmp_path: Path, capsys: Any) -> None:
    known = {letter: Step("fine", letter, 20, 20) for letter in "abc"}
    code, lines, _ = run(tmp_path / "out", known, "--steps", "c,a")
    assert code == 0 and list(lines) == ["machine", "build", "c", "a"]
    with pytest.raises(SystemExit):
        run(tmp_path / "out", known, "--steps", "a,g")
    assert "expected steps among a, b, c, got g" in capsys.readouterr().err


def test_the_whole_takes_at_most_eight_minutes() -> None:
    assert list(driver.STEPS) == ["build", *"abcdef"]
    assert sum(step.limit for step in driver.STEPS.values()) <= 480
    assert all(step.item_limit <= step.limit for step in driver.STEPS.values())


def test_the_page_counts_what_the_whole_takes() -> None:
    page = (ROOT / "docs" / "cuda.md").read_text().split("## On a rented GPU")[1]
    table = dict(re.findall(r"^\| (build|[a-f]|together) \| (\d+) \|", page, re.M))
    limits = {name: step.limit for name, step in driver.STEPS.items()}
    assert {name: int(n) for name, n in table.items()} == limits | {
        "together": sum(limits.values())
    }
    recorded = seconds.read()
    few, many = (seconds.expected(recorded, cores) for cores in (2, 16))
    assert f"{many:.0f} s on 16 cores" in page and f"{few:.0f} s on two" in page
    assert f"--patience {few / limits['build'] + 1:.0f}" in page


def test_the_build_takes_two_minutes_on_16_cores() -> None:
    """By the record, of which no kernel file is left out."""
    recorded = seconds.read()
    kernels = {x.stem for x in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert kernels == {Path(x).stem for x in recorded if x.startswith("cuda/")} - {"torch_cuda"}
    assert max(recorded.values()) < seconds.expected(recorded, 16) < driver.STEPS["build"].limit
    assert seconds.expected({"a.o": 3, "b.o": 2, "c.o": 2, "lib.so": 1, "other.so": 2}, 2) == 6


def test_lower_bounds_are_those_that_are_measured_against(tmp_path: Path) -> None:
    """The page's table has the bytes that step b counts, and times that follow from them."""
    gpu = Gpu(tmp_path)
    gpu.device = torch.device("meta")
    timed = timing.make_ops(gpu, 4096)
    del timed["ragged_attention, a window"]  # as many as of one token
    page = (ROOT / "docs" / "cuda.md").read_text().split("## Lower bounds")[1].split("\n## ")[0]
    rows = [x.strip("| ").split(" | ") for x in page.splitlines() if x.startswith("| ")][1:]
    counts = {row[0]: float(row[1].replace(",", "")) for row in rows}
    read = counts.pop("as the kernels read them")
    assert read > 0 and sorted(counts.values()) == sorted(x.bytes_per_token for x in timed.values())
    for _, count, *cells in rows:
        for tokens, cell in zip((4096, 32768, 131072), cells, strict=True):
            for shown, bandwidth in zip(cell.split(" / "), (3e6, 2e6), strict=True):
                took = float(count.replace(",", "")) * tokens / bandwidth
                said = float(shown.replace(",", "").removeprefix("< "))
                assert abs(said - took) <= 0.07 + 0.05 * took, (count, tokens)


# --- What is there --------------------------------------------------------------------------------

H100 = "NVIDIA H100, 9.0, 81559 MiB, 580.65"


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with all that is needed, as far as anybody looks: its programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    torch = tmp_path / "torch"
    (torch / "lib").mkdir(parents=True)
    (torch / "lib" / "libtorch_cuda.so").touch()
    (torch / "version.py").write_text("__version__ = '2.13.0+cu130'\n")
    for name in ("c++", "cmake", "ninja"):
        program(programs / name, "true")
    program(programs / "nvcc", "echo Cuda compilation tools, release 13.0, V13.0.88")
    program(programs / "nvidia-smi", f'test "$1" = -L && echo GPU 0 || echo "{H100}"')
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(machine, "CUDA_FOLDER", tmp_path / "none")
    monkeypatch.setattr(machine, "find_torch", lambda: torch)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    monkeypatch.setattr(machine.sys, "executable", str(tmp_path / "none" / "python"))
    return tmp_path


def program(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)


def problems() -> dict[str, str]:
    return {x.part: x.problem for x in machine.look() if x.problem}


def test_a_machine_that_has_it_all(box: Path) -> None:
    assert problems() == {}
    found = machine.look()
    assert machine.architecture(found) == "90"
    assert {x.part for x in found} > {"GPU", "Python", "torch", "transformers", "nvcc", "c++"}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("GPU", lambda box: (box / "bin/nvidia-smi").unlink(), "no NVIDIA GPU is present"),
        (
            "GPU",
            lambda box: program(box / "bin/nvidia-smi", "exit 9"),
            "no NVIDIA GPU is present",
        ),
        (
            "GPU",
            lambda box: program(box / "bin/nvidia-smi", "echo V100, 7.0, 16 GB, 535"),
            "expected compute capability 8.0 or higher, got V100",
        ),
        ("nvcc", lambda box: (box / "bin/nvcc").unlink(), "not found, neither in CUDA_HOME"),
        ("nvcc", lambda box: program(box / "bin/nvcc", "exit 1"), "does not tell its release"),
        ("c++", lambda box: (box / "bin/c++").unlink(), "not found in the PATH"),
        ("ninja", lambda box: (box / "bin/ninja").unlink(), "not found in the PATH"),
        (
            "torch",
            lambda box: (box / "torch/version.py").write_text("__version__ = '2.9.1'"),
            "expected 2.10 or later, got 2.9.1",
        ),
        (
            "torch",
            lambda box: (box / "torch/lib/libtorch_cuda.so").unlink(),
            "expected a build with CUDA, got 2.13.0",
        ),
    ],
)
def test_what_is_missing_is_said(
    box: Path, capsys: Any, part: str, change: Any, message: str
) -> None:
    change(box)
    assert list(problems()) == [part]
    assert driver.main(["--out", str(box / "out")]) == 1
    assert f"gpu-check: {part}: " in (told := capsys.readouterr().err) and message in told
    assert message in (box / "out" / "gpu-check.md").read_text()


def test_only_some_steps_need_some_packages(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("transformers", "a-package-that-is-missing"))
    (missing,) = (x for x in machine.look() if x.problem)
    assert not missing.by_all and missing.of_index


@pytest.mark.parametrize(
    ("change", "answers", "installs"),
    [
        (lambda box: None, True, False),  # nothing is missing
        (lambda box: (box / "bin/ninja").unlink(), True, True),
        (lambda box: (box / "bin/ninja").unlink(), False, False),
        (lambda box: (box / "bin/nvidia-smi").unlink(), True, False),  # no index has a GPU
    ],
)
def test_it_installs_where_that_helps_and_an_index_answers(
    box: Path, monkeypatch: pytest.MonkeyPatch, change: Any, answers: bool, installs: bool
) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ())
    monkeypatch.setattr(machine, "index_answers", lambda: answers)
    change(box)
    assert (machine.main() == 0) == installs


def test_an_index_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at that port; it is said within seconds."""
    for name in [x for x in os.environ if x.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    start = time.monotonic()
    assert not machine.index_answers()
    assert time.monotonic() - start < 30


MAKE = """
case "$*" in
    *gpu_check.machine*) exit ANSWER ;;
    *) echo "RAN $*" ;;
esac
"""


@pytest.mark.parametrize(
    ("variables", "answer", "expected"),
    [
        ([], 1, ["RAN -m gpu_check"]),
        (["STEPS=a,b"], 1, ["RAN -m gpu_check --steps a,b"]),
        (["OFFLINE=1"], 0, ["RAN -m gpu_check"]),
        ([], 0, ["RAN -m venv .venv-cuda"]),
    ],
)
def test_make_gpu_check_takes_the_python_at_hand(
    tmp_path: Path, variables: list[str], answer: int, expected: list[str]
) -> None:
    """Unless something is missing and an index answers, which ``gpu_check.machine`` says."""
    program(tmp_path / "python", MAKE.replace("ANSWER", str(answer)))
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = subprocess.run(
        ["make", "gpu-check", f"PYTHON={tmp_path / 'python'}", *variables],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert [x for x in done.stdout.splitlines() if x.startswith("RAN")] == expected


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_it_says_at_once_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        ["make", "gpu-check", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert "gpu-check: GPU: no NVIDIA GPU is present" in done.stderr


# --- Steps that call other programs ---------------------------------------------------------------


def test_the_build_is_for_the_gpu_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be compiled, with which flags; nothing is."""
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setenv("GPU_CHECK_ARCHITECTURE", "90")
    cuda = tmp_path / "toolkit"
    for folder in ("bin", "include", "lib64"):
        (cuda / folder).mkdir(parents=True)
    (cuda / "include" / "cuda_runtime.h").touch()
    (cuda / "lib64" / "libcudart_static.a").touch()
    program(cuda / "bin" / "nvcc", f"echo '#$ TOP={cuda}' >&2")
    monkeypatch.setenv("CUDA_HOME", str(cuda))
    run_program = build._run

    def dry(*command: str) -> str:
        return run_program(*command, *(("--", "-n", "-v") if "--build" in command else ()))

    monkeypatch.setattr(build, "_run", dry)
    monkeypatch.setattr(build, "_seconds", list)
    printed: list[str] = []
    monkeypatch.setattr(build, "print", lambda text, **_: printed.append(text), raising=False)
    build._build()
    kernels = [x for x in printed[-1].splitlines() if f"{cuda}/bin/nvcc" in x]
    assert len(kernels) == len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert all("[compute_90,sm_90]" in x and "sm_80" not in x for x in kernels)
    assert "Werror" not in printed[-1]

    program(cuda / "bin" / "nvcc", "echo no such compiler >&2; exit 1")
    (tmp_path / "CMakeCache.txt").unlink()
    (cuda / "include" / "cuda_runtime.h").unlink()
    with pytest.raises(RuntimeError, match=r"(?s)MOEKV_CUDA=ON:.*has no cuda_runtime\.h"):
        build._build()


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
@pytest.mark.parametrize(
    ("summary", "wrong"), [("ERROR SUMMARY: 0 errors", False), ("SUMMARY: 2 hazards", True)]
)
def test_what_the_sanitizer_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, summary: str, wrong: bool
) -> None:
    done = '{\\"event\\": \\"done\\"}'
    program(
        tmp_path / "compute-sanitizer",
        'while [ "$1" != --lines ]; do shift; done',
        f'echo "{done}" > "$2"; echo "========= {summary}"',
    )
    monkeypatch.setattr(machine, "find_program", lambda name: str(tmp_path / name))
    run_tool = sanitizer.items(Place(tmp_path / "gpu-check.json", "no_device"))[tool]
    if wrong:
        with pytest.raises(AssertionError, match="SUMMARY: 2"):
            run_tool()
    else:
        run_tool()
    program(tmp_path / "compute-sanitizer", f"echo {summary}")
    with pytest.raises(AssertionError, match="finished: False"):
        run_tool()
    monkeypatch.setattr(machine, "find_program", lambda name: None)
    with pytest.raises(Skip, match="no compute-sanitizer"):
        run_tool()


TABLE = (
    '"ID","Kernel Name","gpu__time_duration.sum",'
    '"dram__throughput.avg.pct_of_peak_sustained_elapsed"\n'
    '"","","ns","%"\n'
    '"0","void moekv::small_kernel<float>(Params)","1,000","3.5"\n'
    '"1","void moekv::large_kernel<float>(Params)","64,000","71.25"'
)


def test_what_ncu_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_program", lambda name: str(tmp_path / name))
    place = Place(tmp_path / "gpu-check.json", "no_device")
    program(
        tmp_path / "ncu",
        'if [ "$1" = --import ]; then cat <<EOF',
        "==PROF== a line of ncu's own",
        TABLE,
        "EOF",
        'else while [ "$1" != -o ]; do shift; done; touch "$2"; fi',
    )
    told = profile._profile(place, "expert_scores, all four", 4096)
    assert told == {
        "kernel": "void moekv::large_kernel<float>",
        "µs": 64.0,
        "DRAM %": 71.25,
        "report": "expert_scores_all_four-4096.ncu-rep",
        "to decide": profile.QUESTIONS["expert_scores"],
    }
    for path in tmp_path.glob("*.ncu-rep"):
        path.unlink()
    program(tmp_path / "ncu", "echo ERR_NVGPUCTRPERM: no permission")
    with pytest.raises(Skip, match="may not read the GPU's counters"):
        profile._profile(place, "mix_scores", 4096)
    program(tmp_path / "ncu", "echo what is this")
    with pytest.raises(RuntimeError, match="ncu wrote no report: what is this"):
        profile._profile(place, "mix_scores", 4096)


def test_each_profile_has_something_to_decide() -> None:
    asked = {name: profile.question(name) for name in timing.OPS}
    assert set(asked.values()) == set(profile.QUESTIONS.values())
    assert asked["ragged_attention, a window"] != asked["ragged_attention, k8v4"]


def test_profiles_are_of_what_is_furthest_from_the_roofline(tmp_path: Path) -> None:
    results = tmp_path / "gpu-check.json"
    assert profile._slowest(results, 4096) == list(profile.EXPECTED)
    shares = {"mix_scores": "90%", "kv_compact_": "70%", "gating_topk": "9%", "select_kept": "31%"}
    lines = [{"item": f"{x} 4096", "data": {"of the roofline": y}} for x, y in shares.items()]
    lines.append({"item": "roofline", "data": {}})
    results.write_text(json.dumps({"steps": {"b": {"lines": lines}}}))
    assert profile._slowest(results, 4096) == ["gating_topk", "select_kept", "kv_compact_"]


def test_what_the_tests_report(tmp_path: Path) -> None:
    """In a process of its own: pytest within pytest shares what it imports."""
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "def test_cuda_right(): pass\n"
        "def test_cpu_wrong(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_cuda_elsewhere(): pass\n"
    )
    (tmp_path / "test_two.py").write_text("def test_cuda_wrong(): assert 1 == 2\n")
    (tmp_path / "test_three.py").write_text(
        "import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test_cuda_elsewhere(): pass\n"
    )
    script = (
        "from pathlib import Path; from gpu_check import suite\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "print('TOLD', suite._run(folder / 'test_one.py'))\n"
        "try: suite._run(folder / 'test_two.py')\n"
        "except AssertionError as error: print('TOLD', error)\n"
        "try: suite._run(folder / 'test_three.py')\n"
        "except suite.Skip as reason: print('TOLD', reason)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tools")},
        cwd=tmp_path,
        check=True,
    )
    told = [x for x in done.stdout.splitlines() if x.startswith("TOLD")]
    assert told[0] == "TOLD {'passed': 1, 'failed': 0, 'skipped': 1}"
    assert told[1].startswith("TOLD 1 failed: ") and "assert 1 == 2" in told[1]
    assert told[2] == "TOLD none of its 1 tests ran: Skipped: no GPU"


def test_an_archive_knows_its_commit(tmp_path: Path) -> None:
    """The machine with a GPU gets a tree without the repository."""
    known = machine.output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if known is None:
        pytest.skip("not a repository")
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "HEAD", "tools"], capture_output=True, check=True
    )
    subprocess.run(["tar", "x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    assert machine.commit_of(tmp_path) == known.strip()
    (tmp_path / "tools" / "gpu_check" / "commit.txt").unlink()
    assert machine.commit_of(tmp_path) == "unknown"


def test_programs_beside_nvcc_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CUDA_FOLDER", tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    for name in ("nvcc", "ncu"):
        program(tmp_path / name, "exit 0")
    assert machine.find_program("ncu") == str(tmp_path / "ncu")
    assert machine.find_program("compute-sanitizer") is None


def test_the_first_steps_do_not_wait_for_transformers() -> None:
    """Importing it takes longer than checking the ops; compute-sanitizer does it four times."""
    script = (
        "import sys; from gpu_check import gpu, machine, report, smoke, timing, worker\n"
        "print(sorted({'transformers', 'pytest'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}/tools:{ROOT}/tests/helpers:{ROOT}"},
        check=True,
    )
    assert done.stdout == "[]\n"

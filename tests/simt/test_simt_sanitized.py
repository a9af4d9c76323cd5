"""The simulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Their library must be loaded before all others, so they run in processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_kernels as built

HERE = Path(__file__).parent


def library() -> str:
    command = [built.COMPILER, "-print-file-name=libasan.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": library(),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python itself
        "MOEKV_SIMT_FLAVOUR": "sanitized",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.thorough
def test_all_ops_and_the_simulator_are_clean() -> None:
    # What runs in a few seconds, and nothing that is wrong on purpose.
    ops = "test_as_the_reference or misaligned or (ragged_attention and bfloat16 and not many)"
    machine = "not wrong and not race and not report"
    done = run_sanitized(
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        f"(test_simt_ops and ({ops})) or (test_simt_machine and {machine})",
        str(HERE / "test_simt_ops.py"),
        str(HERE / "test_simt_machine.py"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert " passed" in done.stdout


# Python takes seconds to start under a sanitizer: once, and then a process for each kernel.
SELFTEST = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
import simulated_kernels as built
module = built.load(built.build("sanitized", ops=False))
for name in sys.argv[2:]:
    if os.fork() == 0:
        told = os.open(Path(sys.argv[1]) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(told, 2)
        memory = module.Memory(4096)
        module.selftest(name, memory.address, 0)
        os.write(told, b"nothing to report")
        os._exit(0)
    os.wait()
"""

WRONG = {
    "read_overrun": r"heap-buffer-overflow",
    "write_overrun": r"heap-buffer-overflow",
    "dynamic_overrun": r"heap-buffer-overflow",
    "static_overrun": r"heap-buffer-overflow",
    "stream<false>": r"use-after-poison",
    "misaligned": r"misaligned address",
}
RIGHT = "stream<true>"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is said of each kernel."""
    folder = tmp_path_factory.mktemp("sanitized")
    done = run_sanitized("-c", SELFTEST, str(folder), *WRONG, RIGHT)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_reported(told: dict[str, str], name: str) -> None:
    assert "nothing to report" not in told[name]
    assert WRONG[name] in told[name]
    if name != "misaligned":  # that report comes from another sanitizer
        assert f"in kernel {name}, block (0, 0, 0), thread (" in told[name]


def test_right_kernels_are_not_reported(told: dict[str, str]) -> None:
    assert told[RIGHT] == "nothing to report"

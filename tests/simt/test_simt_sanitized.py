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


SELFTEST = """
import sys, simulated_kernels as built
module = built.load(built.build("sanitized", ops=False))
memory = module.Memory(4096)
module.selftest(sys.argv[1], memory.address, 0)
print("nothing to report")
"""

WRONG = {
    "read_overrun": r"heap-buffer-overflow",
    "write_overrun": r"heap-buffer-overflow",
    "dynamic_overrun": r"heap-buffer-overflow",
    "static_overrun": r"heap-buffer-overflow",
    "stream<false>": r"use-after-poison",
    "misaligned": r"misaligned address",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_reported(name: str) -> None:
    script = f"import sys; sys.path.insert(0, {str(HERE)!r}){SELFTEST}"
    done = run_sanitized("-c", script, name)
    assert done.returncode != 0, done.stdout
    assert WRONG[name] in done.stderr
    if name != "misaligned":  # that report comes from another sanitizer
        assert f"in kernel {name}, block (0, 0, 0), thread (" in done.stderr


def test_right_kernels_are_not_reported() -> None:
    script = f"import sys; sys.path.insert(0, {str(HERE)!r}){SELFTEST}"
    done = run_sanitized("-c", script, "stream<true>")
    assert (done.returncode, done.stdout) == (0, "nothing to report\n"), done.stderr

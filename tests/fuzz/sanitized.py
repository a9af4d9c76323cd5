"""The CPU kernels under the compiler's sanitizers: what they touch, overflow, and share.

With AddressSanitizer and UndefinedBehaviorSanitizer the fuzzer of the ops runs on a library of its
own, on every instruction set; with ThreadSanitizer every kernel on four threads, without torch,
whose pool of threads the sanitizer cannot see through. Both are built below ``build/sanitized``, by
GCC. As a script, after ``make install``::

    python tests/fuzz/sanitized.py address --cases 5000 --seed 0
    python tests/fuzz/sanitized.py thread

What a sanitizer finds ends the process, with its report and an exit code other than 0.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"


def build(sanitizers: str, target: str) -> Path:
    """Build one target with these sanitizers; return the build's folder."""
    folder = BUILD / sanitizers.replace(",", "-")
    # Half the size of a release's code, and the inlining that intrinsics need.
    options = [f"-DMOEKV_SANITIZE={sanitizers}", "-DMOEKV_CUDA=OFF", "-DCMAKE_BUILD_TYPE=None"]
    options += ["-DCMAKE_CXX_FLAGS=-O1", f"-DPython_EXECUTABLE={sys.executable}"]
    options += [f"-DMOEKV_OUTPUT_DIR={folder / 'package' / 'moekv' / 'lib'}"]
    tools = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": os.pathsep.join([tools, os.environ.get("PATH", "")])}
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options]
    subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
    make = ["cmake", "--build", str(folder), "--target", target]
    subprocess.run(make, check=True, env=environment)
    return folder


def address(arguments: list[str]) -> int:
    """Run the fuzzer on a package that is this one but for its library."""
    package = build("address,undefined", "moekv_cpu") / "package"
    for item in (ROOT / "moekv").iterdir():
        link = package / "moekv" / item.name
        if item.name != "lib" and not link.is_symlink():
            link.symlink_to(item)
    # Before anything else; and the library whose exceptions it watches, which Python does not load.
    first = [_library(name) for name in ("libasan.so", "libstdc++.so")]
    environment = os.environ | {
        "PYTHONPATH": str(package),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LD_PRELOAD": " ".join(first),
        # Python's own memory is never given back.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    fuzzer = [sys.executable, str(ROOT / "tests" / "fuzz" / "op_fuzz.py"), *arguments]
    return subprocess.run(fuzzer, env=environment, check=False).returncode


def _library(name: str) -> str:
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def thread(arguments: list[str]) -> int:
    """Run every kernel on several threads."""
    program = build("thread", "moekv_threads") / "benchmarks" / "cpp" / "moekv_threads"
    return subprocess.run([str(program), *arguments], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sanitizer", choices=["address", "thread"])
    kind, rest = parser.parse_known_args()
    return {"address": address, "thread": thread}[kind.sanitizer](rest)


if __name__ == "__main__":
    sys.exit(main())

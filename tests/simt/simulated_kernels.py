"""Builds the simulated kernels, as a module for each flavour, with or without seeded bugs.

Objects are kept by a hash of everything that they are made of, so that only what has changed is
compiled. All seeded bugs are in one module, each behind a switch.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / ".cache" / "simt"
COMPILER = os.environ.get("CXX", "g++")

HAS_FMA = bool(re.search(r"^flags\s*:.*\bfma\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE))

# What compiles each flavour's kernels, and everything in it. "watched": the compiler calls the
# simulator before every access, and its checks of alignment and bounds end there, too.
KERNEL_FLAGS = {
    "watched": [
        "-O1",  # compiles in two thirds of the time; what runs is the simulator
        "-fsanitize=thread,alignment,bounds,signed-integer-overflow",
        # nvcc contracts products and sums as well.
        "-ffp-contract=fast",
        "-fexpensive-optimizations",  # where that is done
        *(["-mfma"] if HAS_FMA else []),
        "--param=tsan-distinguish-volatile=1",
        "--param=tsan-instrument-func-entry-exit=0",
        # What a thread has not written is no zero, and no number that somebody left there.
        "-ftrivial-auto-var-init=pattern",
        # One access in the source stays one access.
        "-fno-tree-vectorize",
        "-fno-store-merging",
    ],
    "sanitized": [],
}
FLAGS = {
    "watched": [],
    # -O1 compiles in half the time, and as much is seen.
    "sanitized": ["-O1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"],
}
COMMON_FLAGS = [
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-fno-sanitize-recover=all",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DMOEKV_SIMT",
    "-DMOEKV_CUDA",
    "-DMOEKV_BACKEND=cuda",
    f"-I{HERE}",
]

# Of the bindings: nothing of them takes time but to compile.
PYTHON_FLAGS = [
    "-O0",
    "-g0",
    f"-I{pybind11.get_include()}",
    f"-I{sysconfig.get_paths()['include']}",
]


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces the ``nth`` occurrence of ``old`` in a file of csrc/cuda.

    In ``new``, ``SEEDED`` is true while ``module.seed(n)`` has this edit switched on, the n-th of
    those that the module was built with, from 1.
    """

    file: str
    old: str
    new: str
    nth: int = 0


def apply(edits: Sequence[Edit], file: str, text: str) -> str:
    """Return a file's text with its edits, which all tell their places in the original."""
    spans = []
    for number, edit in enumerate(edits, start=1):
        if edit.file != file:
            continue
        places = [match.start() for match in re.finditer(re.escape(edit.old), text)]
        if len(places) <= edit.nth:
            raise ValueError(
                f"expected {edit.nth + 1} of {edit.old!r} in {file}, got {len(places)}"
            )
        begin = places[edit.nth]
        spans.append((begin, begin + len(edit.old), number, edit))
    for begin, end, number, edit in sorted(spans, key=lambda span: span[:2], reverse=True):
        if end > len(text) or text[begin:end] != edit.old:
            raise ValueError(f"expected edits of {file} that do not overlap, got {edit}")
        text = text[:begin] + edit.new.replace("SEEDED", f"::simt::seeded({number})") + text[end:]
    return text


def run(command: list[str]) -> None:
    """Run a compiler, whose complaints become the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Let others that would build the same wait for it: tests run in several processes."""
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def put(target: Path, text: str) -> None:
    """Write a file whole or not at all: another process may be compiling it."""
    if not target.exists() or target.read_text() != text:
        part = target.with_name(f"{target.name}.{os.getpid()}")
        part.write_text(text)
        part.rename(target)


@cache
def _headers(*folders: Path) -> str:
    headers = [path for folder in folders for path in sorted(folder.glob("*.h"))]
    return "".join(path.read_text() for path in headers)


def compile_object(source: Path, flags: list[str]) -> Path:
    """Compile a source file, or find that it has been, and return the object."""
    text = source.read_text()
    headers = (HERE / "simt.h").read_text() + _headers(CUDA.parent, CUDA)
    if source.parent == HERE:
        headers = _headers(CUDA.parent, HERE)
    key = hashlib.sha256("\0".join([COMPILER, *flags, headers, text]).encode()).hexdigest()
    target = CACHE / f"{source.stem}-{key[:20]}.o"
    with alone(target):
        if not target.exists():
            part = target.with_suffix(".part")
            language = ["-x", "c++"] if source.suffix == ".cu" else []
            run([COMPILER, *COMMON_FLAGS, *flags, *language, "-c", str(source), "-o", str(part)])
            part.rename(target)
    return target


def build(flavour: str = "watched", edits: Sequence[Edit] = (), *, ops: bool = True) -> Path:
    """Build the module of ``flavour`` with ``edits`` and return its path.

    Without ``ops`` it is the simulator with its own kernels, which compile in seconds.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    kernels = sorted(CUDA.glob("*.cu")) if ops else []
    flags = FLAGS[flavour]
    kernel_flags = [*flags, *KERNEL_FLAGS[flavour]]
    python = [*PYTHON_FLAGS, *([] if ops else ["-DMOEKV_SIMT_WITHOUT_OPS"])]
    jobs = [(HERE / "machine.cpp", flags), (HERE / "memory.cpp", flags)]
    jobs.append((HERE / "bindings.cpp", python))
    jobs.append((HERE / "selftest.cu", kernel_flags))
    if edits:
        # Edited copies of all that may be edited: headers are found beside the kernels.
        changed = {edit.file for edit in edits}
        key = hashlib.sha256(
            (repr(list(edits)) + _headers(CUDA.parent, CUDA)).encode()
        ).hexdigest()[:20]
        folder = CACHE / f"edited-{key}" / "csrc" / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*CUDA.iterdir(), *CUDA.parent.glob("*.h")]:
            text = apply(edits, path.name, path.read_text())
            target = folder / path.name if path.parent == CUDA else folder.parent / path.name
            put(target, text)
        headers_changed = any(name.endswith(".h") for name in changed)
        for path in kernels:
            edited = headers_changed or path.name in changed
            # The headers are part of the key of an object, so an edited one must be seen in it.
            mark = [f"-DMOEKV_EDITED={int(key[:8], 16)}"] if edited else []
            jobs.append((folder / path.name if edited else path, [*kernel_flags, *mark]))
    else:
        jobs += [(path, kernel_flags) for path in kernels]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_object(*job), jobs))
    return link(flavour, objects)


def link(flavour: str, objects: Sequence[Path]) -> Path:
    """Link a module of what has been compiled, and return its path."""
    names = " ".join(path.name for path in objects)
    key = hashlib.sha256(names.encode()).hexdigest()[:20]
    module = CACHE / f"simt_kernels-{flavour}-{key}.so"
    with alone(module):
        if not module.exists():
            part = module.with_suffix(".part")
            flags = FLAGS.get(flavour, [])
            run([COMPILER, "-shared", *flags, *map(str, objects), "-o", str(part)])
            part.rename(module)
    return module


def load(path: Path) -> ModuleType:
    """Import a built module; several may be loaded at once."""
    # pybind11 keeps modules by name: each needs its own.
    name = f"{path.stem}.simt_kernels"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    for flavour in sys.argv[1:] or FLAGS:
        print(build(flavour))

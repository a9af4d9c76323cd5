"""The real half of ``csrc/cuda/device.h``: the kernels as nvcc compiles them, with no GPU below.

``stub_cudart.cpp`` stands for the CUDA runtime. What the host asks for is checked: launches, the
opt-in to much shared memory, streams. Nothing runs on a device that is not there.
"""

import hashlib
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import simulated_kernels as built
from gpu_check import machine
from simulated_kernels import Edit

NVCC = machine.find_nvcc()
# PTX is all that is asked of the compiler: registers, and whether they suffice, are for cuda-check.
FLAGS = ["-std=c++20", "-arch=compute_80", "-code=compute_80", "-Xcicc", "-O0", "-DNDEBUG"]
FLAGS += ["-DMOEKV_BACKEND=cuda", "-Xcompiler=-fno-strict-aliasing,-fPIC"]


def limits_of(ptx: str) -> dict[str, tuple[int, int]]:
    """Return threads and bytes of static shared memory of each kernel's blocks, by mangled name."""
    limits = {}
    for entry in re.split(r"\.entry\s+", ptx)[1:]:
        name = entry.split("(")[0].strip()
        threads = re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+),\s*(\d+))?", entry)
        count = 1
        for size in threads.groups("1") if threads else ["0"]:
            count *= int(size)
        shared = [int(x) for x in re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\];", entry)]
        limits[name] = (count, sum((x + 15) // 16 * 16 for x in shared))
    return limits


def _key(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join([str(NVCC), *FLAGS, *texts]).encode()).hexdigest()[:20]


def _compile(source: Path, key: str) -> tuple[Path, Path]:
    """Return a kernel file's object and its PTX."""
    assert NVCC
    target = built.CACHE / f"{source.stem}-{key}.o"
    ptx = target.with_suffix(".ptx")
    with built.alone(target):
        if not target.exists():
            part = target.with_suffix(".part")
            with tempfile.TemporaryDirectory() as kept:
                keep = ["--keep", "--keep-dir", kept]
                built.run([NVCC, *FLAGS, *keep, "-c", str(source), "-o", str(part)])
                ptx.write_text((Path(kept) / f"{source.stem}.ptx").read_text())
            part.rename(target)
    return target, ptx


def _compile_all(edits: Sequence[Edit], names: Sequence[str]) -> list[tuple[Path, Path]]:
    texts = {
        path: built.apply(edits, path.name, path.read_text())
        for path in sorted([*built.CUDA.iterdir(), *built.CUDA.parent.glob("*.h")])
    }
    key = _key(list(texts.values()))
    folder = built.CACHE / f"host-{key}" / "csrc" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        target = (folder if path.parent == built.CUDA else folder.parent) / path.name
        built.put(target, text)
    headers = [text for path, text in texts.items() if path.suffix == ".h"]

    def compile_one(name: str) -> tuple[Path, Path]:
        return _compile(folder / f"{name}.cu", _key([*headers, texts[built.CUDA / f"{name}.cu"]]))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, names))


def build(edits: Sequence[Edit] = (), *, edited: str = "") -> ModuleType:
    """Build and load the host's half of all kernels; file ``edited`` sees ``edits``."""
    built.CACHE.mkdir(parents=True, exist_ok=True)
    names = sorted(path.stem for path in built.CUDA.glob("*.cu"))
    compiled = _compile_all([], [x for x in names if x != edited])
    compiled += _compile_all(edits, [x for x in names if x == edited])
    own = ("machine.cpp", "memory.cpp", "stub_cudart.cpp")
    objects = [built.compile_object(built.HERE / x, []) for x in own]
    python = [*built.PYTHON_FLAGS, "-DMOEKV_SIMT_HOST"]
    objects.append(built.compile_object(built.HERE / "bindings.cpp", python))
    objects += [x for x, _ in compiled]
    module = built.load(built.link("host", objects))
    for _, ptx in compiled:
        for name, limit in limits_of(ptx.read_text()).items():
            module.set_limits(name, *limit)
    return module

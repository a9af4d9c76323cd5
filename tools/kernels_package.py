"""The ops as a package that Hugging Face's ``kernels`` loads, in ``dist/kernels``.

::

    python tools/kernels_package.py [--libraries FOLDER] [--out FOLDER]

One folder for CPUs, and one for CUDA where its library has been built: ``kernels`` chooses by name.
Both are for PyTorch's stable ABI, so one build serves every release from TORCH_ABI on. Each holds
the libraries as they are, what tells of them, and a module whose functions are the ops.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ROOT / "moekv" / "lib"
TORCH_ABI = "210"
VERSION = 1  # of the ops: another one when a signature changes
NAME = "moekv"

MODULE = '''"""The ops of moekv, without the rest of it: docs/operators.md tells what they do."""

from pathlib import Path

import torch

# Whoever has imported moekv has them already.
if not hasattr(torch.ops.moekv, "select_kept"):
    for name in {names!r}:
        torch.ops.load_library(str(Path(__file__).with_name(name)))


def __getattr__(name):
    return getattr(torch.ops.moekv, name)
'''


def cuda_version() -> str:
    """Return the release of nvcc, as variants are named by it: 130 for 13.0."""
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", told)
    if match is None:
        raise ValueError(f"expected a release of nvcc, got {told!r}")
    return match[1] + match[2]


def architectures(library: Path) -> list[str]:
    """Return what a CUDA library was compiled for, as ``kernels`` reads it: 8.0+PTX, 8.6, ..."""
    marker = re.search(rb"moekv-cuda-architectures=([\d ]+)\+PTX", library.read_bytes())
    if marker is None:
        raise ValueError(f"expected a CUDA library that names its architectures, got {library}")
    numbers = [f"{x[:-1]}.{x[-1]}" for x in marker[1].decode().split()]
    # PTX is that of the first and the last, see cmake/cuda.cmake.
    return [x + "+PTX" * (x in (numbers[0], numbers[-1])) for x in numbers]


def write(folder: Path, libraries: list[Path], backend: dict[str, object]) -> None:
    """Write one variant."""
    folder.mkdir(parents=True)
    for library in libraries:
        shutil.copy(library, folder)
    (folder / "__init__.py").write_text(MODULE.format(names=[x.name for x in libraries]))
    told = {
        "id": f"_{NAME}_{backend['type']}_{VERSION}",
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
    }
    (folder / "metadata.json").write_text(json.dumps(told, indent=2) + "\n")


def build(libraries: Path, out: Path, cuda: str | None) -> list[Path]:
    """Write all variants to ``out`` and return their folders. ``cuda``: the release, or None."""
    shutil.rmtree(out, ignore_errors=True)
    machine = f"{platform.machine()}-{platform.system().lower()}"
    cpu = libraries / "libmoekv_cpu.so"
    variants: dict[str, tuple[list[Path], dict[str, object]]] = {"cpu": ([cpu], {"type": "cpu"})}
    if cuda is not None:
        both = [cpu, libraries / "libmoekv_cuda.so"]
        # The release of CUDA is in the folder's name: the format has no other place for it.
        variants[f"cu{cuda}"] = (both, {"type": "cuda", "archs": architectures(both[1])})
    folders = []
    for name, (files, backend) in variants.items():
        folders.append(out / "build" / f"torch-stable-abi{TORCH_ABI}-{name}-{machine}")
        write(folders[-1], files, backend)
    return folders


def main() -> None:
    """Write the package."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--libraries", type=Path, default=LIBRARIES)
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "kernels")
    arguments = parser.parse_args()
    if not (arguments.libraries / "libmoekv_cpu.so").exists():
        sys.exit(f"expected libmoekv_cpu.so in {arguments.libraries}: `make install` builds it")
    has_cuda = (arguments.libraries / "libmoekv_cuda.so").exists()
    for folder in build(arguments.libraries, arguments.out, cuda_version() if has_cuda else None):
        print(f"wrote {folder}")


if __name__ == "__main__":
    main()

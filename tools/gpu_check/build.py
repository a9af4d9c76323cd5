"""The libraries, for the GPU that is there, without pip; and a first look at torch beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_check import machine, seconds
from gpu_check.driver import ROOT

if TYPE_CHECKING:
    from gpu_check.worker import Items, Place

ON_GPU = False
FOLDER = ROOT / "build" / "gpu"
# Reads from the disk what all processes of the later steps will import.
IMPORT = (
    "import torch, transformers; x = torch.ones(3, device='cuda'); x.sum().item(); "
    "print(torch.cuda.get_device_name(), 'with torch', torch.__version__, "
    "'transformers', transformers.__version__)"
)


def items(place: Place) -> Items:
    """Return a build and, for a second process, torch's own first steps."""
    return {"libraries": _build, "torch on the GPU": _import}


def _build() -> dict[str, Any]:
    configure(FOLDER, os.environ["GPU_CHECK_ARCHITECTURE"])
    _run(str(machine.find_program("cmake")), "--build", str(FOLDER))
    took = ", ".join(f"{name} {s:.0f} s" for name, s in _seconds()[:6])
    cores = len(os.sched_getaffinity(0))
    recorded = seconds.expected(seconds.read(), cores)
    return {"told": f"{took}; by the record {recorded:.0f} s on {cores} cores"}


def configure(folder: Path, architecture: str, *options: str) -> None:
    """Prepare a build with the Python at hand."""
    ninja = machine.find_program("ninja")
    _run(
        *(str(machine.find_program("cmake")), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DMOEKV_CUDA=ON",
        f"-DMOEKV_NVCC={machine.find_nvcc()}",
        f"-DMOEKV_CUDA_ARCHITECTURES={architecture}",
        f"-DMOEKV_TORCH_DIR={machine.find_torch()}",
        "-DMOEKV_WERROR=OFF",  # another compiler's new warning is not worth the minutes
        *options,
    )


def _import() -> dict[str, Any]:
    return {"told": _run(sys.executable, "-c", IMPORT).strip().splitlines()[-1]}


def _run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-1500:].strip()}")
    return done.stdout


def _seconds() -> list[tuple[str, float]]:
    """Return each target and its seconds, the longest first, of ninja's log."""
    lines = (FOLDER / ".ninja_log").read_text().splitlines()[1:]
    took = {}
    for begin, end, _, target, *_ in (line.split("\t") for line in lines):
        took[target.rsplit("/", 1)[-1]] = (int(end) - int(begin)) / 1e3
    return sorted(took.items(), key=lambda item: -item[1])

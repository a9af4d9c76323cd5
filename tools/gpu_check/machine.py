"""What is on the machine, and what is missing. Imports nothing that may be missing itself."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PYTHON_FLOOR, TORCH_FLOOR = (3, 10), (2, 10)
PACKAGES = ("transformers", "pytest", "hypothesis")  # of some steps
CUDA_FOLDER = Path("/usr/local/cuda/bin")


@dataclasses.dataclass
class Finding:
    """A part of the machine: what was found, or why that will not do."""

    part: str
    found: str = ""
    problem: str = ""
    of_index: bool = False  # a package index could mend it
    by_all: bool = True  # needed by every step


def look() -> list[Finding]:
    """Look for all that the steps need."""
    packages = [_package(name) for name in PACKAGES]
    programs = map(_program, ("c++", "cmake", "ninja"))
    return [_gpu(), _python(), _torch(), *packages, _nvcc(), *programs]


def architecture(findings: list[Finding]) -> str:
    """Return the GPU's compute capability as nvcc names it: 90 for 9.0."""
    (gpu,) = (x for x in findings if x.part == "GPU")
    match = re.search(r"compute capability (\d+)\.(\d+)", gpu.found)
    if match is None:
        raise ValueError(f"expected a GPU with a compute capability, got {gpu.found!r}")
    return match[1] + match[2]


def find_program(name: str) -> str | None:
    """Return the path of a program: that of this interpreter first, one beside nvcc last."""
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    folders.append(os.environ.get("PATH", ""))
    if nvcc := find_nvcc():
        folders.append(str(Path(nvcc).parent))
    return shutil.which(name, path=os.pathsep.join(folders))


def find_nvcc() -> str | None:
    """Return nvcc: of CUDA_HOME, of the PATH, of the usual folder, or of PyPI's packages."""
    home = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*/bin"))
    folders = [*map(str, home), os.environ.get("PATH", ""), str(CUDA_FOLDER), *map(str, packages)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def commit_of(root: Path) -> str:
    """Return the commit of a tree: as git knows it, or as ``git archive`` has written it there."""
    known = output_of("git", "-C", str(root), "describe", "--always", "--dirty=+")
    file = root / "tools" / "gpu_check" / "commit.txt"
    archived = file.read_text().strip() if file.exists() else ""
    return known or ("unknown" if archived.startswith("$") else archived) or "unknown"


def find_torch() -> Path | None:
    """Return the folder of the torch that this interpreter would import."""
    spec = importlib.util.find_spec("torch")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def output_of(*command: str) -> str | None:
    """Return what a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpu() -> Finding:
    listed = output_of("nvidia-smi", "-L")
    if not listed:
        return Finding("GPU", problem="no NVIDIA GPU is present (nvidia-smi -L finds none)")
    query = "name,compute_cap,memory.total,driver_version"
    line = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    fields = [x.strip() for x in (line or "").splitlines()[:1] for x in x.split(",")]
    if len(fields) != 4 or not re.fullmatch(r"\d+\.\d+", fields[1]):
        return Finding("GPU", problem=f"expected {query} of nvidia-smi, got {line!r}")
    name, capability, memory, driver = fields
    found = f"{name}, compute capability {capability}, {memory}, driver {driver}"
    if int(capability.split(".")[0]) < 8:
        return Finding("GPU", problem=f"expected compute capability 8.0 or higher, got {found}")
    return Finding("GPU", found)


def _python() -> Finding:
    found = f"{sys.version.split()[0]}, {sys.executable}"
    if sys.version_info < PYTHON_FLOOR:
        return Finding("Python", problem=f"expected 3.10 or later, got {found}")
    return Finding("Python", found)


def _torch() -> Finding:
    folder = find_torch()
    if folder is None:
        return Finding("torch", problem=f"{sys.executable} has none", of_index=True)
    told = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    version = told[1] if told else "unknown"
    numbers = tuple(int(x) for x in re.findall(r"\d+", version)[:2])
    if numbers < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        problem = f"expected {floor} or later, got {version} in {folder}"
        return Finding("torch", problem=problem, of_index=True)
    if not (folder / "lib" / "libtorch_cuda.so").exists():
        problem = f"expected a build with CUDA, got {version} in {folder}"
        return Finding("torch", problem=problem, of_index=True)
    return Finding("torch", f"{version} in {folder}")


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, problem=f"{sys.executable} has none", of_index=True, by_all=False)


def _nvcc() -> Finding:
    nvcc = find_nvcc()
    if nvcc is None:
        problem = "not found, neither in CUDA_HOME, nor in the PATH, nor in " + str(CUDA_FOLDER)
        return Finding("nvcc", problem=problem, of_index=True)
    version = re.search(r"release ([\d.]+)", output_of(nvcc, "--version") or "")
    if version is None:
        return Finding("nvcc", problem=f"{nvcc} --version does not tell its release")
    return Finding("nvcc", f"{version[1]}, {nvcc}")


def _program(name: str) -> Finding:
    found = find_program(name)
    if found is None:
        mendable = name in ("cmake", "ninja")
        return Finding(name, problem="not found in the PATH", of_index=mendable)
    return Finding(name, found)


def index_answers() -> bool:
    """Say whether pip finds a package where it is configured to look."""
    pip = (sys.executable, "-m", "pip", "--retries", "0", "--timeout", "5")
    install = ("install", "--dry-run", "--ignore-installed", "--no-deps", "packaging")
    return output_of(*pip, *install) is not None


def main() -> int:
    """Exit with 0 if what is missing, if anything, is for a package index to bring."""
    missing = [x for x in look() if x.problem]
    return 0 if missing and all(x.of_index for x in missing) and index_answers() else 1


if __name__ == "__main__":
    sys.exit(main())

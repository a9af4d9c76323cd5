"""Drives CMake over csrc/; the rest of the package is described in pyproject.toml.

Environment: ``MOEKV_CUDA=AUTO|ON|OFF`` chooses whether the CUDA library is built (AUTO: with nvcc,
for a torch with CUDA); ``TORCH_CUDA_ARCH_LIST`` (``"8.0;9.0"``) for which GPUs; ``MOEKV_WERROR=ON``
makes warnings errors; ``CXX`` is the compiler; ``CMAKE_ARGS`` is handed to CMake;
``CMAKE_BUILD_PARALLEL_LEVEL`` limits the jobs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from build_backend import TORCH_FLOOR, architectures, check_compiler, find_torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent


def find_program(name: str) -> str:
    """Return the path of a build tool, that of this environment first."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    if found := shutil.which(name, path=path):
        return found
    raise SetupError(f"building moekv needs {name}: pip install {name}")


class BuildNative(build_ext):
    """Configures and builds the shared libraries into ``moekv/lib``."""

    def run(self) -> None:
        """Configure and build."""
        cuda = os.environ.get("MOEKV_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SetupError(f"MOEKV_CUDA: expected AUTO, ON or OFF, got {cuda!r}")
        torch = find_torch()
        if torch is None:
            raise SetupError(f"building moekv needs torch>={TORCH_FLOOR}: pip install torch")
        check_compiler()

        cmake, ninja = find_program("cmake"), find_program("ninja")
        # Editable installs are given a new temporary folder each time: that would keep nothing.
        build = ROOT / "build" / "editable" if self.inplace else Path(self.build_temp).resolve()
        # Objects are kept, the rest is made anew: no setting and no library of an earlier
        # configuration (with CUDA, in another environment) may survive into this one.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        # What is there stays until the new libraries are whole.
        output = self._output_dir()
        fresh, stale = output.with_name("lib.new"), output.with_name("lib.old")
        for folder in (fresh, stale):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            self._build(cmake, ninja, build, cuda, torch, fresh)
            if output.exists():
                output.rename(stale)
            fresh.rename(output)
        finally:
            for folder in (fresh, stale):
                shutil.rmtree(folder, ignore_errors=True)

    def _build(
        self, cmake: str, ninja: str, build: Path, cuda: str, torch: Path, output: Path
    ) -> None:
        subprocess.run(
            [
                cmake,
                *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DMOEKV_CUDA={cuda}",
                f"-DMOEKV_WERROR={os.environ.get('MOEKV_WERROR') or 'OFF'}",
                *architectures(),
                f"-DMOEKV_TORCH_DIR={torch}",
                f"-DMOEKV_OUTPUT_DIR={output}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            check=True,
        )
        subprocess.run([cmake, "--build", str(build)], check=True)

    def _output_dir(self) -> Path:
        root = ROOT if self.inplace else Path(self.build_lib).resolve()
        return root / "moekv" / "lib"

    def get_source_files(self) -> list[str]:
        """Leave the sources to MANIFEST.in."""
        return []

    def get_outputs(self) -> list[str]:
        """Return the libraries that belong into the wheel."""
        return [] if self.inplace else [str(path) for path in self._output_dir().glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        """Map nothing: an editable install builds in place."""
        return {}


class WheelForAnyPython(bdist_wheel):
    """The libraries use LibTorch's stable ABI and no Python.h: any Python 3 loads them."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of the platform alone."""
        return "py3", "none", super().get_tag()[2]


setup(
    # Makes this a package with binaries; BuildNative.run decides what is built.
    ext_modules=[Extension("moekv.lib.native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelForAnyPython},
)

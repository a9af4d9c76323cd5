"""The PEP 517 backend: setuptools, plus torch where the build would find none.

The native library needs the headers of LibTorch >= 2.10 and, its ABI being stable, runs with every
later release. An isolated build therefore uses the torch of the environment that moekv is installed
into, and asks for one of its own only where that has none.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.version import Version
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)
from setuptools.errors import SetupError

TORCH_FLOOR = "2.10"

_PROBE = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
if spec and spec.submodule_search_locations:
    print(json.dumps([spec.submodule_search_locations[0], importlib.metadata.version("torch")]))
"""


def find_torch() -> Path | None:
    """Return the folder of a torch that is new enough, or None.

    Looks into the build environment and then, with ``-E``, past the PYTHONPATH by which pip lays
    an isolated build environment over that of the interpreter.
    """
    for flags in ([], ["-E"]):
        probe = subprocess.run(
            [sys.executable, *flags, "-c", _PROBE], capture_output=True, text=True, check=False
        )
        if probe.returncode == 0 and probe.stdout.strip():
            folder, version = json.loads(probe.stdout)
            if Version(version) >= Version(TORCH_FLOOR):
                return Path(folder)
    return None


def check_compiler() -> None:
    """Raise unless there is a C++ compiler, which CMake would miss in many lines."""
    wanted = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in wanted):
        raise SetupError(
            f"building moekv needs a C++20 compiler, got none ({', '.join(wanted)}): install "
            "g++ 11 or clang++ 16, or later, or name one by CXX"
        )


def architectures() -> list[str]:
    """Return CMake's choice of GPUs by ``TORCH_CUDA_ARCH_LIST``: none where nobody asked."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    found = [re.fullmatch(r"(\d+)\.(\d[a-z]?)(\+PTX)?", each) for each in asked]
    if not all(found):
        raise SetupError(
            "TORCH_CUDA_ARCH_LIST: expected compute capabilities such as 8.0;9.0+PTX, got "
            f"{os.environ['TORCH_CUDA_ARCH_LIST']!r}"
        )
    numbers = {match[1] + match[2] for match in found if match is not None}
    ascending = sorted(numbers, key=lambda x: (int(x.rstrip("abcdefghijklmnopqrstuvwxyz")), x))
    return [f"-DMOEKV_CUDA_ARCHITECTURES={';'.join(ascending)}"] if asked else []


def _torch_requirement() -> list[str]:
    return [] if find_torch() else [f"torch>={TORCH_FLOOR}"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what a wheel needs beyond pyproject.toml's list."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return what an editable install needs beyond pyproject.toml's list."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()

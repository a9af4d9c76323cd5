"""The PEP 517 backend: setuptools, plus torch where the build would find none.

The native library needs the headers of LibTorch >= 2.10 and, its ABI being stable, runs with every
later release. An isolated build therefore uses the torch of the environment that moekv is installed
into, and asks for one of its own only where that has none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.version import Version
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

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


def _torch_requirement() -> list[str]:
    return [] if find_torch() else [f"torch>={TORCH_FLOOR}"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what a wheel needs beyond pyproject.toml's list."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return what an editable install needs beyond pyproject.toml's list."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()

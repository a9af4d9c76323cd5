"""Show what moekv runs on: versions, instruction sets, libraries, and the backends there are."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch
from rich.table import Table

from moekv import __version__, ops
from moekv.cli.common import make_console

PACKAGE = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "kvpress")


def run() -> None:
    """Print the report."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("moekv", f"{__version__}  {PACKAGE}")
    facts.add_row("Python", f"{platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        facts.add_row(package, _version(package))
    facts.add_row("CPU", f"{torch.get_num_threads()} threads; torch: {_torch_capability()}")
    facts.add_row("CPU kernels", _cpu_kernels(ops.cpu_capability()))
    facts.add_row("CUDA library", cuda_library(PACKAGE / "lib" / "libmoekv_cuda.so"))
    facts.add_row("CUDA devices", _cuda_devices())

    backends = Table(box=None, padding=(0, 2, 0, 0))
    backends.add_column("Backend", style="bold")
    backends.add_column("Available", justify="center")
    backends.add_column("Why not", overflow="fold")
    for name, reason in ops.available_backends().items():
        mark = "[green]yes[/]" if reason is None else "[red]no[/]"
        backends.add_row(name, mark, reason or "")

    console = make_console()
    console.print(facts)
    console.print()
    console.print(backends)


def cuda_library(library: Path) -> str:
    """Describe the CUDA library: its name, and the architectures that it was compiled for.

    These are read from a marker in the file, for it loads only where a CUDA build of torch is.
    """
    if not library.exists():
        return "not built"
    marker = re.search(rb"moekv-cuda-architectures=([^\0]+)", library.read_bytes())
    return f"{library.name}  {marker[1].decode() if marker else 'unknown architectures'}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _cpu_kernels(capability: str | None) -> str:
    if capability is None:
        return "not built"
    forced = os.environ.get("MOEKV_CPU_CAPABILITY")
    return capability + (f"  (MOEKV_CPU_CAPABILITY={forced})" if forced else "")


def _cuda_devices() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "none"

"""Memory of the process."""

from collections.abc import Callable
from pathlib import Path

import pytest


def peak_mib(run: Callable[[], object]) -> float:
    """Growth of the process's memory at its highest while ``run`` runs."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith(field))
        return int(line.split()[1]) / 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError as error:
        pytest.skip(f"peak memory cannot be measured here: {error}")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before

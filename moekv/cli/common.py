"""What commands have in common: their errors, what they print to, checks before long work."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CommandError(Exception):
    """A failure that a message explains; the command exits with status 2."""


def make_console() -> Console:
    """Return where commands print to; not too narrow for tables where there is no terminal.

    Characters that its encoding lacks become question marks.
    """
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    return console


def make_progress(console: Console) -> Progress:
    """Return bars that go when all is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    plain = console.options.ascii_only
    return Progress(
        SpinnerColumn("line" if plain else "dots"),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def reason(error: Exception) -> str:
    """Return an error's message; for a file that cannot be used, its name and why."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def check_output(path: Path) -> None:
    """Raise unless a file can be written there.

    Raises
    ------
    CommandError
        Its folder is missing, or nothing can be written there.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise CommandError(f"expected a file to write, got the folder {path}")
    if not folder.is_dir():
        raise CommandError(f"expected a file in a folder that exists, got {path}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CommandError(f"expected a file that can be written, got {path}")


def check_folder(path: Path) -> None:
    """Raise unless files can be written to a folder, which need not be there yet.

    Raises
    ------
    CommandError
        It is a file, or nothing can be written there.
    """
    nearest = path.resolve()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise CommandError(f"expected a folder to write to, got {path}: {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise CommandError(f"expected a folder that can be written to, got {path}")


def load(
    name: str, dtype: str, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model quietly, its device checked before, in a dtype or the one that is ``"auto"``.

    Raises
    ------
    CommandError
        There is no such device, or the model is not to be had.
    """
    from moekv.models.loading import load_model

    check_device(device)
    try:
        with _quiet():
            return load_model(name, dtype=_dtype(dtype, device), device=device)
    except (ValueError, RuntimeError, OSError) as error:
        raise CommandError(str(error)) from error


def _dtype(name: str, device: str | None) -> torch.dtype:
    """Return a dtype by its name; ``"auto"`` is the faster one on the device.

    Without AVX-512 a product in bfloat16 takes a CPU about six times as long as in float32.
    """
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    on_cpu = torch.device(device).type == "cpu" if device else not torch.cuda.is_available()
    slow = on_cpu and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    return torch.float32 if slow else torch.bfloat16


def check_device(device: str | None) -> None:
    """Raise unless there is such a device.

    Raises
    ------
    CommandError
        Its name is none, or it is not there.
    """
    import torch

    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CommandError(f"expected a --device that is there, got {device}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress bars of transformers, which has several kinds of them."""
    from transformers.utils import logging

    bars: Any = logging
    bars.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        bars.enable_progress_bar()

"""kvpress, which need not be installed."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

HAS_KVPRESS = find_spec("kvpress") is not None


def peer(name: str) -> Callable[..., Any]:
    """A class of kvpress; without kvpress, making one skips the test."""
    if HAS_KVPRESS:
        made: Callable[..., Any] = getattr(import_module("kvpress"), name)
        return made
    return lambda *args, **kwargs: pytest.skip("kvpress is not installed")

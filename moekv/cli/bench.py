"""Measure the quality of compressed caches: ``moekv bench run`` and ``moekv bench report``.

The benchmark is part of the source tree, in benchmarks/quality; ``moekv bench run --help`` lists
its options.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from moekv.cli.common import CommandError


def run(arguments: Sequence[str]) -> None:
    """Run the benchmark of the source tree that moekv is imported from.

    Parameters
    ----------
    arguments : sequence of str
        Those of the benchmark; options alone are those of a run, none at all are answered with
        help.

    Raises
    ------
    CommandError
        There is no source tree, or something that the benchmark needs is not installed or not to be
        had: a file, or the hub.
    """
    given = list(arguments) or ["--help"]
    if given[:1] not in (["run"], ["report"], ["-h"], ["--help"]):
        given.insert(0, "run")
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "quality").is_dir():
        raise CommandError(
            "this installation has no benchmark; run `python -m moekv bench` in a source tree"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        benchmark = importlib.import_module("benchmarks.quality.__main__")
        benchmark.main(given)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error}; run `pip install 'moekv[bench]'`") from error
    except OSError as error:
        raise CommandError(str(error)) from error

"""Measure the quality of compressed caches: ``moekv bench run`` and ``moekv bench report``.

The benchmark is part of the source tree, in benchmarks/quality; ``moekv bench run --help`` lists
its options.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from moekv.cli.main import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pass everything on to the benchmark."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="run|report ...")


def run(args: argparse.Namespace) -> None:
    """Run the benchmark of the source tree that moekv is imported from.

    Raises
    ------
    CommandError
        There is no source tree, or something that the benchmark needs is not installed or not to be
        had: a file, or the hub.
    """
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "quality").is_dir():
        raise CommandError(
            "this installation has no benchmark; run `python -m moekv bench` in a source tree"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        benchmark = importlib.import_module("benchmarks.quality.__main__")
        benchmark.main(args.arguments)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error}; run `pip install 'moekv[bench]'`") from error
    except OSError as error:
        raise CommandError(str(error)) from error

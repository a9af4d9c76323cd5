"""Runs items of one step and tells of each as it begins and ends; started by ``driver``.

A line of JSON for each event: what items there are, that one begins, what came of it. Whatever ends
this process, the lines before are there, and another process goes on behind the item.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check.report import FAILED, OK, SKIPPED

MESSAGE_CHARACTERS = 2000

Items = dict[str, Callable[[], "dict[str, Any] | None"]]


class Skip(Exception):
    """An item that cannot run here, and why; no failure."""


@dataclasses.dataclass(frozen=True)
class Place:
    """What items get that run on no GPU, or in processes of their own: importing one takes seconds.

    ``results``: the report so far. ``device``: the module with a Gpu.
    """

    results: Path
    device: str


def run_item(run: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """Run one item and say what came of it."""
    start = time.perf_counter()
    status, message, data = OK, "", {}
    try:
        data = run() or {}
    except Skip as reason:
        status, message = SKIPPED, str(reason)
    except Exception as error:
        traceback.print_exc()
        status, message = FAILED, f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    message = message[:MESSAGE_CHARACTERS]
    return {"status": status, "seconds": seconds, "message": message, "data": data}


def main(argv: list[str] | None = None) -> int:
    """Run a step's items, but for those to skip."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", help="module with items")
    parser.add_argument("--device", default="gpu_check.gpu", help="module with a Gpu")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="the report so far")
    parser.add_argument("--part", default="0/1", help="of the items: which, and of how many")
    parser.add_argument("--skip", action="append", default=[])
    arguments = parser.parse_args(argv)
    part, parts = map(int, arguments.part.split("/"))

    with arguments.lines.open("a", buffering=1) as stream:

        def tell(**event: Any) -> None:
            stream.write(json.dumps(event) + "\n")

        module = importlib.import_module(arguments.step)
        on_gpu = getattr(module, "ON_GPU", True)
        gpu: Any = Place(arguments.results, arguments.device)
        if on_gpu:
            gpu = importlib.import_module(gpu.device).Gpu(gpu.results)
        with gpu.active() if on_gpu else contextlib.nullcontext():
            items: Items = dict(list(module.items(gpu).items())[part::parts])
            tell(event="items", items=list(items))
            for name, run in items.items():
                if name in arguments.skip:
                    continue
                tell(event="begin", item=name)
                result = run_item(run)
                tell(event="end", item=name, **result)
                if result["status"] == FAILED and on_gpu and not gpu.is_well():
                    # An error of the device stays with the process.
                    tell(event="again")
                    return 0
        tell(event="done")
    return 0


if __name__ == "__main__":
    from gpu_check import worker  # as the steps import it: Skip is a class of that module

    sys.exit(worker.main())

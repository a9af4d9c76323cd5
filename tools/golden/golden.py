"""Record what presses do, bit for bit, and compare two recordings.

For a change that must not change anything::

    PYTHONPATH=old python golden.py record old.json
    PYTHONPATH=new python golden.py record new.json --only 'llama/*'   # a part, to begin with
    python golden.py compare old.json new.json

Every case is a press at work on a model: tiny ones of random weights, and SmolLM2-135M. Recorded
are the generated tokens, the logits, what the caches hold (digests of tensors; how many pairs each
head holds, and which positions these were, where they are found among the keys of a prefill
without a press), the press's statistics in full, and errors, some of which are meant. One thread
and fixed kernels: two recordings of the same code on one machine are equal.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "AVX2,STRICT",  # the same sums wherever tensors are in memory
}


PART = "a part as it is printed, layers.kept say, or a pattern of paths; may be repeated"


def is_wanted(name: str, pattern: str | None) -> bool:
    """Say whether ``model/case`` matches or holds a pattern."""
    return pattern is None or pattern in name or fnmatch.fnmatch(name, pattern)


def record(path: Path, pattern: str | None) -> None:
    """Run all cases that are wanted, and write what was recorded."""
    os.environ |= ENVIRONMENT  # before anything reads it
    import kvpress
    import torch
    import transformers
    from golden_bench import TINY, Subject, record_case
    from golden_cases import real_cases, tiny_cases

    import moekv

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    cases: dict[str, Any] = {}
    for name in (*TINY, "smollm2"):
        table = tiny_cases() if name in TINY else real_cases()
        table = {case: run for case, run in table.items() if is_wanted(f"{name}/{case}", pattern)}
        if not table:
            continue
        begun = time.perf_counter()
        subject = Subject.tiny(name) if name in TINY else Subject.smollm2()
        for case, run in table.items():
            since = time.perf_counter()
            cases[f"{name}/{case}"] = found = record_case(subject, run)
            took, said = time.perf_counter() - since, found.get("error", "")
            print(f"{name}/{case}  {took:.2f} s  {said[:120]}", file=sys.stderr, flush=True)
        print(f"{name}: {len(table)} cases, {time.perf_counter() - begun:.0f} s", flush=True)
    environment = {
        "moekv": str(Path(moekv.__file__).parent),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvpress": getattr(kvpress, "__version__", "?"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "moekv_capability": os.environ.get("MOEKV_CPU_CAPABILITY", ""),
    }
    whole = {"environment": environment, "cases": cases}
    path.write_text(json.dumps(whole, separators=(",", ":")) + "\n")
    print(f"{len(cases)} cases of {environment['moekv']} in {path}, {path.stat().st_size:,} bytes")


def differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Find where two recordings differ: path, and both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            inner = f"{path}.{key}" if path else key
            if key not in one or key not in other:
                yield inner, one.get(key, "(absent)"), other.get(key, "(absent)")
            else:
                yield from differences(one[key], other[key], inner)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}[{i}]")
    elif type(one) is not type(other) or not (one == other or _both_nan(one, other)):
        yield path, one, other


def _both_nan(one: Any, other: Any) -> bool:
    return isinstance(one, float) and math.isnan(one) and math.isnan(other)


def _part(path: str) -> str:
    """Name the part of a recording that a path is in."""
    parts = re.sub(r"\[\d+\]", "", path).removeprefix("runs.").split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def compare(
    first: Path, second: Path, pattern: str | None, ignored: Sequence[str], most: int
) -> int:
    """Print for each case whether it is the same in two recordings.

    Parameters
    ----------
    first, second : Path
    pattern : str or None
        Which cases to compare; None: all.
    ignored : sequence of str
        Parts whose differences do not count, as they are printed (``layers.reported_length``), or
        patterns of paths (``*.total_aux_loss``).
    most : int
        Differences of a part that are printed.

    Returns
    -------
    int
        1 if something differs.
    """
    one, other = (json.loads(path.read_text()) for path in (first, second))
    for name, value, another in differences(one["environment"], other["environment"]):
        print(f"environment: {name}: {value} | {another}")
    same, changed, lonely = 0, 0, []
    for name in dict.fromkeys([*one["cases"], *other["cases"]]):
        if not is_wanted(name, pattern):
            continue
        if name not in one["cases"] or name not in other["cases"]:
            lonely.append(name)
            continue
        parts: dict[str, list[tuple[str, Any, Any]]] = {}
        for found in differences(one["cases"][name], other["cases"][name]):
            part = _part(found[0])
            if part not in ignored and not any(fnmatch.fnmatch(found[0], p) for p in ignored):
                parts.setdefault(part, []).append(found)
        if not parts:
            same += 1
            print(f"{name}: identical")
            continue
        changed += 1
        print(f"{name}: DIFFERENT: " + ", ".join(f"{p} ({len(f)})" for p, f in parts.items()))
        for part, found_ in parts.items():
            for path, value, another in found_[:most]:
                print(f"    {path}:\n      - {_short(value)}\n      + {_short(another)}")
            if len(found_) > most:
                print(f"    ... and {len(found_) - most} more in {part}")
    if lonely:
        print(f"in one recording only: {', '.join(lonely)}")
    print(f"{same} cases identical, {changed} different, {len(lonely)} in one recording only")
    return int(bool(changed or lonely))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def main() -> None:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run cases with the moekv that is imported")
    recording.add_argument("file", type=Path)
    comparing = commands.add_parser("compare", help="exits with 1 if anything differs")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    comparing.add_argument("--ignore", action="append", default=[], metavar="PART", help=PART)
    comparing.add_argument("--most", type=int, default=2, help="differences shown of a part")
    for command in (recording, comparing):
        command.add_argument("--only", metavar="NAME", help="part of `model/case`, or a pattern")
    args = parser.parse_args()
    if args.command == "record":
        record(args.file, args.only)
    else:
        sys.exit(compare(args.first, args.second, args.only, args.ignore, args.most))


if __name__ == "__main__":
    main()

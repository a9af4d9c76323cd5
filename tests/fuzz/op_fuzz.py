"""A fuzzer of the ops: what they return against op_contracts.py, on inputs nobody would write.

A case is one call, ``check("gating_topk", seed=3, ...)``: it makes its inputs of its fields, calls
the op on one thread and on two, and raises AssertionError where the results differ or are not what
the contract says. Values go up to 1e4; tensors lie anywhere in memory that is NaN elsewhere; what
nobody is to read is NaN as well; some calls are wrong, and must be refused by the op, by its
reference and by fake tensors alike. As a script::

    python tests/fuzz/op_fuzz.py --seconds 90          # each instruction set of this processor
    python tests/fuzz/op_fuzz.py --cases 100000 --seed 7

prints the seed, and a case that fails as the smallest like it: one line for a test.
"""

import argparse
import math
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from op_calls import BUILD, DRAW, Fields, whole_memory
from torch import Tensor

from moekv import ops
from moekv.ops import reference

WIDE = ("expert_scores", "expected_attention", "fold_pairs")
"""Ops whose references take wider heads than their kernels."""
ISAS = ("default", "avx2", "avx512", "amx")


# --- a case ---------------------------------------------------------------------------------------


def check(op: str, **fields: Any) -> None:
    """Raise AssertionError where a call does not give what the contract says."""
    fields = {"wrong": None, **fields}
    tensors, options, judge = BUILD[op](fields)
    if fields["wrong"] is not None:
        return check_wrong(op, tensors, options, random.Random(fields["wrong"]))
    function = getattr(torch.ops.moekv if fields["backend"] == "cpu" else reference, op)
    results = []
    for threads in (1, 2) if fields["backend"] == "cpu" else (1,):
        torch.set_num_threads(threads)
        try:
            results.append(run(function, op, tensors, options))
        finally:
            torch.set_num_threads(1)
    bits = [
        [
            x.clone(memory_format=torch.contiguous_format).view(torch.uint8)
            if x.dim()
            else x[None].view(torch.uint8)
            for x in result
        ]
        for result in results
    ]
    for one, two in zip(bits[0], bits[-1], strict=True):
        assert torch.equal(one, two), "one thread and two differ"
    judge(results[0] if len(results[0]) > 1 else results[0][0])


def run(function: Callable[..., Any], op: str, tensors: list[Any], options: Fields) -> list[Tensor]:
    if op == "kv_compact_":
        moved = [same_layout(x) for x in tensors[:2]]
        function(*moved, *tensors[2:], **options)
        return moved
    result = function(*tensors, **options)
    return [result] if isinstance(result, Tensor) else list(result)


def same_layout(tensor: Tensor) -> Tensor:
    memory = whole_memory(tensor).clone()
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check_wrong(op: str, tensors: list[Any], options: Fields, r: random.Random) -> None:
    """Change one argument: native op, reference and fake tensors take it, or all refuse it."""
    tensors, options = list(tensors), dict(options)
    places = [i for i, x in enumerate(tensors) if x is not None]
    if options and r.random() < 0.4:
        name = r.choice(list(options))
        wrong = [math.nan, math.inf, -1.0, 0.0, 1e60, 1e-60]
        if isinstance(options[name], bool):
            return
        if isinstance(options[name], list):
            options[name] = r.choice([[], options[name] * 2, [-1], [10**6]])
        elif isinstance(options[name], str):
            options[name] = r.choice(["16", "k8v8", "k8v4", "k4v4", "k4v8", ""])
        elif isinstance(options[name], int):
            options[name] = r.choice([-1, 0, 2, 257, 2**31])
        else:
            options[name] = r.choice(wrong)
        changed = f"{name}={options[name]}"
    else:
        i = r.choice(places)
        x = tensors[i]
        change = r.choice(["dtype", "rank", "size", "more", "less", "none"])
        if change == "dtype":
            kinds = [torch.float32, torch.float16, torch.int32, torch.int64, torch.bool, torch.int8]
            tensors[i] = x.nan_to_num(0.0).to(r.choice(kinds))
        elif change == "rank":
            tensors[i] = x[None] if r.random() < 0.5 or not x.dim() else x.flatten()
        elif change == "none":
            tensors[i] = None
        elif x.dim():
            dim = r.randrange(x.dim())
            size = x.shape[dim]
            if change == "more":
                tensors[i] = torch.cat([x, x.narrow(dim, 0, min(1, size))], dim)
            else:
                tensors[i] = x.narrow(dim, 0, size // 2 if change == "size" else max(size - 1, 0))
        got = tensors[i]
        changed = f"argument {i} {change}, {None if got is None else (got.dtype, list(got.shape))}"
    said = {}
    for who in ("native", "reference", "fake"):
        function = getattr(reference if who == "reference" else torch.ops.moekv, op)
        mine = [x if x is None else same_layout(x) if who != "fake" else fake(x) for x in tensors]
        try:
            result = function(*mine, **options)
            outputs = [] if result is None else [result] if isinstance(result, Tensor) else result
            said[who] = str([(x.dtype, list(x.shape)) for x in outputs])
        except Exception as error:
            text = str(error)
            named = f"moekv::{op}" in text and "expected" in text
            # None for a tensor, or a float for an integer, is the dispatcher's to refuse.
            schema = any(x is None for x in tensors) or "but got" in text or "cast" in text
            said[who] = "refused" if named or schema else f"{type(error).__name__}: {text}"
    if op in WIDE and any(x is not None and x.dim() and x.shape[-1] > 256 for x in tensors):
        del said["reference"]  # which takes wider heads
    if any(
        "indices" in x or "offsets" in x or "begin" in x or "experts" in x for x in said.values()
    ):
        return
    content = (
        said["fake"] != "refused"
        and said["native"] == said.get("reference", "refused") == "refused"
    )
    data = op in ("kv_compact_", "mix_scores", "fold_pairs", "ragged_attention") and content
    assert data or len(set(said.values())) == 1, f"{changed}: {said}"


def fake(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def draw(op: str, r: random.Random) -> Fields:
    fields: Fields = DRAW[op](r)
    if r.random() < 0.1:
        fields["wrong"] = r.randrange(2**31)
    return fields


def line(op: str, fields: Fields) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return f"check({op!r}, {arguments})"


def failure(op: str, fields: Fields) -> str | None:
    try:
        check(op, **fields)
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return None


def smallest(op: str, fields: Fields, tries: int = 300) -> Fields:
    """Make fields simpler, one after another, as long as the case goes on failing alike."""
    kind = (failure(op, fields) or "").split(":")[0]
    simple = {"backend": "cpu", "dtype": "float32", "values": "normal", "layout": "dense"}
    simple |= {"padding": "none", "hidden": "value", "poison": "none", "strange": "none"}
    simple |= {"bias": "none", "pairs": "16" if op == "ragged_attention" else "k8v8"}
    simple |= {"mask": "none" if isinstance(fields.get("mask"), str) else False, "seen": "none"}
    again = True
    while again and tries > 0:
        again = False
        for name, value in list(fields.items()):
            options: list[Any] = []
            if name in simple:
                options = [simple[name]]
            elif isinstance(value, bool):
                options = [False]
            elif name == "kinds":
                options = [[kind] for kind in value]
            elif isinstance(value, int) and name not in ("seed", "wrong"):
                options = [0, 1, 2, value // 2, value - 1]
            elif isinstance(value, float):
                options = [0.0, 1.0]
            for option in options:
                if option == value or (
                    isinstance(option, int) and isinstance(value, int) and option > value
                ):
                    continue
                tries -= 1
                try:
                    told = failure(op, fields | {name: option}) or ""
                except SystemExit:
                    told = ""
                if told.split(":")[0] == kind and kind == "AssertionError":
                    fields = fields | {name: option}
                    again = True
                    break
    return fields


# --- the script -----------------------------------------------------------------------------------


def worker(seed: int, cases: int, seconds: float, only: list[str], note: str) -> int:
    """Run cases; the one that runs stands in the file ``note``, should it end the process."""
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    failures, done, ends = 0, 0, time.monotonic() + seconds
    with open(note, "w+b") as file:
        file.truncate(1 << 16)
        memory = mmap.mmap(file.fileno(), 1 << 16)
        with torch.no_grad():
            while done < cases and time.monotonic() < ends and failures < 10:
                r = random.Random(seed * 1_000_003 + done)
                op = r.choice(only)
                fields = draw(op, r)
                text = line(op, fields).encode()
                memory[: len(text) + 1] = text + b"\0"
                told = failure(op, fields)
                done += 1
                if told is not None:
                    failures += 1
                    fields = smallest(op, fields)
                    print(
                        f"FAILED {failure(op, fields) or told}\n    {line(op, fields)}", flush=True
                    )
    print(f"{ops.cpu_capability()}: seed {seed}, {done} cases, {failures} failures", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="of all instruction sets together"
    )
    parser.add_argument("--cases", type=int, default=10**9, help="of all instruction sets together")
    parser.add_argument("--seed", type=int, default=None, help="default: of the time of day")
    parser.add_argument("--ops", nargs="+", default=list(BUILD), choices=list(BUILD))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else time.time_ns() // 10**6 % 10**9
    if arguments.worker:
        return worker(seed, arguments.cases, arguments.seconds, arguments.ops, arguments.worker)
    best = ops.cpu_capability()
    assert best is not None, "expected the native library; run `make install`"
    isas = ISAS[: ISAS.index(best) + 1]
    failures = 0
    for number, isa in enumerate(isas):
        note = Path(f"/tmp/moekv-fuzz-{os.getpid()}")
        command = [sys.executable, __file__, "--worker", str(note), "--seed", str(seed + number)]
        command += ["--cases", str(-(-arguments.cases // len(isas))), "--ops", *arguments.ops]
        command += ["--seconds", str(arguments.seconds / len(isas))]
        environment = {**os.environ, "MOEKV_CPU_CAPABILITY": isa, "GOMP_SPINCOUNT": "0"}
        code = subprocess.run(command, env=environment, check=False).returncode
        if code < 0 or code > 10:
            print(
                f"FAILED with exit code {code}\n    {note.read_bytes().split(bytes(1))[0].decode()}"
            )
            code = 1
        failures += code
        note.unlink(missing_ok=True)
    return min(failures, 99)


if __name__ == "__main__":
    sys.exit(main())

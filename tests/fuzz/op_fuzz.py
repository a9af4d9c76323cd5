"""A fuzzer of the ops: what they return against op_contracts.py, on inputs nobody would write.

A case is one call, ``check("gating_topk", seed=3, ...)``: it makes its inputs of its fields, calls
the op on one thread and on two, and raises AssertionError where the results differ or are not what
the contract says. Values go up to 1e4; tensors lie anywhere in memory that is NaN elsewhere; what
nobody is to read is NaN as well; some calls are wrong, and must be refused by the op, by its
reference and by fake tensors alike. As a script::

    python tests/fuzz/op_fuzz.py --seconds 180          # each instruction set of this processor
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
import op_contracts as contracts
import torch
from torch import Tensor

from moekv import ops
from moekv.ops import reference

Fields = dict[str, Any]
Call = tuple[list[Any], dict[str, Any], Callable[[Any], None]]

ISAS = ("default", "avx2", "avx512", "amx")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


# --- inputs ---------------------------------------------------------------------------------------


class Inputs:
    """Seeded tensors: their values, and how they lie in memory."""

    def __init__(self, seed: int, values: str = "normal", size: float = 1.0, layout: str = "dense"):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.values, self.size, self.layout = values, size, layout

    def numbers(self, *shape: int, dtype: str = "float32", size: float | None = None) -> Tensor:
        size = self.size if size is None else size
        x = torch.randn(shape, generator=self.generator)
        if self.values == "ties":
            x = x.round()
        elif self.values == "equal" and x.numel():
            x = x[:1].expand(shape) if self.random.random() < 0.5 else x.flatten()[0].expand(shape)
        elif self.values == "spread":
            x = x * 10.0 ** -torch.randint(0, 5, shape, generator=self.generator)
        elif self.values == "shifted":
            x = x + 30
        most = 6e4 if dtype == "float16" else 1e30
        return (x * size).clamp(-most, most).to(DTYPES[dtype])

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32)

    def booleans(self, share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def laid(self, tensor: Tensor, dense_rows: bool = False) -> Tensor:
        """The same numbers in other places, with NaN (or nonsense) around them."""
        dims = list(range(tensor.dim()))
        steps = [1] * len(dims)
        if self.layout == "permuted":
            moving = dims[:-1] if dense_rows else dims
            self.random.shuffle(moving)
            dims = moving + dims[len(moving) :]
        elif self.layout == "gaps" and dims:
            last = len(dims) - (2 if dense_rows and len(dims) > 1 else 1)
            steps[self.random.randint(0, max(last, 0))] = self.random.randint(2, 3)
            if dense_rows:
                steps[-1] = 1
        offset = 0 if self.layout == "dense" else self.random.randint(0, 9)
        strides, extent = [0] * len(dims), 1
        for dim in reversed(dims):
            strides[dim] = extent * steps[dim]
            extent = strides[dim] * max(tensor.shape[dim], 1)
        if tensor.is_floating_point():
            nonsense: float | bool = math.nan
        else:
            nonsense = True if tensor.dtype == torch.bool else 2**30
        memory = tensor.new_full((offset + extent + 9,), nonsense)
        laid = memory.as_strided(tensor.shape, strides, offset)
        return laid.copy_(tensor)


def hide(tensor: Tensor, where: Tensor, value: str) -> None:
    """Fill what is not to be read."""
    if value != "value":
        tensor.masked_fill_(where, INFINITE[value])


def common(r: random.Random, most_dim: int = 256) -> Fields:
    return {
        "seed": r.randrange(2**31),
        "backend": "cpu" if r.random() < 0.75 else "torch",
        "dtype": r.choice(list(DTYPES)),
        "values": r.choice(["normal", "normal", "normal", "ties", "equal", "spread", "shifted"]),
        "size": r.choice([1.0, 1.0, 0.01, 30.0, 1e3, 1e4]),
        "layout": r.choice(["dense", "offset", "permuted", "gaps"]),
    }


def heads(r: random.Random) -> Fields:
    return {
        "batch": r.choice([1, 1, 2, 3]),
        "heads": r.choice([1, 2, 3]),
        "group": r.choice([1, 2, 3, 4, 7]),
        "dim": r.choice([1, 2, 5, 8, 16, 17, 31, 32, 33, 64, 80, 128, 256]),
    }


def length(r: random.Random) -> int:
    edges = [63, 64, 65, 69, 96, 127, 128, 129, 255, 383, 384, 385, 500]
    return r.choice([1, 2, 3, r.randint(1, 12), r.randint(1, 70), r.choice(edges)])


def start_of(make: Inputs, fields: Fields, rows: int, num_keys: int) -> Tensor | None:
    if fields["padding"] == "none":
        return None
    if fields["padding"] == "all":
        return torch.full((rows,), num_keys, dtype=torch.int32)
    return make.integers(-1, num_keys + 2, rows)


def padding_of(start: Tensor | None, num_keys: int) -> Tensor:
    """[B, 1, T, 1]: what is padding."""
    first = torch.zeros(1) if start is None else start
    return (torch.arange(num_keys) < first[:, None])[:, None, :, None]


def spoil_heads(fields: Fields, make: Inputs, batch: int, count: int, *tensors: Tensor) -> Tensor:
    """Put a NaN into one head; returns [B, H]: whose inputs are finite."""
    clean = torch.ones(batch, count, dtype=torch.bool)
    if fields["poison"] == "none" or not clean.numel():
        return clean
    b, h = make.random.randrange(batch), make.random.randrange(count)
    tensor = make.random.choice(tensors)
    rows = tensor[b].unflatten(0, (count, -1))[h]
    if rows.numel():
        at = tuple(make.random.randrange(size) for size in rows.shape)
        rows[at] = INFINITE[fields["poison"]]
        clean[b, h] = False
    return clean


# --- the ops --------------------------------------------------------------------------------------


def draw_gating_topk(r: random.Random) -> Fields:
    experts = r.choice([1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 33, 60, 64, 100, 128, 200, 255, 256])
    return {
        **common(r),
        "tokens": r.choice([0, 1, 2, 7, 8, 9, 17, 64, 300]) if experts < 60 else r.randint(0, 40),
        "experts": experts,
        "k": min(experts, r.choice([1, 2, 2, 3, 4, 5, 6, 8, 17, experts])),
        "temperature": r.choice([1.0, 1.0, 0.1, 7.0, 1e-6, 1e6]),
        "bias": r.choice([False, True]),
        "mask": r.choice([False, True]),
        "importance": r.choice([False, True]),
        "strange": r.choice(["none", "none", "some"]),
    }


def gating_topk(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    logits = make.numbers(f["tokens"], f["experts"], dtype=f["dtype"])
    if f["strange"] == "some":
        for name, share in (("nan", 0.1), ("inf", 0.05), ("-inf", 0.1)):
            logits[make.booleans(share, *logits.shape)] = INFINITE[name]
        logits[make.booleans(0.1, f["tokens"])] = -math.inf
    bias = make.numbers(f["experts"], size=0.1) if f["bias"] else None
    if bias is not None and f["strange"] == "some":
        bias[make.booleans(0.1, f["experts"])] = math.nan
    mask = make.booleans(0.7, f["tokens"]) if f["mask"] else None
    if mask is not None:
        logits[~mask] = math.nan
    importance = None
    if f["importance"]:
        importance = make.integers(-8, 80, f["tokens"]).float() / 64
        importance[make.booleans(0.1, f["tokens"])] = math.nan
    tensors = [x if x is None else make.laid(x) for x in (logits, bias, mask, importance)]
    options = {"k": f["k"], "temperature": f["temperature"]}
    return tensors, options, lambda got: contracts.gating_topk(got, *tensors, **options)


def draw_expert_scores(r: random.Random) -> Fields:
    num_keys = length(r)
    kinds = r.sample(range(4), r.randint(1, 4))
    return {
        **common(r),
        **heads(r),
        "keys": num_keys,
        "window": min(num_keys, r.choice([1, 1, 2, 5, 8, 16, 33, 40])),
        "value_dim": r.choice([1, 3, 8, 32, 64, 70, 128]),
        "kinds": kinds,
        "scaling": r.choice([1.0, 0.125, 0.0883883, 1e-3, 3.0]),
        "softcap": r.choice([0.0, 0.0, 1.0, 30.0]),
        "pool": r.choice([1, 3, 5, 7, 65, 401, 2 * num_keys + 1]),
        "lag": r.choice([1, 2, 5, 16, 64, 128, 1000]),
        "padding": r.choice(["none", "some", "some", "all"]),
        "hidden": r.choice(["nan", "inf", "value"]),
        "poison": r.choice(["none", "none", "none", "nan", "inf"]),
    }


def expert_scores(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    b, h, t, w = f["batch"], f["heads"], f["keys"], f["window"]
    keys = make.numbers(b, h, t, f["dim"], dtype=f["dtype"])
    values = make.numbers(b, h, t, f["value_dim"], dtype=f["dtype"])
    queries = make.numbers(b, h * f["group"], w, f["dim"], dtype=f["dtype"])
    start = start_of(make, f, b, t)
    clean = spoil_heads(f, make, b, h, keys, values, queries)
    padding = padding_of(start, t)
    for tensor, hidden in ((keys, padding), (values, padding), (queries, padding[:, :, t - w :])):
        hide(tensor, hidden, f["hidden"])
    tensors = [make.laid(x) for x in (keys, values, queries)]
    tensors.append(start if start is None else make.laid(start))
    options = {name: f[name] for name in ("kinds", "scaling", "softcap", "pool", "lag")}
    whole = contracts.exact(clean)
    return tensors, options, lambda got: contracts.expert_scores(got, whole, *tensors, **options)


def draw_expected_attention(r: random.Random) -> Fields:
    names = ("keys", "scaling", "softcap", "padding", "hidden", "poison")
    drawn = draw_expert_scores(r)
    return {**common(r), **heads(r), **{name: drawn[name] for name in names}}


def expected_attention(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    b, h, t = f["batch"], f["heads"], f["keys"]
    keys = make.numbers(b, h, t, f["dim"], dtype=f["dtype"])
    queries = make.numbers(b, h * f["group"], t, f["dim"], dtype=f["dtype"])
    start = start_of(make, f, b, t)
    clean = contracts.exact(spoil_heads(f, make, b, h, keys, queries))
    for tensor in (keys, queries):
        hide(tensor, padding_of(start, t), f["hidden"])
    tensors = [make.laid(queries), make.laid(keys), start if start is None else make.laid(start)]
    options = {"scaling": f["scaling"], "softcap": f["softcap"]}
    return (
        tensors,
        options,
        lambda got: contracts.expected_attention(got, clean, *tensors, **options),
    )


def draw_project_tokens(r: random.Random) -> Fields:
    return {
        **common(r),
        "batch": r.choice([1, 2, 3]),
        "tokens": length(r),
        "channels": r.choice([1, 3, 8, 24, 64, 100, 257, 576]),
        "projections": r.choice([0, 1, 2, 3, 4, 7, 8, 9, 17]),
        "mask": r.choice([False, True]),
        "hidden": r.choice(["nan", "inf", "value"]),
        "poison": r.choice(["none", "none", "nan", "inf"]),
    }


def project_tokens(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    hidden = make.numbers(f["batch"], f["tokens"], f["channels"], dtype=f["dtype"])
    weight = make.numbers(f["projections"], f["channels"], dtype=f["dtype"], size=1.0)
    clean = contracts.exact(spoil_heads(f, make, f["batch"], 1, hidden[:, None]))[:, 0]
    mask = make.booleans(0.7, f["batch"], f["tokens"]) if f["mask"] else None
    if mask is not None:
        hide(hidden, ~mask[..., None], f["hidden"])
    tensors = [make.laid(hidden), make.laid(weight), mask if mask is None else make.laid(mask)]
    return tensors, {}, lambda got: contracts.project_tokens(got, clean, *tensors)


def draw_mix_scores(r: random.Random) -> Fields:
    experts = r.choice([1, 2, 4, 9, 17, 256])
    return {
        **{k: v for k, v in common(r).items() if k != "dtype"},
        "dtype": r.choice(["float32", "float32", "float16"]),
        "experts": experts,
        "batch": r.choice([1, 2, 3]),
        "heads": r.choice([1, 2, 3]),
        "keys": length(r) if experts < 100 else r.randint(1, 9),
        "k": r.choice([1, 1, 2, 2, 3, 6]),
        "each_head": r.choice([False, True]),
        "gain": r.choice([False, True]),
        "offset": r.choice([False, True]),
        "zeros": r.choice([0.0, 0.2]),
        "infinite": r.choice([0.0, 0.1]),
    }


def mix_scores(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    e, b, h, t = f["experts"], f["batch"], f["heads"], f["keys"]
    scores = make.numbers(e, b, h, t, dtype=f["dtype"])
    scores[make.booleans(f["infinite"], *scores.shape)] = -math.inf
    shape = (b, h, t, f["k"]) if f["each_head"] else (b, t, f["k"])
    weights = make.numbers(*shape, size=1.0).abs()
    weights[make.booleans(f["zeros"], *shape)] = 0.0
    experts = make.integers(0, e, *shape)
    gain = make.numbers(e, b, h, size=1.0).abs() + 0.1 if f["gain"] else None
    offset = make.numbers(e, b, h) if f["offset"] else None
    given = (scores, weights, experts, gain, offset)
    tensors = [x if x is None else make.laid(x) for x in given]
    return tensors, {}, lambda got: contracts.mix_scores(got, *tensors)


def draw_select_kept(r: random.Random) -> Fields:
    return {
        **common(r),
        "groups": r.choice([1, 1, 2, 3]),
        "rows": r.choice([1, 1, 2, 3, 8]),
        "keys": length(r),
        "share": r.choice([0.0, 0.1, 0.5, 0.9, 1.0]),
        "even": r.choice([False, True]),
        "sinks": r.choice([0, 0, 1, 4, 50]),
        "window": r.choice([0, 0, 1, 8, 50]),
        "floor": r.choice([0, 1, 1, 5, 50]),
        "padding": r.choice(["none", "some", "all"]),
        "strange": r.choice(["none", "none", "some"]),
    }


def select_kept(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    g, rows, t = f["groups"], f["rows"], f["keys"]
    scores = make.numbers(g, rows, t, dtype=f["dtype"])
    if f["strange"] == "some":
        for name in INFINITE:
            scores[make.booleans(0.1, g, rows, t)] = INFINITE[name]
        scores[make.booleans(0.1, g, rows, t)] = -0.0
    start = start_of(make, f, g * rows, t)
    start = start if start is None else start.view(g, rows)
    shares = [f["share"] if f["even"] else make.random.random() for _ in range(g)]
    total = [rows + int(share * (rows * t - rows)) for share in shares]
    tensors = [make.laid(scores), start if start is None else make.laid(start)]
    options = {"total": total, **{name: f[name] for name in ("sinks", "window", "floor")}}
    return tensors, options, lambda got: contracts.select_kept(got, *tensors, **options)


def draw_kv_compact_(r: random.Random) -> Fields:
    packed = r.choice([False, True])
    return {
        **common(r),
        **({"layout": r.choice(["dense", "offset"])} if packed else {}),
        "batch": r.choice([1, 2]),
        "heads": r.choice([1, 2, 5]),
        "keys": length(r),
        "dim": r.choice([0, 1, 3, 8, 16, 33, 64, 128]),
        "value_dim": r.choice([0, 1, 4, 32, 65]),
        "share": r.choice([0.0, 0.1, 0.5, 0.9, 1.0]),
        "ragged": r.choice([False, True]),
        "packed": packed,
    }


def kv_compact_(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    b, h, t = f["batch"], f["heads"], f["keys"]
    keys, values = (
        make.laid(make.numbers(b, h, t, dim, dtype=f["dtype"]), dense_rows=True)
        for dim in (f["dim"], f["value_dim"])
    )
    count = [int(f["share"] * t)] * (b * h)
    if f["ragged"]:
        count = [make.random.randint(0, t) for _ in count]
    rows = [torch.randperm(t, generator=make.generator)[:n].sort().values.int() for n in count]
    indices = torch.cat(rows) if f["ragged"] else torch.stack(rows).view(b, h, -1)
    offsets = torch.tensor([0, *count]).cumsum(0).int() if f["ragged"] else None
    tensors = [keys, values, make.laid(indices), offsets if offsets is None else make.laid(offsets)]
    bits = torch.int32 if f["dtype"] == "float32" else torch.int16
    memory = [whole_memory(x).view(bits).clone() for x in (keys, values)]
    options = {"packed": f["packed"]}

    def judge(moved: list[Tensor]) -> None:
        before, after = [], []
        for new, old_memory in zip(moved, memory, strict=True):
            now = whole_memory(new).view(bits)
            view = (new.shape, new.stride(), new.storage_offset())
            outside = torch.ones(len(now), dtype=torch.bool)
            outside.as_strided(*view).fill_(False)
            assert torch.equal(now[outside], old_memory[outside]), "memory around was written"
            before.append(old_memory.as_strided(*view))
            after.append(now.as_strided(*view))
        contracts.kv_compact_(after, before, *tensors[2:], **options)

    return tensors, options, judge


def whole_memory(tensor: Tensor) -> Tensor:
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((size,), (1,), 0)


def draw_ragged_attention(r: random.Random) -> Fields:
    tail = r.choice([0, 1, 1, 3, 20, 64, 65, 130])
    return {
        **common(r),
        **heads(r),
        "queries": r.choice([1, 1, 2, 5]) if tail == 0 else min(tail, r.choice([1, 1, 2, 3, 20])),
        "value_dim": r.choice([1, 3, 8, 16, 33, 64, 80, 128]),
        "stored": r.choice([0, 1, 5, 64, 65, 200, 700]),
        "tail": tail,
        "mask": r.choice(["none", "some", "some", "one head", "nothing"]),
        "scaling": r.choice([1.0, 0.125, 0.0883883, 1e-3, 3.0]),
        "softcap": r.choice([0.0, 0.0, 1.0, 30.0]),
        "hidden": r.choice(["nan", "inf", "value"]),
        "seen": r.choice(["none", "none", "nan"]),
    }


def ragged_attention(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    b, h, q, n, s = f["batch"], f["heads"], f["queries"], f["stored"], f["tail"]
    query = make.numbers(b, h * f["group"], q, f["dim"], dtype=f["dtype"])
    keys, values = (make.numbers(n, d, dtype=f["dtype"]) for d in (f["dim"], f["value_dim"]))
    begin = make.integers(0, n + 1, b, h)
    end = torch.maximum(begin, make.integers(0, n + 1, b, h))
    row = torch.arange(n)
    owned = ((row >= begin[..., None]) & (row < end[..., None])).flatten(0, 1).any(0)
    tail: list[Tensor | None] = [None, None, None]
    if s:
        tail_keys, tail_values = (
            make.numbers(b, h, s, d, dtype=f["dtype"]) for d in (f["dim"], f["value_dim"])
        )
        seen = (torch.arange(s) <= s - q + torch.arange(q)[:, None])[None, None]
        mask = None
        if f["mask"] != "none":
            shape = (b, 1, q, s) if f["mask"] == "one head" else (b, h * f["group"], q, s)
            mask = make.booleans(0.0 if f["mask"] == "nothing" else 0.6, *shape)
            if f["mask"] == "some" and make.random.random() < 0.5:
                mask[..., : s // 2] = False  # a padded row
            seen = seen & mask
        everyone = seen.expand(b, h * f["group"], q, s).unflatten(1, (h, -1)).any(3).any(2)
        for x in (tail_keys, tail_values):
            hide(x, ~everyone[..., None], f["hidden"])
        if f["seen"] == "nan":  # by some queries only
            at = make.random.randrange(s)
            make.random.choice([tail_keys, tail_values])[:, :, at, 0] = math.nan
        tail = [make.laid(tail_keys), make.laid(tail_values), mask]
        if mask is not None:
            tail[2] = make.laid(mask)
    for x in (keys, values):
        hide(x, ~owned[:, None], f["hidden"])
    given = (query, keys, values, begin, end)
    tensors = [*(make.laid(x) for x in given), *tail]
    options = {"scaling": f["scaling"], "softcap": f["softcap"]}
    return tensors, options, lambda got: contracts.ragged_attention(got, *tensors, **options)


BUILD: dict[str, Callable[[Fields], Call]] = {
    "gating_topk": gating_topk,
    "expert_scores": expert_scores,
    "expected_attention": expected_attention,
    "project_tokens": project_tokens,
    "mix_scores": mix_scores,
    "select_kept": select_kept,
    "kv_compact_": kv_compact_,
    "ragged_attention": ragged_attention,
}
DRAW = {name: globals()[f"draw_{name}"] for name in BUILD}


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
        [x.contiguous().view(torch.uint8) if x.dim() else x[None].view(torch.uint8) for x in result]
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
    if any(
        "indices" in x or "offsets" in x or "begin" in x or "experts" in x for x in said.values()
    ):
        return
    content = said["fake"] != "refused" and said["native"] == said["reference"] == "refused"
    data = op in ("kv_compact_", "mix_scores", "ragged_attention") and content
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

"""Calls of the ops that nobody would write: inputs from fields, and what must come of them."""

import math
import random
from collections.abc import Callable
from typing import Any

import op_contracts as contracts
import torch
from op_bounds import exact
from torch import Tensor

Fields = dict[str, Any]
Call = tuple[list[Any], dict[str, Any], Callable[[Any], None]]

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
            nonsense = {torch.bool: True, torch.uint8: 200}.get(tensor.dtype, 2**30)
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
    whole = exact(clean)
    return tensors, options, lambda got: contracts.expert_scores(got, whole, *tensors, **options)


def draw_expected_attention(r: random.Random) -> Fields:
    names = ("keys", "scaling", "softcap", "padding", "hidden", "poison")
    drawn = draw_expert_scores(r)
    sizes = heads(r)
    turned = r.choice([0, 0, 0, 2, r.randint(0, sizes["dim"]), sizes["dim"]]) // 2 * 2
    drawn |= {"turned": min(turned, sizes["dim"] // 2 * 2), "own_turns": r.random() < 0.5}
    names += ("turned", "own_turns")
    return {**common(r), **sizes, **{name: drawn[name] for name in names}}


def expected_attention(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    b, h, t = f["batch"], f["heads"], f["keys"]
    keys = make.numbers(b, h, t, f["dim"], dtype=f["dtype"])
    queries = make.numbers(b, h * f["group"], t, f["dim"], dtype=f["dtype"])
    start = start_of(make, f, b, t)
    clean = exact(spoil_heads(f, make, b, h, keys, queries))
    for tensor in (keys, queries):
        hide(tensor, padding_of(start, t), f["hidden"])
    tensors = [make.laid(queries), make.laid(keys), start if start is None else make.laid(start)]
    if f["turned"]:
        angle = make.numbers(b if f["own_turns"] else 1, t, f["turned"], size=3.0)
        for turn in (angle.cos(), angle.sin()):
            if len(turn) == b:
                hide(turn, padding_of(start, t)[:, 0].expand_as(turn), f["hidden"])
            tensors.append(make.laid(turn))
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
    clean = exact(spoil_heads(f, make, f["batch"], 1, hidden[:, None]))[:, 0]
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


def draw_quantize_pairs(r: random.Random) -> Fields:
    pairs = r.choice(["k8v8", "k8v4", "k4v4"])
    dims = [1, 3, 16, 33, 64, 80, 96, 128, 256]
    return {
        **common(r),
        "pairs": pairs,
        "num": r.choice([0, 1, 5, 64, 200]),
        "dim": r.choice(dims) * (2 if pairs[1] == "4" else 1),
        "value_dim": r.choice(dims) * (2 if pairs[3] == "4" else 1),
        "strange": r.choice(["none", "none", "nan", "inf", "-inf"]),
    }


def quantize_pairs(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    rows = [make.numbers(f["num"], d, dtype=f["dtype"]) for d in (f["dim"], f["value_dim"])]
    if f["strange"] != "none" and f["num"]:
        at = make.random.randrange(f["num"])
        make.random.choice(rows)[at, 0] = INFINITE[f["strange"]]
    tensors = [make.laid(x) for x in rows]
    options = {"pairs": f["pairs"]}
    return tensors, options, lambda got: contracts.quantize_pairs(got, *tensors, **options)


def draw_fold_pairs(r: random.Random) -> Fields:
    drawn, sizes = draw_expert_scores(r), heads(r)
    return {
        **common(r),
        **sizes,
        **{name: drawn[name] for name in ("scaling", "softcap", "padding", "poison")},
        "keys": length(r),
        "value_dim": r.choice([1, 4, 15, 32, 65, 256]),
        "queries": r.choice([1, 2, 5, 16, 36]),
        "share": r.choice([0.0, 0.1, 0.5, 0.9, 1.0]),
        "gate": r.choice([0.0, 0.0, 0.5, 1.0]),
        "least": r.choice([0.0, 0.0, 0.1, 1.0]),
    }


def fold_pairs(f: Fields) -> Call:
    make = Inputs(f["seed"], f["values"], f["size"], f["layout"])
    b, h, t = f["batch"], f["heads"], f["keys"]
    queries = make.numbers(b, h * f["group"], f["queries"], f["dim"], dtype=f["dtype"])
    keys, values = (
        make.numbers(b, h, t, dim, dtype=f["dtype"]) for dim in (f["dim"], f["value_dim"])
    )
    start = start_of(make, f, b, t)
    spoil_heads(f, make, b, h, keys, values, queries)
    kept = make.booleans(f["share"], b * h, t)
    offsets = torch.tensor([0, *kept.sum(1).tolist()]).cumsum(0).int()
    given = (queries, keys, values, kept.nonzero()[:, 1].int(), offsets, start)
    tensors = [x if x is None else make.laid(x) for x in given]
    options = {name: f[name] for name in ("scaling", "softcap", "gate", "least")}
    return tensors, options, lambda got: contracts.fold_pairs(got, *tensors, **options)


def coded_rows(make: Inputs, f: Fields) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of any codes, with scales as they come of numbers of the size; no sum leaves float16."""
    bits = int(f["pairs"][1]), int(f["pairs"][3])
    dims = f["dim"], f["value_dim"]
    codes, scales = [], []
    for width, dim in zip(bits, dims, strict=True):
        code = make.integers(0, 256, f["stored"], dim * width // 8).to(torch.uint8)
        if width == 8:
            code[code == 128] = 0  # -128 is no code
            scales.append((make.numbers(f["stored"], 1).abs() / 127).clamp(max=400))
        else:
            lo = -make.numbers(f["stored"], -(-dim // 32)).abs().clamp(max=2e4 / dim)
            scales.append(torch.stack([lo, lo.abs() / 7], 2).flatten(1))
        codes.append(code)
    return codes[0], codes[1], torch.cat(scales, 1).clamp(-6e4, 6e4).half()


def draw_ragged_attention(r: random.Random) -> Fields:
    tail = r.choice([0, 1, 1, 3, 20, 64, 65, 130])
    return {
        **common(r),
        **heads(r),
        "pairs": r.choice(["16", "16", "16", "k8v8", "k8v4", "k4v4"]),
        "bias": r.choice(["none", "none", "some", "hiding", "nothing"]),
        "sinks": r.random() < 0.3,
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
    if f["pairs"] != "16":  # 4 bits need even dims
        f = {**f, "dim": 2 * f["dim"], "value_dim": 2 * f["value_dim"]}
    query = make.numbers(b, h * f["group"], q, f["dim"], dtype=f["dtype"])
    scales = bias = sinks = None
    if f["pairs"] == "16":
        keys, values = (make.numbers(n, d, dtype=f["dtype"]) for d in (f["dim"], f["value_dim"]))
    else:
        keys, values, scales = coded_rows(make, f)
    if f["bias"] != "none":
        bias = make.numbers(n, dtype="float16", size=3.0)
        share = {"some": 0.0, "hiding": 0.5, "nothing": 1.0}[f["bias"]]
        bias[make.booleans(share, n)] = -math.inf
        bias = make.laid(bias)
    if f["sinks"]:
        sinks = make.laid(make.numbers(h * f["group"], size=3.0))
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
    unseen = ~owned if bias is None else ~owned | (bias == -math.inf)
    for x in (keys, values) if scales is None else (scales,):
        hide(x, unseen[:, None], f["hidden"])
    given = (query, keys, values, begin, end)
    tensors = [*(make.laid(x) for x in given), *tail]
    tensors += [None if scales is None else make.laid(scales), bias, sinks]
    options = {"scaling": f["scaling"], "softcap": f["softcap"], "pairs": f["pairs"]}
    return tensors, options, lambda got: contracts.ragged_attention(got, *tensors, **options)


BUILD: dict[str, Callable[[Fields], Call]] = {
    "gating_topk": gating_topk,
    "expert_scores": expert_scores,
    "expected_attention": expected_attention,
    "project_tokens": project_tokens,
    "mix_scores": mix_scores,
    "select_kept": select_kept,
    "kv_compact_": kv_compact_,
    "quantize_pairs": quantize_pairs,
    "fold_pairs": fold_pairs,
    "ragged_attention": ragged_attention,
}
DRAW = {name: globals()[f"draw_{name}"] for name in BUILD}

"""Quantised rows for the tests, and a second telling of what they say: matrices and loops, fp64."""

import functools
import math
from typing import Any

import torch
from ragged_cases import make_case, oracle
from torch import Tensor

from moekv.ops import reference

QUANTISED = ("k8v8", "k8v4", "k4v4")


@functools.cache
def transform(dim: int) -> Tensor:
    """The matrix [dim, dim] that undoes the transform of 4 bits."""
    block = max(2**i for i in range(12) if dim % 2**i == 0)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return torch.block_diag(*[torch.tensor(signs, dtype=torch.float64)] * (dim // block))


def decode_row(codes: list[int], scales: list[float], bits: int, dim: int) -> Tensor:
    """One key or value [dim] of its bytes and scales."""
    if bits == 8:
        signed = [code - 256 if code > 127 else code for code in codes]
        return torch.tensor(signed, dtype=torch.float64) * scales[0]
    numbers = []
    for group in range(math.ceil(dim / 32)):
        size = min(32, dim - 32 * group)
        packed = codes[16 * group : 16 * group + size // 2]
        lo, step = scales[2 * group : 2 * group + 2]
        nibbles = [byte % 16 for byte in packed] + [byte // 16 for byte in packed]
        numbers += [lo + step * nibble for nibble in nibbles]
    return transform(dim) @ torch.tensor(numbers, dtype=torch.float64)


def decode(
    key_codes: Tensor, value_codes: Tensor, scales: Tensor, pairs: str, key_dim: int, value_dim: int
) -> tuple[Tensor, Tensor]:
    """The keys and values of rows; those of the same bytes are decoded once, which takes long."""
    parts = key_codes, value_codes, scales
    key = *(part.contiguous().numpy().tobytes() for part in parts), pairs, key_dim, value_dim
    if key not in _decoded:
        _decoded[key] = _decode(*parts, pairs, key_dim, value_dim)
    return _decoded[key]


_decoded: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}


def _decode(
    key_codes: Tensor, value_codes: Tensor, scales: Tensor, pairs: str, key_dim: int, value_dim: int
) -> tuple[Tensor, Tensor]:
    key_scales = 1 if pairs[1] == "8" else 2 * math.ceil(key_dim / 32)
    rows = [
        (
            decode_row(k, s[:key_scales], int(pairs[1]), key_dim),
            decode_row(v, s[key_scales:], int(pairs[3]), value_dim),
        )
        for k, v, s in zip(key_codes.tolist(), value_codes.tolist(), scales.tolist(), strict=True)
    ]
    if not rows:
        empty = torch.zeros(0, dtype=torch.float64)
        return empty.view(0, key_dim), empty.view(0, value_dim)
    keys, values = zip(*rows, strict=True)
    return torch.stack(keys), torch.stack(values)


def quantised(case: dict[str, Tensor], pairs: str) -> dict[str, Tensor | str]:
    """The same case with quantised rows."""
    if pairs == "16":
        return case
    codes = reference.quantize_pairs(case["keys"], case["values"], pairs=pairs)
    return case | dict(zip(("keys", "values", "scales"), codes, strict=True)) | {"pairs": pairs}


def expected(case: dict, value_dim: int, **options) -> Tensor:
    """What ``ragged_attention`` is to give."""
    plain = dict(case)
    pairs = plain.pop("pairs", "16")
    if pairs != "16":
        coded = plain["keys"], plain["values"], plain.pop("scales")
        dims = plain["query"].shape[-1], value_dim
        plain["keys"], plain["values"] = decode(*coded, pairs, *dims)
    return oracle(**plain, **options)


def make_rows(pairs: str, dtype: torch.dtype, bias: bool, sinks: bool, **shape) -> dict:
    """A case whose rows are stored so, some of them hidden."""
    case = make_case(**shape)
    generator = torch.Generator().manual_seed(len(case["keys"]))
    case = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.items()}
    if bias:
        drawn = torch.randn(len(case["keys"]), generator=generator)
        case["bias"] = torch.where(drawn < -0.5, -math.inf, drawn).half()
    if sinks:
        drawn = torch.randn(case["query"].shape[1], generator=generator)
        case["sinks"] = torch.where(drawn < -1, -math.inf, drawn)
    return quantised(case, pairs)

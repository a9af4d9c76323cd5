"""What quantised rows say, and what ``quantize_pairs`` promises, in float64."""

from collections.abc import Sequence

import numpy as np
import torch
from op_bounds import UNIT, Array, exact
from torch import Tensor

GROUP = 32


def mixing(dim: int) -> Array:
    """Sums and differences over blocks, as a matrix [dim, dim]."""
    block = dim & -dim
    small = np.ones((1, 1))
    while len(small) < block:
        small = np.block([[small, small], [small, -small]])
    return np.kron(np.eye(dim // block), small)


def numbers(codes: Tensor, scales: Tensor, bits: int, dim: int) -> Array:
    """What the codes [N, bytes] are, in 4 bits before the transform is undone."""
    stored, scale = codes.numpy().astype(np.int64), exact(scales)
    if bits == 8:
        return np.where(stored > 127, stored - 256, stored) * scale
    rows = np.zeros((len(stored), dim))
    for group in range(-(-dim // GROUP)):
        first = group * GROUP
        half = min(GROUP, dim - first) // 2
        packed = stored[:, first // 2 : first // 2 + half]
        code = np.concatenate([packed % 16, packed // 16], 1)
        rows[:, first : first + 2 * half] = (
            scale[:, 2 * group, None] + scale[:, 2 * group + 1, None] * code
        )
    return rows


def split(scales: Tensor, pairs: str, key_dim: int) -> tuple[Tensor, Tensor]:
    keys = 1 if pairs[1] == "8" else 2 * -(-key_dim // GROUP)
    return scales[:, :keys], scales[:, keys:]


def quantize_pairs(got: Sequence[Tensor], keys: Tensor, values: Tensor, *, pairs: str) -> None:
    *codes, scales = got
    assert [x.dtype for x in got] == [torch.uint8, torch.uint8, torch.float16]
    parts = split(scales, pairs, keys.shape[1])
    for name, rows, code, scale, bits in zip(
        ("keys", "values"),
        (keys, values),
        codes,
        parts,
        (int(pairs[1]), int(pairs[3])),
        strict=True,
    ):
        row, dim = exact(rows), rows.shape[1]
        assert code.shape == (len(rows), dim * bits // 8), name
        size = np.abs(row)
        half = exact(scale)
        if bits == 4:
            matrix = mixing(dim) / (dim & -dim)
            row, size = row @ matrix, size @ np.abs(matrix)
            half = half[:, 1::2].repeat(GROUP, 1)[:, :dim]
        lost = np.isnan(exact(scale)).any(1)
        assert (np.isnan(exact(scale)).all(1) == lost).all(), f"{name}: some scales are NaN"
        # Far within float16 all is kept, and nothing beyond it.
        fits = np.isfinite(row).all(1) & (size.max(1, initial=0) < (6e4 if bits == 4 else 7e6))
        assert not lost[fits].any(), f"{name}: numbers of float16 are lost"
        assert lost[~np.isfinite(row).all(1)].all(), f"{name}: NaN or infinity is kept"
        assert not code.numpy()[lost].any(), f"{name}: codes of what is lost"
        kept = ~lost
        away = np.abs(numbers(code[kept], scale[kept], bits, dim) - row[kept])
        allowed = half[kept] * (0.5 + 1e-5) + 16 * UNIT * size[kept].max(1, initial=0)[:, None]
        assert (away <= allowed).all(), f"{name}: {away.max()} away, allowed half a step"


def fold_pairs(
    got: Sequence[Tensor],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    start: Tensor | None,
    *,
    scaling: float,
    softcap: float,
    gate: float,
    least: float,
) -> None:
    """Who may join whom, and that kept pairs become a mean of what has joined them."""
    folded, bias, joined = got
    batch, heads, length, dim = values.shape
    assert [x.dtype for x in got] == [values.dtype, torch.float16, torch.int32]
    assert folded.shape == (len(indices), dim) and joined.shape == (batch, heads, length)
    bounds, rows, ends = offsets.tolist(), exact(values), exact(folded)
    for row in range(batch * heads):
        b, h = divmod(row, heads)
        first = 0 if start is None else min(max(int(start[b]), 0), length)
        mine = indices[bounds[row] : bounds[row + 1]].long()
        to = joined[b, h]
        assert (to[mine] == -1).all() and (to[:first] == -1).all(), "kept or padding has joined"
        who = (to != -1).nonzero().flatten()
        assert ((to[who] >= bounds[row]) & (to[who] < bounds[row + 1])).all(), "another head's pair"
        assert values[b, h, who].isfinite().all(), "a value that is none has joined"
        for i in range(bounds[row], bounds[row + 1]):
            own = rows[b, h, int(indices[i])]
            members = rows[b, h, (to == i).nonzero().flatten().numpy()]
            if not len(members):
                assert np.array_equal(ends[i], own, equal_nan=True) and float(bias[i]) == 0
                continue
            assert 0 <= float(bias[i]) <= np.log1p(len(members)) + 2e-3
            every = np.concatenate([members, own[None]])
            size = np.abs(every).max(0)
            slack = (2.0**-7 if values.dtype != torch.float32 else 1e-5) * size + 1e-7
            good = (ends[i] >= every.min(0) - slack) & (ends[i] <= every.max(0) + slack)
            assert (good | ~np.isfinite(own)).all(), "no mean of its members"

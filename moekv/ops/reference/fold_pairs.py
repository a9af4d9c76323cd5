"""Reference of ``fold_pairs``."""

import torch
from torch import Tensor

from moekv.ops import row_checks
from moekv.ops.reference.common import assert_on_cpu, widened
from moekv.ops.reference.precision import exact

_TILE = 128  # evicted pairs at a time: bounds the memory of their cosines with all others
_MOST_VALUE = torch.finfo(torch.float16).max  # what is beyond would spread to whom it joins
_LEAST_SHARE = 1e-18  # its square is a normal number; what is below counts as 0


@exact
def fold_pairs(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    start: Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
    gate: float = 0.0,
    least: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge every pair that is not kept with the kept one that queries look at alike."""
    rows = indices, offsets, start
    row_checks.fold_pairs(queries, keys, values, *rows, scaling, softcap, gate, least)
    batch, num_heads, num_keys = keys.shape[:3]
    counts = offsets.diff()
    assert_on_cpu(
        (offsets[:1] == 0).all() & (counts >= 0).all() & (offsets[-1:] == len(indices)).all(),
        f"moekv::fold_pairs: expected offsets from 0 to {len(indices)}, ascending",
    )
    head = torch.arange(batch * num_heads, device=keys.device)
    head = head.repeat_interleave(counts, output_size=len(indices))
    inside = (indices >= 0) & (indices < num_keys)
    ascends = (indices.diff() > 0) | (head.diff() > 0)
    assert_on_cpu(
        inside.all() & ascends.all(),
        f"moekv::fold_pairs: expected ascending indices within {num_keys} positions",
    )
    place = head * num_keys + indices
    row = torch.full((batch * num_heads * num_keys,), -1, dtype=torch.int32, device=keys.device)
    row[place] = torch.arange(len(indices), dtype=torch.int32, device=keys.device)
    row = row.view(batch, num_heads, num_keys)
    if row.numel() == 0:
        folded = values.new_empty(len(indices), values.shape[3])
        return folded, folded.new_empty(len(indices), dtype=torch.float16), row

    position = torch.arange(num_keys, device=keys.device)
    real = position >= (0 if start is None else start.clamp(0, num_keys).view(-1, 1, 1))
    real = real.expand(batch, num_heads, num_keys)
    shares = _shares(queries, keys, real, scaling, softcap)
    looks = shares.mean(2)
    norms = shares.norm(dim=2, keepdim=True)
    patterns = (shares / torch.where(norms > 0, norms, 1.0)).bfloat16()
    patterns = patterns.to(shares.dtype).masked_fill(~real[:, :, None], 0.0)
    others = patterns.masked_fill((row < 0)[:, :, None], 0.0)
    best, nearest = (
        torch.cat(parts, 2)
        for parts in zip(
            *((tile.mT @ others).max(-1) for tile in torch.split(patterns, _TILE, 3)), strict=True
        )
    )
    wide = widened(values)
    seen = looks >= least / real.sum(-1, keepdim=True).clamp(min=1)
    joins = (row < 0) & real & seen & (best > gate) & (wide.abs() <= _MOST_VALUE).all(-1)
    weights = (looks / looks.gather(2, nearest)).clamp(max=1.0)
    weights = torch.where(joins & (weights > 0), weights, 0.0).to(wide.dtype)
    joined = torch.where(weights > 0, row.gather(2, nearest), -1)

    total = torch.ones_like(weights).scatter_add(2, nearest, weights)
    every = nearest[..., None].expand_as(wide)
    shared = torch.where(weights[..., None] > 0, weights[..., None] * wide, 0.0)
    sums = wide.scatter_add(2, every, shared)
    folded = (sums / total[..., None]).flatten(0, 2)[place]
    bias = total.log().flatten()[place].half()
    return folded.to(values.dtype), bias, joined


def _shares(queries: Tensor, keys: Tensor, real: Tensor, scaling: float, softcap: float) -> Tensor:
    """Give the attention [B, H, G * M, T] of every query over all real keys."""
    batch, num_heads, num_keys, dim = keys.shape
    asked = queries.shape[1] // num_heads * queries.shape[2]
    grouped = widened(queries).reshape(batch, num_heads, asked, dim)
    products = grouped @ widened(keys).mT
    logits = scaling * products
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~real[:, :, None], -torch.inf)
    shares = logits.softmax(-1)
    return shares.masked_fill(~real[:, :, None] | (shares < _LEAST_SHARE), 0.0)

"""Reference of ``ragged_attention``."""

import torch
from torch import Tensor

from moekv.ops import row_checks
from moekv.ops.reference.common import TILE, assert_on_cpu, widened
from moekv.ops.reference.precision import exact
from moekv.ops.reference.quantize_pairs import dequantize_pairs


@exact
def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    tail_keys: Tensor | None = None,
    tail_values: Tensor | None = None,
    mask: Tensor | None = None,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
    pairs: str = "16",
) -> Tensor:
    """Attention over each head's own stored rows and the dense tail behind them."""
    arguments = query, keys, values, begin, end, tail_keys, tail_values, mask, scales, bias, sinks
    row_checks.ragged_attention(*arguments, scaling, softcap, pairs)
    num_stored = keys.shape[0]
    assert_on_cpu(
        ((begin >= 0) & (begin <= end) & (end <= num_stored)).all(),
        f"moekv::ragged_attention: expected 0 <= begin <= end <= {num_stored} stored rows",
    )
    num_queries = query.shape[2]
    groups = query.shape[1] // begin.shape[1]
    q = widened(query) * scaling
    value_dim = values.shape[1] * (1 if pairs == "16" else 8 // int(pairs[3]))

    def rows(first: int) -> tuple[Tensor, Tensor]:
        """Return a tile of the stored keys and values as numbers."""
        k, v = keys[first : first + TILE], values[first : first + TILE]
        if scales is None:
            return widened(k), widened(v)
        return dequantize_pairs(
            k,
            v,
            scales[first : first + TILE],
            pairs=pairs,
            head_dim=query.shape[3],
            value_dim=value_dim,
            dtype=q.dtype,
        )

    def fold(
        state: tuple[Tensor, Tensor, Tensor],
        scores: Tensor,
        seen: Tensor,
        v: Tensor,
        offset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add a tile of keys to the running (maximum, sum of weights, weighted values)."""
        highest, total, mixed = state
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if offset is not None:
            scores = scores + offset
        scores = scores.masked_fill(~seen, -torch.inf)
        new = torch.maximum(highest, scores.amax(-1, keepdim=True))
        shift = torch.where(new == -torch.inf, 0.0, new)
        weights = (scores - shift).exp()
        keep = (highest - shift).exp()
        mixed = mixed * keep + _seen_values(weights, seen, v)
        return new, total * keep + weights.sum(-1, keepdim=True), mixed

    state = (
        q.new_full((*q.shape[:3], 1), -torch.inf),
        q.new_zeros((*q.shape[:3], 1)),
        q.new_zeros((*q.shape[:3], value_dim)),
    )
    # Every head looks at all stored rows and ignores those of others: no length has to be known.
    first, last = (x.repeat_interleave(groups, 1)[:, :, None, None] for x in (begin, end))
    for tile in range(0, num_stored, TILE):
        k, v = rows(tile)
        row = torch.arange(tile, tile + k.shape[0], device=keys.device)
        seen = (row >= first) & (row < last)
        offset = None
        if bias is not None:
            offset = bias[tile : tile + TILE]
            seen = seen & (offset != -torch.inf)
        state = fold(state, q @ k.T, seen, v, offset)
    if tail_keys is not None and tail_values is not None:
        k, v = (widened(x).repeat_interleave(groups, 1) for x in (tail_keys, tail_values))
        num_tail = k.shape[2]
        position = torch.arange(num_tail, device=keys.device)
        latest = num_tail - num_queries + torch.arange(num_queries, device=keys.device)
        seen = position <= latest[:, None]
        if mask is not None:
            seen = seen & mask
        state = fold(state, q @ k.mT, seen, v)
    highest, total, mixed = state
    if sinks is not None:  # a key without a value, for queries that see any other
        sink = widened(sinks)[:, None, None].to(q.dtype)
        new = torch.maximum(highest, torch.where(highest == -torch.inf, highest, sink))
        shift = torch.where(new == -torch.inf, 0.0, new)
        keep = (highest - shift).exp()
        mixed, total = mixed * keep, total * keep + (sink - shift).exp()
    output = torch.where(total > 0, mixed / torch.where(total > 0, total, 1.0), mixed)
    return output.transpose(1, 2).to(query.dtype).contiguous()


def _seen_values(weights: Tensor, seen: Tensor, values: Tensor) -> Tensor:
    """``weights @ values`` over what is seen: 0 times NaN is not 0."""
    number = values.isfinite()
    mixed = weights @ torch.where(number, values, 0.0)
    others = torch.cat([values == torch.inf, values == -torch.inf, values.isnan()], -1)
    up, down, nan = (seen.to(weights.dtype) @ others.to(weights.dtype)).chunk(3, -1)
    mixed = torch.where(up > 0, mixed + torch.inf, mixed)
    mixed = torch.where(down > 0, mixed - torch.inf, mixed)
    return torch.where(nan > 0, torch.nan, mixed)

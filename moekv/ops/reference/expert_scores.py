"""Reference of ``expert_scores``."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moekv.ops import checks
from moekv.ops.reference.common import LEAST_NORM, TILE, widened
from moekv.ops.reference.precision import exact

MASS, ATTENTION, DIVERSITY, LAG = range(4)

_LEAST_SHARE = 1e-20


_LAG_EPSILON = 1e-6


@exact
def expert_scores(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    start: Tensor | None = None,
    *,
    kinds: Sequence[int],
    scaling: float,
    softcap: float = 0.0,
    pool: int = 1,
    lag: int = 128,
) -> Tensor:
    """Scores [len(kinds), B, H, T] of the cached pairs, one slice per kind."""
    checks.expert_scores(keys, values, queries, start, kinds, scaling, softcap, pool, lag)
    batch, num_kv_heads, num_keys, _ = keys.shape
    if start is None:
        start = torch.zeros(batch, dtype=torch.int32, device=keys.device)
    start = start.long().clamp(0, num_keys)[:, None, None]
    position = torch.arange(num_keys, device=keys.device)
    real = position >= start  # [B, 1, T]

    results = {}
    if MASS in kinds or ATTENTION in kinds:
        mass = _mass(keys, queries, start, scaling, softcap)
        results[MASS] = mass
        results[ATTENTION] = _attention(mass, start, queries.shape[2], pool)
    if DIVERSITY in kinds:
        results[DIVERSITY] = _diversity(keys, real)
    if LAG in kinds:
        results[LAG] = _lag(keys, values, start, lag)
    padding_score = {MASS: 0.0}
    scores = [torch.where(real, results[i], padding_score.get(i, -torch.inf)) for i in kinds]
    if not scores:
        return widened(keys).new_empty(0, batch, num_kv_heads, num_keys)
    return torch.stack(scores)


def _mass(keys: Tensor, queries: Tensor, start: Tensor, scaling: float, softcap: float) -> Tensor:
    """Mean attention [B, H, T] that the real window queries pay to each key."""
    batch, num_kv_heads, num_keys, head_dim = keys.shape
    num_queries = queries.shape[2]
    group = queries.shape[1] // num_kv_heads
    rows = widened(queries).reshape(batch, num_kv_heads, group * num_queries, head_dim)
    window = torch.arange(num_keys - num_queries, num_keys, device=keys.device)
    query_position = window.repeat(group)[:, None]  # [G * W, 1]
    real_query = query_position >= start[..., None]  # [B, 1, G * W, 1]

    def logits(begin: int) -> tuple[Tensor, Tensor]:
        tile = widened(keys[:, :, begin : begin + TILE])
        position = torch.arange(begin, begin + tile.shape[2], device=keys.device)
        seen = (position <= query_position) & (position >= start[..., None]) & real_query
        s = scaling * (rows @ tile.transpose(-1, -2))
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        return torch.where(seen, s, -torch.inf), seen

    peak = rows.new_full((*rows.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(peak)
    for begin in range(0, num_keys, TILE):
        s, _ = logits(begin)
        new_peak = torch.maximum(peak, s.amax(-1, keepdim=True))
        shift = torch.where(new_peak == -torch.inf, 0.0, new_peak)
        total = total * (peak - shift).exp() + (s - shift).exp().sum(-1, keepdim=True)
        peak = new_peak
    num_rows = group * real_query[:, :, :num_queries].sum(2).clamp(min=1)

    columns = []
    for begin in range(0, num_keys, TILE):
        s, seen = logits(begin)
        probs = torch.where(seen, (s - peak).exp() / total, 0.0)
        columns.append(probs.sum(2) / num_rows)
    return torch.cat(columns, -1) if columns else rows.new_empty(batch, num_kv_heads, 0)


def _attention(mass: Tensor, start: Tensor, num_queries: int, pool: int) -> Tensor:
    """Log of the attention that a query which sees the key pays to it, smoothed."""
    num_keys = mass.shape[-1]
    if num_keys == 0:
        return mass
    position = torch.arange(num_keys, device=mass.device)
    real = position >= start
    first_query = start.clamp(min=num_keys - num_queries)
    num_real = num_keys - first_query
    num_seeing = num_keys - torch.maximum(position, first_query)
    attention = torch.where(real, mass * num_real / num_seeing.clamp(min=1), 0.0)

    reach = min(pool // 2, num_keys)
    mean = _pooled(attention, reach) / _pooled(real.to(mass.dtype), reach)
    return mean.clamp(min=_LEAST_SHARE).log()


def _pooled(x: Tensor, reach: int) -> Tensor:
    """Sum the positions within ``reach`` along the last dimension, in linear time.

    A sum up to a multiple of the pool's width and one from there on: nothing is taken away again,
    so that the little that is left where much was is exact.
    """
    num_keys, width = x.shape[-1], 2 * reach + 1
    behind = reach + -(num_keys + 2 * reach) % width
    padded = functional.pad(x, (reach, behind))
    parts = padded.view(*padded.shape[:-1], padded.shape[-1] // width, width)
    up_to = parts.cumsum(-1).flatten(-2)[..., 2 * reach :][..., :num_keys]
    from_on = parts.flip(-1).cumsum(-1).flip(-1).flatten(-2)[..., :num_keys]
    whole = torch.arange(num_keys, device=x.device) % width == 0
    return from_on + up_to.masked_fill(whole, 0.0)


def _diversity(keys: Tensor, real: Tensor) -> Tensor:
    """Minus the cosine with the mean direction of the row's keys (KeyDiff, arXiv:2504.15364)."""

    def directions(begin: int) -> Tensor:
        tile = widened(keys[:, :, begin : begin + TILE])
        tile = torch.where(real[:, :, begin : begin + TILE, None], tile, 0.0)
        return functional.normalize(tile, dim=-1, eps=LEAST_NORM)

    begins = range(0, keys.shape[2], TILE)
    mean = widened(keys.new_zeros(*keys.shape[:2], keys.shape[3], 1))
    for begin in begins:
        mean = mean + directions(begin).sum(2)[..., None]
    count = real.sum(-1).clamp(min=1)[..., None, None]
    mean = functional.normalize(mean / count, dim=2, eps=LEAST_NORM)
    tiles = [-(directions(begin) @ mean).squeeze(-1) for begin in begins]
    return torch.cat(tiles, -1) if tiles else widened(keys).new_empty(keys.shape[:3])


def _lag(keys: Tensor, values: Tensor, start: Tensor, lag: int) -> Tensor:
    """Spread over channels, relative to the next partition (LagKV, arXiv:2504.04704)."""
    batch, num_kv_heads, num_keys, _ = keys.shape
    if num_keys == 0:
        return widened(keys).new_empty(keys.shape[:3])
    lag = min(lag, num_keys)
    length = (num_keys - start)[..., None]  # [B, 1, 1, 1]

    def gather(x: Tensor, position: Tensor) -> Tensor:
        index = position.clamp(max=num_keys - 1).flatten(2)[..., None]  # [B, 1, P * lag, 1]
        gathered = widened(x.gather(2, index.expand(-1, num_kv_heads, -1, x.shape[-1])))
        return gathered.view(*gathered.shape[:2], *position.shape[2:], x.shape[-1])

    def tail_range(x: Tensor) -> tuple[Tensor, Tensor]:
        tail = widened(x[:, :, num_keys - lag :])
        padding = (torch.arange(num_keys - lag, num_keys, device=x.device) < start)[..., None]
        low = tail.masked_fill(padding, torch.inf).amin(2)
        high = tail.masked_fill(padding, -torch.inf).amax(2)
        return low[:, :, None, None], high[:, :, None, None]

    tail_ranges = tail_range(keys), tail_range(values)
    tile = lag * max(1, TILE // lag)
    tiles = []
    for begin in range(0, num_keys, tile):
        # Relative to the row's start; a row that is shorter has nothing there.
        inside = torch.arange(begin, begin + tile, device=keys.device).view(-1, lag)
        first = inside[:, :1]
        position = start[..., None] + inside
        has_next = (first + 2 * lag <= length)[..., None]  # [B, 1, P, 1, 1]
        shares = []
        for x, (tail_low, tail_high) in zip((keys, values), tail_ranges, strict=True):
            following = gather(x, position + lag)
            low = torch.where(has_next, following.amin(3, keepdim=True), tail_low)
            high = torch.where(has_next, following.amax(3, keepdim=True), tail_high)
            scaled = (gather(x, position) - low) / (high - low + _LAG_EPSILON)
            deviation = scaled - scaled.mean(-1, keepdim=True)
            spread = (deviation.square().sum(-1) / max(x.shape[-1] - 1, 1)).sqrt()
            shares.append(spread.masked_fill(inside >= length, -torch.inf).softmax(-1))
        size = (length - first).clamp(max=lag)
        tiles.append(((shares[0] + shares[1]) / 2 * size).clamp(min=_LEAST_SHARE).log().flatten(2))
    back = (torch.arange(num_keys, device=keys.device) - start).clamp(min=0)
    return torch.cat(tiles, -1).gather(-1, back.expand(batch, num_kv_heads, num_keys))

"""What every op of moekv computes, in plain PyTorch.

Same argument order as the schemas of ``torch.ops.moekv``, any device, nothing that synchronises
with the host. Arithmetic is fp32, or fp64 on fp64 inputs: so the tests get a reference in higher
precision. ``docs/design.md`` says in words what stands here in code.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moekv import _checks

MASS, ATTENTION, DIVERSITY, LAG = range(4)

REACH = 4
"""Pairs behind its own that a query is asked about in expected attention."""

SINKS = 4
"""First keys, which take much of every attention."""

SAMPLES = 60
"""Keys that stand for all others in the softmax's sum."""

_FLOAT_MAX = torch.finfo(torch.float32).max
_LEAST_SHARE = 1e-20
_LEAST_SQUARE = 1e-36  # its root is a normal number
_LEAST_NORM = 1e-12
_LAG_EPSILON = 1e-6
_LEAST_SPREAD = 1e-4
_TILE = 1024  # keys at a time: bounds the memory beside the output


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _assert_on_cpu(condition: Tensor, message: str) -> None:
    """Raise where the condition does not hold; on other devices that would be to wait for it."""
    if condition.device.type == "cpu":
        torch._assert_async(condition, message)


def gate_probs(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities [N, E] of the experts."""
    z = _wide(logits) / temperature
    z = torch.where(z.isnan(), -torch.inf, z).clamp(max=_FLOAT_MAX)
    hopeless = (z == -torch.inf).all(-1, keepdim=True)
    return torch.where(hopeless, 0.0, z).softmax(-1)


def slot_counts(importance: Tensor, k: int) -> Tensor:
    """How much each of k slots counts [N, k]: the first one, and others as far as k i reaches."""
    slots = torch.arange(k, device=importance.device)
    counts = (k * importance.nan_to_num(nan=0.0)[:, None] - slots).clamp(0, 1)
    return counts.masked_fill(slots == 0, 1.0)


def gating_topk(
    logits: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    k: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Softmax, biased top-k and load statistics of a router; differentiable in ``logits``."""
    _checks.gating_topk(logits, bias, mask, importance, k, temperature)
    num_tokens, num_experts = logits.shape
    probs = gate_probs(logits, temperature)
    rating = probs.detach()
    if bias is not None:
        rating = rating + torch.where(bias.isnan(), -torch.inf, bias)
    experts = rating.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    counts = torch.ones_like(probs[:, :k]) if importance is None else slot_counts(importance, k)
    chosen = probs.gather(-1, experts) * counts
    total = chosen.sum(-1, keepdim=True)
    even = counts / counts.sum(-1, keepdim=True)
    weights = torch.where(total > 0, chosen / torch.where(total > 0, total, 1.0), even)
    used = counts > 0
    if mask is not None:
        real = mask[:, None]
        weights = weights.masked_fill(~real, 0.0)
        experts = torch.where(real, experts, torch.arange(k, device=logits.device))
        probs = probs.masked_fill(~real, 0.0)
        used = used & real
    load = torch.zeros(num_experts, dtype=torch.int64, device=logits.device)
    load.scatter_add_(0, experts.flatten(), used.flatten().long())
    entropy = torch.special.entr(probs.detach()).sum()
    return weights, experts.int(), probs.sum(0), load, entropy


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
    _checks.expert_scores(keys, values, queries, start, kinds, scaling, softcap, pool, lag)
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
        return _wide(keys).new_empty(0, batch, num_kv_heads, num_keys)
    return torch.stack(scores)


def _mass(keys: Tensor, queries: Tensor, start: Tensor, scaling: float, softcap: float) -> Tensor:
    """Mean attention [B, H, T] that the real window queries pay to each key."""
    batch, num_kv_heads, num_keys, head_dim = keys.shape
    num_queries = queries.shape[2]
    group = queries.shape[1] // num_kv_heads
    rows = _wide(queries).reshape(batch, num_kv_heads, group * num_queries, head_dim)
    window = torch.arange(num_keys - num_queries, num_keys, device=keys.device)
    query_position = window.repeat(group)[:, None]  # [G * W, 1]
    real_query = query_position >= start[..., None]  # [B, 1, G * W, 1]

    def logits(begin: int) -> tuple[Tensor, Tensor]:
        tile = _wide(keys[:, :, begin : begin + _TILE])
        position = torch.arange(begin, begin + tile.shape[2], device=keys.device)
        seen = (position <= query_position) & (position >= start[..., None]) & real_query
        s = scaling * (rows @ tile.transpose(-1, -2))
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        return torch.where(seen, s, -torch.inf), seen

    peak = rows.new_full((*rows.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(peak)
    for begin in range(0, num_keys, _TILE):
        s, _ = logits(begin)
        new_peak = torch.maximum(peak, s.amax(-1, keepdim=True))
        shift = torch.where(new_peak == -torch.inf, 0.0, new_peak)
        total = total * (peak - shift).exp() + (s - shift).exp().sum(-1, keepdim=True)
        peak = new_peak
    num_rows = group * real_query[:, :, :num_queries].sum(2).clamp(min=1)

    columns = []
    for begin in range(0, num_keys, _TILE):
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

    def window_mean(x: Tensor) -> Tensor:
        return functional.avg_pool1d(x, pool, stride=1, padding=pool // 2)

    mean = window_mean(attention) / window_mean(real.to(mass.dtype))
    return mean.clamp(min=_LEAST_SHARE).log()


def _diversity(keys: Tensor, real: Tensor) -> Tensor:
    """Minus the cosine with the mean direction of the row's keys (KeyDiff, arXiv:2504.15364)."""

    def directions(begin: int) -> Tensor:
        tile = _wide(keys[:, :, begin : begin + _TILE])
        tile = torch.where(real[:, :, begin : begin + _TILE, None], tile, 0.0)
        return functional.normalize(tile, dim=-1, eps=_LEAST_NORM)

    begins = range(0, keys.shape[2], _TILE)
    mean = _wide(keys.new_zeros(*keys.shape[:2], keys.shape[3], 1))
    for begin in begins:
        mean = mean + directions(begin).sum(2)[..., None]
    count = real.sum(-1).clamp(min=1)[..., None, None]
    mean = functional.normalize(mean / count, dim=2, eps=_LEAST_NORM)
    tiles = [-(directions(begin) @ mean).squeeze(-1) for begin in begins]
    return torch.cat(tiles, -1) if tiles else _wide(keys).new_empty(keys.shape[:3])


def _lag(keys: Tensor, values: Tensor, start: Tensor, lag: int) -> Tensor:
    """Spread over channels, relative to the next partition (LagKV, arXiv:2504.04704)."""
    batch, num_kv_heads, num_keys, _ = keys.shape
    if num_keys == 0:
        return _wide(keys).new_empty(keys.shape[:3])
    lag = min(lag, num_keys)
    length = (num_keys - start)[..., None]  # [B, 1, 1, 1]

    def gather(x: Tensor, position: Tensor) -> Tensor:
        index = position.clamp(max=num_keys - 1).flatten(2)[..., None]  # [B, 1, P * lag, 1]
        gathered = _wide(x.gather(2, index.expand(-1, num_kv_heads, -1, x.shape[-1])))
        return gathered.view(*gathered.shape[:2], *position.shape[2:], x.shape[-1])

    def tail_range(x: Tensor) -> tuple[Tensor, Tensor]:
        tail = _wide(x[:, :, num_keys - lag :])
        padding = (torch.arange(num_keys - lag, num_keys, device=x.device) < start)[..., None]
        low = tail.masked_fill(padding, torch.inf).amin(2)
        high = tail.masked_fill(padding, -torch.inf).amax(2)
        return low[:, :, None, None], high[:, :, None, None]

    tail_ranges = tail_range(keys), tail_range(values)
    tile = lag * max(1, _TILE // lag)
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


def sample_places(length: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the keys that stand for all of a row, and how many each stands for.

    Short rows are taken whole. Longer ones have one place in each of ``SAMPLES`` equal parts,
    which repeats nowhere (the fractions of multiples of the golden ratio), so that no rhythm of the
    text is in step with it.

    Parameters
    ----------
    length : Tensor [...], int64

    Returns
    -------
    tuple of two Tensor [..., SINKS + SAMPLES]
        Places, int64, from 0, and weights, float32: 0 where a row has fewer keys.
    """
    length = length[..., None]
    i = torch.arange(SINKS + SAMPLES, device=length.device)
    part = i - SINKS
    fixed_point = part * 65536 + part * 40503 % 65536
    place = SINKS + fixed_point * (length - SINKS) // (SAMPLES * 65536)
    whole = length <= SINKS + SAMPLES
    place = torch.where(whole | (part < 0), i, place)
    weight = torch.where(part < 0, 1.0, (length - SINKS) / SAMPLES)
    return place, torch.where(whole, (i < length).float(), weight)


def expected_attention(
    queries: Tensor,
    keys: Tensor,
    start: Tensor | None = None,
    *,
    scaling: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """Log of the attention [B, H, T] that pairs get from the queries of the tokens before them."""
    _checks.expected_attention(queries, keys, start, scaling, softcap)
    batch, num_heads, num_keys, dim = keys.shape
    if keys.numel() == 0:
        return _wide(keys).new_empty(batch, num_heads, num_keys)
    if start is None:
        start = torch.zeros(batch, dtype=torch.int32, device=keys.device)
    start = start.long().clamp(0, num_keys)[:, None]  # [B, 1]
    places, weight = sample_places(num_keys - start[:, 0])
    places = (start + places).clamp(max=num_keys - 1)[:, None, :, None]
    sample = _wide(keys.gather(2, places.expand(-1, num_heads, -1, dim)))
    weight = weight[:, None, None, None]  # [B, 1, 1, 1, S]
    sampled = (num_keys - start > SINKS + SAMPLES)[..., None, None]  # [B, 1, 1, 1]
    near = functional.pad(keys, (0, 0, 0, REACH)).unfold(2, REACH + 1, 1)  # [B, H, T, D, REACH + 1]
    queries = queries.view(batch, num_heads, -1, num_keys, dim)
    position = torch.arange(num_keys, device=keys.device)

    def logits(equation: str, a: Tensor, b: Tensor) -> Tensor:
        s = scaling * torch.einsum(equation, _wide(a), _wide(b))
        return softcap * torch.tanh(s / softcap) if softcap > 0 else s

    squares = []
    for begin in range(0, num_keys, _TILE):
        tile, at = queries[:, :, :, begin : begin + _TILE], position[begin : begin + _TILE]
        band = logits("bhgtd,bhtdj->bhgtj", tile, near[:, :, begin : begin + _TILE])
        steps = torch.arange(REACH + 1, device=keys.device)
        band = band.masked_fill(at[:, None] + steps >= num_keys, -torch.inf)
        all_keys = logits("bhgtd,bhsd->bhgts", tile, sample)
        peak = torch.maximum(band.amax(-1), all_keys.amax(-1))[..., None]
        band = (band - peak).exp()
        total = ((all_keys - peak).exp() * weight).sum(-1)
        total = total + band.sum(-1).where(sampled, 0.0)  # the sample may have missed just those
        square = (band / total[..., None]).square().mean(2)
        squares.append(square.where((at >= start)[:, None, :, None], 0.0))
    square = torch.cat(squares, 2)  # [B, H, T, REACH + 1]
    got = [functional.pad(square[..., j], (j, 0))[..., :num_keys] for j in range(REACH + 1)]
    scores = sum(got[1:], got[0]).clamp(min=_LEAST_SQUARE).log() / 2
    return scores.where((position >= start)[:, None], 0.0)


def project_tokens(
    hidden_states: Tensor, weight: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Projections [B, T, P] of the hidden states, and how much each token stands out [B, T]."""
    _checks.project_tokens(hidden_states, weight, mask)
    wide = _wide(hidden_states)
    if mask is None:
        mask = torch.ones(wide.shape[:2], dtype=torch.bool, device=wide.device)
    wide = wide.masked_fill(~mask[..., None], 0.0)
    projected = wide @ _wide(weight).T
    wide = wide.detach()
    directions = functional.normalize(wide, dim=-1, eps=_LEAST_NORM)
    mean_direction = functional.normalize(directions.sum(1), dim=-1, eps=_LEAST_NORM)
    distance = 1 - (directions @ mean_direction[..., None])[..., 0]
    num_real = mask.sum(1, keepdim=True).clamp(min=1)
    mean = distance.where(mask, 0.0).sum(1, keepdim=True) / num_real
    deviation = (distance - mean).where(mask, 0.0)
    std = (deviation.square().sum(1, keepdim=True) / num_real).sqrt()
    return projected, deviation / (std + _LEAST_SPREAD)


def mix_scores(
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Sum [B, H, T] of the chosen experts' scores, each mapped to the common scale and weighted."""
    _checks.mix_scores(scores, weights, experts, gain, offset)
    scores = _wide(scores)
    shape = scores.shape[1:]
    if weights.dim() == 3:
        weights, experts = weights[:, None], experts[:, None]
    _assert_on_cpu(
        ((experts >= 0) & (experts < len(scores))).all(),
        f"moekv::mix_scores: expected experts between 0 and {len(scores) - 1}",
    )
    mixed = scores.new_zeros(shape)
    for j in range(weights.shape[-1]):
        weight = weights[..., j]
        expert = experts[..., j].long().expand(shape)
        term = scores.gather(0, expert[None])[0]
        if gain is not None:
            term = term * gain.permute(1, 2, 0).gather(-1, expert)
        if offset is not None:
            term = term + offset.permute(1, 2, 0).gather(-1, expert)
        mixed = mixed + torch.where(weight == 0, 0.0, weight * term)
    return mixed


def select_kept(
    scores: Tensor,
    start: Tensor | None = None,
    *,
    total: Sequence[int],
    sinks: int = 0,
    window: int = 0,
    floor: int = 1,
) -> tuple[Tensor, Tensor]:
    """Ascending positions of the pairs that each group of rows keeps, and where each row begins."""
    _checks.select_kept(scores, start, total, sinks, window, floor)
    rows = scores.shape[1]
    if start is None:
        start = torch.zeros(scores.shape[:2], dtype=torch.int32, device=scores.device)
    indices = [scores.new_empty(0, dtype=torch.int32)]
    ends = [scores.new_zeros(1, dtype=torch.int32)]
    group = kept = 0
    for count, run in itertools.groupby(total):  # groups with equal totals at once
        groups = slice(group, group := group + len(list(run)))
        share = count // rows
        sink_share = min(sinks, share)
        kept_flat = _kept_of_groups(
            _wide(scores[groups]),
            start[groups].long(),
            count,
            sink_share,
            min(window, share - sink_share),
            min(floor, share),
        )
        indices.append((kept_flat % scores.shape[2]).flatten().int())
        bounds = torch.arange(1, rows + 1, device=scores.device) * scores.shape[2]
        end = torch.searchsorted(kept_flat, bounds.expand(len(kept_flat), rows).contiguous())
        base = kept + count * torch.arange(len(kept_flat), device=scores.device)[:, None]
        ends.append((base + end).flatten().int())
        kept += count * len(kept_flat)
    return torch.cat(indices), torch.cat(ends)


def _kept_of_groups(
    scores: Tensor, start: Tensor, total: int, sinks: int, window: int, floor: int
) -> Tensor:
    """Ascending flat positions [groups, total] in the group's R * T."""
    num_keys = scores.shape[2]
    position = torch.arange(num_keys, device=scores.device)
    first = start.clamp(0, num_keys)[..., None]
    real = position >= first
    number = ~scores.isnan()
    value = torch.where(real & number & (scores != 0), scores, 0.0)  # -0 is +0
    tier = real * (1 + number.long())  # padding, NaN, number; above them: kept in any case

    always = real & ((position < first + sinks) | (position >= num_keys - window))
    in_row = _descending(torch.where(always, 3, tier), value)
    best = torch.zeros_like(always).scatter(-1, in_row[..., :floor], True)
    in_group = _descending(torch.where(always | best, 3, tier).flatten(1), value.flatten(1))
    return in_group[:, :total].sort(dim=-1).values


def _descending(tier: Tensor, value: Tensor) -> Tensor:
    """Order of the last dimension: higher tier, then higher value, then lower position."""
    by_value = value.sort(dim=-1, descending=True, stable=True).indices
    by_tier = tier.gather(-1, by_value).sort(dim=-1, descending=True, stable=True).indices
    return by_value.gather(-1, by_tier)


def kv_compact_(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    packed: bool = False,
) -> None:
    """Move each row's kept pairs to the front, of the row or (``packed``) of the storage."""
    _checks.kv_compact_(keys, values, indices, offsets, packed)
    batch, num_kv_heads, num_keys, _ = keys.shape
    if offsets is None:
        rows = torch.arange(batch * num_kv_heads + 1, device=keys.device)
        offsets = rows * indices.shape[2]
    offsets = offsets.long()
    position = indices.flatten().long()
    item = torch.arange(position.numel(), device=keys.device)
    row = torch.searchsorted(offsets[1:], item, right=True)
    valid = (position >= 0) & (position < num_keys)
    rising = (position.diff() > 0) | (row.diff() > 0)
    ends = (offsets[0] == 0) & (offsets[-1] == position.numel())
    _assert_on_cpu(
        ends & (offsets.diff() >= 0).all(),
        f"moekv::kv_compact_: expected offsets ascending from 0 to {position.numel()}",
    )
    _assert_on_cpu(
        valid.all() & rising.all(),
        f"moekv::kv_compact_: expected indices ascending in each row, between 0 and {num_keys - 1}",
    )
    target = item if packed else row * num_keys + item - offsets[row]
    source = torch.where(valid, row * num_keys + position, target)  # not valid: left in place

    def unravel(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row = flat // num_keys
        return row // num_kv_heads, row % num_kv_heads, flat % num_keys

    for pairs in (keys, values):
        pairs[unravel(target)] = pairs[unravel(source)]


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    tail_keys: Tensor | None = None,
    tail_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
) -> Tensor:
    """Attention over each head's own stored rows and the dense tail behind them."""
    batch, num_query_heads, num_queries, _ = query.shape
    groups = num_query_heads // begin.shape[1]
    q = _wide(query) * scaling

    def fold(
        state: tuple[Tensor, Tensor, Tensor], scores: Tensor, seen: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add a tile of keys to the running (maximum, sum of weights, weighted values)."""
        highest, total, mixed = state
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        new = torch.maximum(highest, scores.amax(-1, keepdim=True))
        shift = torch.where(new == -torch.inf, 0.0, new)
        weights = (scores - shift).exp()
        keep = (highest - shift).exp()
        return new, total * keep + weights.sum(-1, keepdim=True), mixed * keep + weights @ pairs

    state = (
        q.new_full((*q.shape[:3], 1), -torch.inf),
        q.new_zeros((*q.shape[:3], 1)),
        q.new_zeros((*q.shape[:3], values.shape[1])),
    )
    # Every head looks at all stored rows and ignores those of others: no length has to be known.
    first, last = (x.repeat_interleave(groups, 1)[:, :, None, None] for x in (begin, end))
    for tile in range(0, keys.shape[0], _TILE):
        k, v = _wide(keys[tile : tile + _TILE]), _wide(values[tile : tile + _TILE])
        row = torch.arange(tile, tile + k.shape[0], device=keys.device)
        seen = (row >= first) & (row < last)
        state = fold(state, q @ k.T, seen, v)
    if tail_keys is not None and tail_values is not None:
        k, v = (_wide(x).repeat_interleave(groups, 1) for x in (tail_keys, tail_values))
        num_tail = k.shape[2]
        position = torch.arange(num_tail, device=keys.device)
        latest = num_tail - num_queries + torch.arange(num_queries, device=keys.device)
        seen = position <= latest[:, None]
        if mask is not None:
            seen = seen & mask
        state = fold(state, q @ k.mT, seen, v)
    _, total, mixed = state
    output = torch.where(total > 0, mixed / torch.where(total > 0, total, 1.0), mixed)
    return output.transpose(1, 2).to(query.dtype).contiguous()

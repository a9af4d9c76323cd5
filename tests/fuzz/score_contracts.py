"""What ``expert_scores`` and ``expected_attention`` promise."""

from collections.abc import Sequence

import numpy as np
import torch
from op_bounds import (
    UNIT,
    Array,
    but_one,
    exact,
    logits_of,
    near,
    norm,
    same,
    shares_of,
    starts,
    within,
)
from torch import Tensor


def expert_scores(
    got: Tensor,
    clean: Array,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    start: Tensor | None,
    *,
    kinds: Sequence[int],
    scaling: float,
    softcap: float,
    pool: int,
    lag: int,
) -> None:
    """``clean [B, H]``: whether the inputs of a head are finite."""
    batch, heads, num_keys, _ = keys.shape
    assert got.shape == (len(kinds), batch, heads, num_keys) and got.dtype == torch.float32
    group, window = queries.shape[1] // heads, queries.shape[2]
    first = starts(start, batch, num_keys)
    scores = exact(got)
    for b in range(batch):
        length = num_keys - int(first[b])
        for slice_, kind in zip(scores[:, b], kinds, strict=True):
            padding = 0.0 if kind == 0 else -np.inf
            same(
                f"padding of kind {kind}, row {b}: ",
                slice_[:, : first[b]],
                0 * slice_[:, : first[b]] + padding
                if padding == 0
                else np.full_like(slice_[:, : first[b]], padding),
            )
        if length == 0:
            continue
        for h in range(heads):
            if not clean[b, h]:
                continue
            key, value = exact(keys[b, h, first[b] :]), exact(values[b, h, first[b] :])
            for slice_, kind in zip(scores[:, b, h, first[b] :], kinds, strict=True):
                what = f"kind {kind}, row {b}, head {h}: "
                if kind in (0, 1):
                    seen = min(window, length)
                    query = exact(queries[b, h * group : (h + 1) * group, window - seen :])
                    least, most = _mass(query, key, scaling, softcap)
                    if kind == 0:
                        within(what, slice_, least, most)
                        near(what + "sum ", slice_.sum()[None], np.ones(1), 1e-5 + UNIT * length)
                    else:
                        low, high = (_attention(x, seen, pool) for x in (least, most))
                        within(what, slice_, low - 1e-4, high + 1e-4)
                elif kind == 2:
                    near(what, slice_, *_diversity(key))
                else:
                    within(what, slice_, *_lag(key, value, lag))


def _mass(query: Array, key: Array, scaling: float, softcap: float) -> tuple[Array, Array]:
    length, window = len(key), query.shape[1]
    logits, error = logits_of(query, key, scaling, softcap)  # [G, W, T]
    hidden = np.arange(length) > (length - window + np.arange(window))[:, None]
    logits = np.where(hidden, -np.inf, logits)
    _, least, most = shares_of(logits, error)
    return least.mean((0, 1)) - 1e-34, most.mean((0, 1)) + 1e-34


def _attention(mass: Array, window: int, pool: int) -> Array:
    """Log of what is pooled of a bound of the mass."""
    length = len(mass)
    seeing = np.minimum(length - np.arange(length), window)
    attention = np.maximum(mass, 0.0) * window / seeing
    reach = min(pool // 2, length)
    pooled = np.array([attention[max(t - reach, 0) : t + reach + 1].mean() for t in range(length)])
    return np.log(np.maximum(pooled, 1e-20))


def _diversity(key: Array) -> tuple[Array, Array]:
    units = key / norm(key)
    mean = units.mean(0)
    spread = 4e-7 * (4 + np.sqrt(key.shape[-1]))
    tolerance = spread * (1 + 1 / max(float(np.sqrt((mean * mean).sum())), 1e-12))
    return -(units @ (mean / norm(mean))), np.full(len(key), min(tolerance, 2.1))


def _lag(key: Array, value: Array, lag: int) -> tuple[Array, Array]:
    length = len(key)
    bounds = []
    for x in (key, value):
        least, most = np.zeros(length), np.zeros(length)
        for begin in range(0, length, lag):
            here = x[begin : begin + lag]
            whole = begin + 2 * lag <= length
            there = x[begin + lag : begin + 2 * lag] if whole else x[-min(lag, length) :]
            low, high = there.min(0), there.max(0)
            scaled = (here - low) / (high - low + 1e-6)
            spread = scaled.std(-1, ddof=1) if x.shape[-1] > 1 else np.zeros(len(here))
            # Distances are from the first channel: how far it is out is lost in precision.
            far = ((scaled[:, 0] - scaled.mean(-1)) / np.maximum(spread, 1e-12)) ** 2
            size = np.sqrt((scaled * scaled).sum(-1) / max(x.shape[-1] - 1, 1))
            error = (1e-6 + UNIT * np.where(spread > 0, far, 0.0)) * size + 1e-9
            _, down, up = shares_of(spread, error.max() + 0 * error)
            least[begin : begin + lag], most[begin : begin + lag] = down, up
            least[begin : begin + lag] *= len(here)
            most[begin : begin + lag] *= len(here)
        bounds.append((least, most))
    (low_a, high_a), (low_b, high_b) = bounds
    low, high = (low_a + low_b) / 2, (high_a + high_b) / 2
    return tuple(np.log(np.maximum(x, 1e-20)) + slack for x, slack in ((low, -1e-4), (high, 1e-4)))


def expected_attention(
    got: Tensor,
    clean: Array,
    queries: Tensor,
    keys: Tensor,
    start: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    scaling: float,
    softcap: float,
) -> None:
    """``clean [B, H]``: whether the inputs of a head are finite."""
    batch, heads, num_keys, _ = keys.shape
    info = torch.finfo(queries.dtype)
    assert got.shape == (batch, heads, num_keys) and got.dtype == torch.float32
    group = queries.shape[1] // heads
    first = starts(start, batch, num_keys)
    scores = exact(got)
    for b in range(batch):
        same(f"padding, row {b}: ", scores[b, :, : first[b]], np.zeros((heads, int(first[b]))))
        length = num_keys - int(first[b])
        for h in range(heads):
            if length == 0 or not clean[b, h]:
                continue
            key = exact(keys[b, h, first[b] :])
            query = exact(queries[b, h * group : (h + 1) * group, first[b] :])
            off = np.zeros_like(query)  # by how much a rotated query may be
            if cos is not None and sin is not None:
                turn = [exact(x[b if len(x) > 1 else 0, first[b] :]) for x in (cos, sin)]
                query, size = _rotated(query, *turn)
                off[..., : size.shape[-1]] = info.eps * size
                if (np.abs(query) + off).max(initial=0) > info.max:
                    continue
            low, high = _expected(query, key, scaling, softcap, off)
            within(f"row {b}, head {h}: ", scores[b, h, first[b] :], low, high)


def _rotated(query: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Rotate the first channels, as complex numbers; and the sizes of what is summed for it."""
    turned, half = cos.shape[-1], cos.shape[-1] // 2
    x, y = query[..., :half], query[..., half:turned]
    first = x * cos[:, :half] - y * sin[:, :half], y * cos[:, half:] + x * sin[:, half:]
    size = [
        np.abs(a * cos[:, part]) + np.abs(b * sin[:, part])
        for a, b, part in ((x, y, slice(half)), (y, x, slice(half, turned)))
    ]
    return np.concatenate([*first, query[..., turned:]], -1), np.concatenate(size, -1)


def _expected(
    query: Array, key: Array, scaling: float, softcap: float, off: Array
) -> tuple[Array, Array]:
    group, length, _ = query.shape
    i = np.arange(60)
    part = (65536 * i + 40503 * i % 65536) * (length - 4) // (60 * 65536)
    short = length <= 64
    place = np.arange(length) if short else np.concatenate([np.arange(4), 4 + part])
    weight = np.ones(length) if short else np.repeat([1.0, (length - 4) / 60], [4, 60])
    t, j = np.arange(length)[:, None], np.arange(5)
    there = t + j < length
    logits, error = logits_of(query, key, scaling, softcap)  # [G, T, T]
    error = error + scaling * (off @ np.abs(key).swapaxes(-1, -2))
    at = np.broadcast_to(np.minimum(t + j, length - 1), (group, length, 5))
    near_logits = np.where(there, np.take_along_axis(logits, at, -1), -np.inf)
    near_error = np.take_along_axis(error, at, -1)
    sampled, sampled_error = logits[..., place], error[..., place]
    top = np.maximum((sampled + sampled_error).max(-1), (near_logits + near_error).max(-1))
    top = top[..., None]

    def sizes(sign: int) -> tuple[Array, Array]:
        """Of the neighbours, and of all that each is compared with."""
        close = np.exp(near_logits + sign * near_error - top)
        others = weight * np.exp(sampled + sign * sampled_error - top)
        if short:  # neighbours are samples
            return close, np.take_along_axis(but_one(others), at, -1)
        return close, others.sum(-1, keepdims=True) + but_one(close)

    (low, low_others), (high, high_others) = sizes(-1), sizes(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        least = np.nan_to_num(low / (low + high_others), nan=0.0)
        most = np.where(there, np.nan_to_num(high / (high + low_others), nan=1.0), 0.0)
    bounds = []
    for share, slack in ((least, -1e-4), (most, 1e-4)):
        square = (share * share).mean(0)  # [T, 5]
        total = sum(np.pad(square[:, s], (s, 0))[:length] for s in range(5))
        bounds.append(np.log(np.maximum(total, 1e-36)) / 2 + slack)
    return bounds[0], bounds[1]

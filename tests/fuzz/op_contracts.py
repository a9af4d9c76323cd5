"""What the ops promise, in float64: references and bounds, written from docs/design.md.

Not from the code: nothing of moekv is imported here. Each function takes what an op was called with
and what it returned, and raises AssertionError where that is not what ``docs/design.md`` says. How
far a result may be off follows from the numbers: products in float32 are known up to a few units in
the last place of the sum of their absolute terms, and what comes of that is bounded, term by term.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any  # of numpy, float64 or integers

RELATIVE = 1e-4  # of exponentials in float32, far from 1
UNIT = 1.2e-7  # of float32


def exact(tensor: Tensor) -> Array:
    """Give the numbers as float64 or integers."""
    tensor = tensor.detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def within(what: str, got: Array, low: Array, high: Array) -> None:
    """Assert that all numbers are between bounds."""
    good = (got >= low) & (got <= high)
    if good.all():
        return
    at = tuple(int(i) for i in np.argwhere(~good)[0])
    low, high = (np.broadcast_to(x, got.shape)[at] for x in (low, high))
    raise AssertionError(f"{what}{list(at)}: expected {low:.9g} to {high:.9g}, got {got[at]:.9g}")


def near(what: str, got: Array, want: Array, tolerance: Array) -> None:
    """Assert that all numbers are as expected, up to a tolerance."""
    within(what, got, want - tolerance, want + tolerance)


def same(what: str, got: Array, want: Array) -> None:
    """Assert that all numbers are equal."""
    assert got.shape == want.shape, f"{what}: expected shape {want.shape}, got {got.shape}"
    within(what, got, want, want)


def logits_of(queries: Array, keys: Array, scaling: float, softcap: float) -> tuple[Array, Array]:
    """Logits [..., Q, K], and how far off float32 may be."""
    products = scaling * (queries @ keys.swapaxes(-1, -2))
    size = scaling * (np.abs(queries) @ np.abs(keys).swapaxes(-1, -2))
    error = UNIT * (4 + np.sqrt(queries.shape[-1])) * size + 1e-12
    if softcap > 0:
        low, middle, high = (
            softcap * np.tanh((products + shift) / softcap) for shift in (-error, 0.0, error)
        )
        products, error = middle, np.maximum(high - middle, middle - low) + 2e-6 * softcap
    return products, error


def shares_of(
    logits: Array, error: Array, weights: Array | float = 1.0
) -> tuple[Array, Array, Array]:
    """Softmax over the last dimension, and its bounds; -inf is not seen. 0 where nothing is."""
    seen = np.isfinite(logits)
    top = np.where(seen, logits + error, -np.inf).max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    best = np.where(seen, logits, -np.inf).max(-1, keepdims=True)
    size = weights * np.exp(logits - np.where(np.isfinite(best), best, 0.0))
    low, high = (weights * np.exp(x - top) for x in (logits - error, logits + error))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.nan_to_num(size / size.sum(-1, keepdims=True), nan=0.0)
        least = low / (low + np.maximum(high.sum(-1, keepdims=True) - high, 0.0))
        most = high / (high + np.maximum(low.sum(-1, keepdims=True) - low, 0.0))
    # 0 / 0: so far apart by rounding alone that anything may come.
    least, most = np.nan_to_num(least, nan=0.0), np.where(seen, np.nan_to_num(most, nan=1.0), 0.0)
    return share, least * (1 - RELATIVE), most * (1 + RELATIVE)


def starts(start: Tensor | None, rows: int, num_keys: int) -> Array:
    if start is None:
        return np.zeros(rows, dtype=np.int64)
    return exact(start).clip(0, num_keys).reshape(-1)


# --- scores ---------------------------------------------------------------------------------------


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


def _norm(x: Array) -> Array:
    return np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), 1e-12)


def _diversity(key: Array) -> tuple[Array, Array]:
    units = key / _norm(key)
    mean = units.mean(0)
    spread = 4e-7 * (4 + np.sqrt(key.shape[-1]))
    tolerance = spread * (1 + 1 / max(float(np.sqrt((mean * mean).sum())), 1e-12))
    return -(units @ (mean / _norm(mean))), np.full(len(key), min(tolerance, 2.1))


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
            error = 1e-6 * np.sqrt((scaled * scaled).sum(-1) / max(x.shape[-1] - 1, 1)) + 1e-9
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
    *,
    scaling: float,
    softcap: float,
) -> None:
    """``clean [B, H]``: whether the inputs of a head are finite."""
    batch, heads, num_keys, _ = keys.shape
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
            low, high = _expected(query, key, scaling, softcap)
            within(f"row {b}, head {h}: ", scores[b, h, first[b] :], low, high)


def _expected(query: Array, key: Array, scaling: float, softcap: float) -> tuple[Array, Array]:
    group, length, _ = query.shape
    i = np.arange(60)
    part = (65536 * i + 40503 * i % 65536) * (length - 4) // (60 * 65536)
    short = length <= 64
    place = np.arange(length) if short else np.concatenate([np.arange(4), 4 + part])
    weight = np.ones(length) if short else np.repeat([1.0, (length - 4) / 60], [4, 60])
    t, j = np.arange(length)[:, None], np.arange(5)
    there = t + j < length
    logits, error = logits_of(query, key, scaling, softcap)  # [G, T, T]
    at = np.broadcast_to(np.minimum(t + j, length - 1), (group, length, 5))
    near_logits = np.where(there, np.take_along_axis(logits, at, -1), -np.inf)
    near_error = np.take_along_axis(error, at, -1)
    sampled, sampled_error = logits[..., place], error[..., place]
    top = np.maximum((sampled + sampled_error).max(-1), (near_logits + near_error).max(-1))
    top = top[..., None]

    def sizes(sign: int) -> tuple[Array, Array]:
        close = np.exp(near_logits + sign * near_error - top)
        total = (weight * np.exp(sampled + sign * sampled_error - top)).sum(-1, keepdims=True)
        return close, total if short else total + close.sum(-1, keepdims=True)

    (low, low_sum), (high, high_sum) = sizes(-1), sizes(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        least = np.nan_to_num(low / (low + np.maximum(high_sum - high, 0.0)), nan=0.0)
        most = high / (high + np.maximum(low_sum - low, 0.0))
        most = np.where(there, np.nan_to_num(most, nan=1.0), 0.0)
    bounds = []
    for share, slack in ((least, -1e-4), (most, 1e-4)):
        square = (share * share).mean(0)  # [T, 5]
        total = sum(np.pad(square[:, s], (s, 0))[:length] for s in range(5))
        bounds.append(np.log(np.maximum(total, 1e-36)) / 2 + slack)
    return bounds[0], bounds[1]


# --- routing --------------------------------------------------------------------------------------


def gating_topk(
    got: Sequence[Tensor],
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    importance: Tensor | None,
    *,
    k: int,
    temperature: float,
) -> None:
    weights, experts, prob_sum, load, entropy = (exact(x) for x in got)
    num_tokens, num_experts = logits.shape
    assert weights.shape == experts.shape == (num_tokens, k)
    z = exact(logits.float())
    z = np.minimum(np.where(np.isnan(z), -np.inf, z), float(torch.finfo(torch.float32).max))
    top = z.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        below = np.where(top == -np.inf, 0.0, (z - top) / temperature)
    size = np.exp(below)
    p = size / size.sum(-1, keepdims=True)
    # What is 100 below the best is known up to 100 units.
    error = (1e-5 + 4 * UNIT * np.minimum(-below, 110.0)) * p + 1e-37
    real = np.ones(num_tokens, dtype=bool) if mask is None else exact(mask)
    near("prob_sum", prob_sum, p[real].sum(0), (error[real] + UNIT * p[real]).sum(0))
    term = np.where(p > 0, -p * np.log(np.where(p > 0, p, 1.0)), 0.0)
    near(
        "entropy",
        entropy[None],
        term[real].sum()[None],
        1e-30 + 3e-5 * (real.sum() + term[real].sum()),
    )

    slots = np.arange(k)
    count = np.ones((num_tokens, k))
    if importance is not None:
        share = np.nan_to_num(exact(importance), nan=0.0, posinf=np.inf, neginf=-np.inf)
        count = np.clip(k * share[:, None] - slots, 0, 1)
        count[:, 0] = 1.0
    shift = np.zeros(num_experts) if bias is None else exact(bias)
    shift = np.where(np.isnan(shift), -np.inf, shift)
    want_load = np.zeros(num_experts)
    for n in range(num_tokens):
        chosen = experts[n]
        if not real[n]:
            same(f"experts of padding {n}: ", chosen, slots)
            same(f"weights of padding {n}: ", weights[n], np.zeros(k))
            continue
        assert len(set(chosen.tolist())) == k, f"experts of token {n}: got {chosen} twice"
        within(f"experts of token {n}: ", chosen, 0, num_experts - 1)
        want_load += np.bincount(chosen[count[n] > 0], minlength=num_experts)
        rating, slack = p[n] + shift, error[n] + UNIT * (np.abs(p[n]) + np.abs(shift))
        rating, slack = (np.nan_to_num(x, neginf=-1e300, posinf=0.0) for x in (rating, slack))
        slack = np.where(np.isfinite(shift), slack, 0.0)
        left = np.ones(num_experts, dtype=bool)
        for e in chosen:  # no one left is better, nor as good by its inputs and lower
            left[e] = False
            better = left & (rating - slack > rating[e] + slack[e])
            equal = left & (z[n] == z[n, e]) & (shift == shift[e])
            equal &= np.arange(num_experts) < e
            assert not better.any(), f"token {n}: expected {np.flatnonzero(better)} before {e}"
            assert not equal.any(), f"token {n}: expected {np.flatnonzero(equal)} before {e}, a tie"
        part = p[n, chosen] * count[n]
        even = count[n] / count[n].sum()
        tiny = part.sum() < 1e-30  # below float32: either is right
        want = part / part.sum() if part.sum() > 0 else even
        off = 3 * (error[n, chosen] * count[n]).sum() / part.sum() if part.sum() > 0 else 0.0
        if not tiny or part.sum() == 0:
            near(f"weights of token {n}: ", weights[n], want, off + 1e-5)
        near(f"weights of token {n}: sum ", weights[n].sum()[None], np.ones(1), 1e-5)
    same("load", load, want_load)


def project_tokens(
    got: Sequence[Tensor], clean: Array, hidden: Tensor, weight: Tensor, mask: Tensor | None
) -> None:
    """``clean [B]``: whether the real hidden states of a row are finite."""
    projected, standout = (exact(x) for x in got)
    batch, num_tokens, channels = hidden.shape
    real = np.ones((batch, num_tokens), dtype=bool) if mask is None else exact(mask)
    w = exact(weight)
    same("projected padding", projected[~real], np.zeros((int((~real).sum()), len(w))))
    same("standout of padding", standout[~real], np.zeros(int((~real).sum())))
    for b in range(batch):
        if not clean[b] or not real[b].any():
            continue
        x = exact(hidden[b])[real[b]]
        error = UNIT * (4 + np.sqrt(channels)) * (np.abs(x) @ np.abs(w).T) + 1e-37
        near(f"projected, row {b}: ", projected[b][real[b]], x @ w.T, error)
        units = x / _norm(x)
        total = units.sum(0)
        size = max(float(np.sqrt((total * total).sum())), 1e-12)
        distance = 1 - units @ (total / size)
        deviation = distance - distance.mean()
        spread = distance.std() + 1e-4
        off = 2e-7 * (4 + np.sqrt(channels)) * (1 + len(x) / size)
        want = deviation / spread
        tolerance = off * (2 + np.abs(want)) / spread + 1e-5 * np.abs(want)
        if off < 0.1:  # else the rows' sum has no direction
            near(f"standout, row {b}: ", standout[b][real[b]], want, tolerance)


def mix_scores(
    got: Tensor,
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
) -> None:
    _, batch, heads, num_keys = scores.shape
    assert got.shape == (batch, heads, num_keys) and got.dtype == torch.float32
    score = exact(scores)
    shape = (batch, heads, num_keys, weights.shape[-1])
    weight, expert = (
        np.broadcast_to(x if x.ndim == 4 else x[:, None], shape)
        for x in (exact(weights), exact(experts))
    )
    b, h, t = np.ogrid[:batch, :heads, :num_keys]
    want, size = np.zeros(shape[:3]), np.full(shape[:3], 1e-36)
    with np.errstate(invalid="ignore"):
        for j in range(shape[3]):
            e, w = expert[..., j], weight[..., j]
            g = 1.0 if gain is None else exact(gain)[e, b, h]
            o = 0.0 if offset is None else exact(offset)[e, b, h]
            term = w * (g * score[e, b, h, t] + o)
            want = want + np.where(w == 0, 0.0, term)
            bound = np.abs(w) * (np.abs(g * score[e, b, h, t]) + np.abs(o))
            size = size + np.where((w == 0) | ~np.isfinite(bound), 0.0, bound)
    mixed = exact(got)
    number = np.isfinite(want)
    near("mixed", mixed[number], want[number], 8 * UNIT * size[number])
    same("infinite ", np.nan_to_num(mixed[~number], nan=7.0), np.nan_to_num(want[~number], nan=7.0))


# --- choosing and moving --------------------------------------------------------------------------


def select_kept(
    got: Sequence[Tensor],
    scores: Tensor,
    start: Tensor | None,
    *,
    total: Sequence[int],
    sinks: int,
    window: int,
    floor: int,
) -> None:
    indices, offsets = (exact(x) for x in got)
    groups, rows, num_keys = scores.shape
    first = starts(start, groups * rows, num_keys).reshape(groups, rows)
    score = exact(scores)
    want, ends = [], [0]
    for g in range(groups):
        share = total[g] // rows
        sink = min(sinks, share)
        recent, least = min(window, share - sink), min(floor, share)
        pairs = []
        for r in range(rows):
            ranked = []
            for t in range(num_keys):
                number = score[g, r, t]
                rank = (2, 0.0) if np.isnan(number) else (1, -number)
                ranked.append((*((3, 0.0) if t < first[g, r] else rank), t))
            real = range(int(first[g, r]), num_keys)
            fixed = {*real[:sink], *(real[-recent:] if recent else ())}
            for _, _, t in sorted(ranked):
                if len(fixed) >= least:
                    break
                fixed.add(t)
            pairs += [((0,) if t in fixed else (1, tier, value), r, t) for tier, value, t in ranked]
        kept = sorted((r, t) for _, r, t in sorted(pairs)[: total[g]])
        for r in range(rows):
            here = [t for row, t in kept if row == r]
            want += here
            ends.append(ends[-1] + len(here))
    same("offsets", offsets, np.array(ends))
    same("indices", indices, np.array(want, dtype=np.int64))


def kv_compact_(
    after: Sequence[Tensor],
    before: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor | None,
    *,
    packed: bool,
) -> None:
    """``after``, ``before``: keys and values [B, H, T, D], as integers of their bits."""
    for name, new, old in zip(("keys", "values"), after, before, strict=True):
        batch, heads, num_keys, dim = old.shape
        if dim == 0:
            continue
        flat = exact(indices).reshape(-1)
        kept = len(flat) // max(batch * heads, 1)
        ends = np.arange(batch * heads + 1) * kept if offsets is None else exact(offsets)
        rows = exact(old).reshape(batch * heads, num_keys, dim)
        moved = exact(new).reshape(batch * heads, num_keys, dim)
        chosen = [rows[r, flat[ends[r] : ends[r + 1]]] for r in range(batch * heads)]
        if packed:
            want = np.concatenate([*chosen, rows[:0, 0]])
            same(f"{name}: ", moved.reshape(-1, dim)[: len(want)], want)
            rest = moved.reshape(-1, dim)[len(want) :], rows.reshape(-1, dim)[len(want) :]
            same(f"{name} behind: ", *rest)
        else:
            for r, want in enumerate(chosen):
                same(f"{name} of row {r}: ", moved[r, : len(want)], want)
                same(f"{name} behind row {r}: ", moved[r, len(want) :], rows[r, len(want) :])


def ragged_attention(
    got: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    tail_keys: Tensor | None,
    tail_values: Tensor | None,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float,
) -> None:
    batch, num_heads, num_queries, _ = query.shape
    heads = begin.shape[1]
    group = num_heads // heads
    assert got.shape == (batch, num_queries, num_heads, values.shape[1])
    assert got.dtype == query.dtype
    output = exact(got)
    last = {torch.float32: UNIT, torch.float16: 1e-3, torch.bfloat16: 8e-3}[query.dtype]
    for b in range(batch):
        for h in range(heads):
            stored = slice(int(begin[b, h]), int(end[b, h]))
            key, value = exact(keys[stored]), exact(values[stored])
            num_stored = len(key)
            seen = np.ones((group, num_queries, num_stored), dtype=bool)
            if tail_keys is not None and tail_values is not None:
                num_tail = tail_keys.shape[2]
                key = np.concatenate([key, exact(tail_keys[b, h])])
                value = np.concatenate([value, exact(tail_values[b, h])])
                latest = num_tail - num_queries + np.arange(num_queries)
                tail = np.broadcast_to(
                    np.arange(num_tail) <= latest[:, None], (group, num_queries, num_tail)
                )
                if mask is not None:
                    whole = mask.expand(batch, num_heads, num_queries, num_tail)
                    tail = tail & exact(whole[b, h * group : (h + 1) * group])
                seen = np.concatenate([seen, tail], -1)
            if key.shape[0] == 0:
                same(
                    f"row {b}, head {h}: ",
                    output[b, :, h * group : (h + 1) * group],
                    np.zeros((num_queries, group, values.shape[1])),
                )
                continue
            visible = seen.any((0, 1))[:, None]  # nobody sees the others
            key, value = np.where(visible, key, 0.0), np.where(visible, value, 0.0)
            q = exact(query[b, h * group : (h + 1) * group])
            hidden = ~np.isfinite(value)
            value = np.where(hidden, 0.0, value)
            bad_key = ~np.isfinite(key).all(-1)
            key = np.where(bad_key[:, None], 0.0, key)
            logits, error = logits_of(q, key, scaling, softcap)
            share, least, most = shares_of(np.where(seen, logits, -np.inf), error)
            want = share @ value
            off = np.maximum(most - share, share - least)
            size = np.abs(want)
            tolerance = off @ np.abs(value) + RELATIVE * (share @ np.abs(value))
            tolerance = tolerance + last * (size + tolerance) + 1e-7 * (last > UNIT) + 1e-36
            tolerance = tolerance + 1e-35 * np.abs(value).max()  # e^-87 is not told from 0
            # Who sees what is not a number gets none; the others must not.
            poisoned = (seen @ hidden.astype(float) > 0) | (seen & bad_key).any(-1)[..., None]
            result = output[b, :, h * group : (h + 1) * group].swapaxes(0, 1)
            near(
                f"row {b}, head {h}: ",
                np.where(poisoned, 0.0, result),
                np.where(poisoned, 0.0, want),
                tolerance,
            )
            assert not np.isfinite(result[poisoned]).any(), f"row {b}, head {h}: NaN seen, not told"

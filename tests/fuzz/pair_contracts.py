"""What ``select_kept``, ``kv_compact_`` and ``ragged_attention`` promise."""

from collections.abc import Sequence

import numpy as np
import row_contracts
import torch
from op_bounds import RELATIVE, UNIT, exact, logits_of, near, same, shares_of, starts
from torch import Tensor


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
    scales: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    *,
    scaling: float,
    softcap: float,
    pairs: str,
) -> None:
    batch, num_heads, num_queries, key_dim = query.shape
    heads = begin.shape[1]
    group = num_heads // heads
    value_dim = values.shape[1] * (1 if scales is None else 8 // int(pairs[3]))
    assert got.shape == (batch, num_queries, num_heads, value_dim)
    # Sizes bound what sums may lose: they are those of the terms, which the transform mixes.
    key_matrix = value_matrix = None
    if scales is None:
        all_keys, all_values = exact(keys), exact(values)
    else:
        key_scales, value_scales = row_contracts.split(scales, pairs, key_dim)
        all_keys = row_contracts.numbers(keys, key_scales, int(pairs[1]), key_dim)
        all_values = row_contracts.numbers(values, value_scales, int(pairs[3]), value_dim)
        if pairs[1] == "4":
            key_matrix = row_contracts.mixing(key_dim)
        if pairs[3] == "4":
            value_matrix = row_contracts.mixing(value_dim)
    assert got.dtype == query.dtype
    output = exact(got)
    last = {torch.float32: UNIT, torch.float16: 1e-3, torch.bfloat16: 8e-3}[query.dtype]
    for b in range(batch):
        for h in range(heads):
            stored = slice(int(begin[b, h]), int(end[b, h]))
            key, value = all_keys[stored], all_values[stored]
            num_stored = len(key)
            seen = np.ones((group, num_queries, num_stored), dtype=bool)
            added = np.zeros(num_stored)
            if bias is not None:
                added = exact(bias[stored])
                seen = seen & (added != -np.inf)
                added = np.where(added == -np.inf, 0.0, added)
            key_size, value_size = np.abs(key), np.abs(value)
            if key_matrix is not None:
                key, key_size = key @ key_matrix, key_size @ np.abs(key_matrix)
            if value_matrix is not None:
                value, value_size = value @ value_matrix, value_size @ np.abs(value_matrix)
            if tail_keys is not None and tail_values is not None:
                num_tail = tail_keys.shape[2]
                key, key_size, value, value_size = (
                    np.concatenate([x, y])
                    for x, y in (
                        (key, exact(tail_keys[b, h])),
                        (key_size, np.abs(exact(tail_keys[b, h]))),
                        (value, exact(tail_values[b, h])),
                        (value_size, np.abs(exact(tail_values[b, h]))),
                    )
                )
                added = np.concatenate([added, np.zeros(num_tail)])
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
                    np.zeros((num_queries, group, value_dim)),
                )
                continue
            visible = seen.any((0, 1))[:, None]  # nobody sees the others
            key, value = np.where(visible, key, 0.0), np.where(visible, value, 0.0)
            q = exact(query[b, h * group : (h + 1) * group])
            hidden = ~np.isfinite(value)
            value = np.where(hidden, 0.0, value)
            bad_key = ~np.isfinite(key).all(-1)
            key = np.where(bad_key[:, None], 0.0, key)
            key_size = np.where(np.isfinite(key_size) & visible, key_size, 0.0)
            value_size = np.where(np.isfinite(value_size) & visible, value_size, 0.0)
            logits, error = logits_of(q, key, scaling, softcap, key_size)
            logits, error = logits + added, error + 2 * UNIT * np.abs(added)
            logits = np.where(seen, logits, -np.inf)
            if sinks is not None:
                sink = np.broadcast_to(
                    exact(sinks[h * group : (h + 1) * group])[:, None, None], (*logits.shape[:2], 1)
                )
                sink = np.where(seen.any(-1)[..., None], sink, -np.inf)
                logits = np.concatenate([logits, sink], -1)
                error = np.concatenate([error, np.zeros_like(sink)], -1)
            share, least, most = (x[..., : len(key)] for x in shares_of(logits, error))
            want = share @ value
            off = np.maximum(most - share, share - least)
            size = np.abs(want)
            tolerance = off @ value_size + RELATIVE * (share @ value_size)
            tolerance = tolerance + last * (size + tolerance) + 1e-7 * (last > UNIT) + 1e-36
            tolerance = tolerance + 1e-35 * value_size.max()  # e^-87 is not told from 0
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

"""What ``gating_topk``, ``project_tokens`` and ``mix_scores`` promise."""

from collections.abc import Sequence

import numpy as np
import torch
from op_bounds import UNIT, Array, exact, near, norm, same, within
from torch import Tensor


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
        # Of equal addends the roundings do not cancel: as many as there are.
        error = UNIT * (4 + channels) * (np.abs(x) @ np.abs(w).T) + 1e-37
        near(f"projected, row {b}: ", projected[b][real[b]], x @ w.T, error)
        units = x / norm(x)
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

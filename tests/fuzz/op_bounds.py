"""Numbers as float64, and how far off float32 may be."""

from typing import Any

import numpy as np
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


def logits_of(
    queries: Array, keys: Array, scaling: float, softcap: float, key_size: Array | None = None
) -> tuple[Array, Array]:
    """Logits [..., Q, K], and how far off float32 may be; ``key_size`` if not that of the keys."""
    products = scaling * (queries @ keys.swapaxes(-1, -2))
    key_size = np.abs(keys) if key_size is None else key_size
    size = scaling * (np.abs(queries) @ key_size.swapaxes(-1, -2))
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
        least, most = low / (low + but_one(high)), high / (high + but_one(low))
    # 0 / 0: so far apart by rounding alone that anything may come.
    least, most = np.nan_to_num(least, nan=0.0), np.where(seen, np.nan_to_num(most, nan=1.0), 0.0)
    return share, least * (1 - RELATIVE), most * (1 + RELATIVE)


def but_one(x: Array) -> Array:
    """Sum all but each over the last dimension, however small they are beside it."""
    sides = [(0, 0)] * (x.ndim - 1)
    before = np.cumsum(x, -1)[..., :-1]
    behind = np.cumsum(x[..., ::-1], -1)[..., -2::-1]
    return np.pad(before, [*sides, (1, 0)]) + np.pad(behind, [*sides, (0, 1)])


def starts(start: Tensor | None, rows: int, num_keys: int) -> Array:
    if start is None:
        return np.zeros(rows, dtype=np.int64)
    return exact(start).clip(0, num_keys).reshape(-1)


def norm(x: Array) -> Array:
    return np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), 1e-12)

"""The op ``expert_scores``."""

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from moekv.ops import checks, reference
from moekv.ops.backends import for_heads, implementation
from moekv.ops.registration import register


class ScoreKind(IntEnum):
    """What :func:`expert_scores` can compute, see there."""

    MASS = reference.MASS
    ATTENTION = reference.ATTENTION
    DIVERSITY = reference.DIVERSITY
    LAG = reference.LAG


def expert_scores(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    start: Tensor | None = None,
    *,
    kinds: Sequence[ScoreKind],
    scaling: float,
    softcap: float = 0.0,
    pool: int = 1,
    lag: int = 128,
    backend: str = "auto",
) -> Tensor:
    """Score every cached pair in several ways, in as few passes over the cache as they need.

    =============  =================================================================================
    kind           score of a key
    =============  =================================================================================
    ``MASS``       mean attention that the row's real window queries pay to it (sums to 1 over T),
                   causal: as SnapKV [1]_ sees the prompt from its last window
    ``ATTENTION``  log of the attention that a query which can see the key pays to it: ``MASS``
                   corrected for the window queries before the key, averaged over the real ones
                   of the ``pool`` nearest positions, at least 1e-20
    ``DIVERSITY``  minus the cosine with the mean direction of the row's real keys (KeyDiff [2]_)
    ``LAG``        log of the spread over channels of key and value, each scaled by the range of the
                   next ``lag`` tokens, as a share of its partition (LagKV [3]_)
    =============  =================================================================================

    Padding positions score 0 in ``MASS`` and -inf in the others. NaN in a (row, head) stays there.
    Memory beside the output is O(T): the [W, T] attention matrix never exists.

    Parameters
    ----------
    keys : Tensor [B, H, T, D], float32, float16 or bfloat16
    values : Tensor [B, H, T, Dv], dtype of ``keys``
    queries : Tensor [B, Hq, W, D], dtype of ``keys``
        Rotated queries of the last W <= T positions; Hq is a multiple of H.
    start : Tensor [B], int32, optional
        Padding positions at the left of each row. None: no padding.
    kinds : sequence of ScoreKind
    scaling : float
        Factor of the query-key products, as in the model's attention.
    softcap : float
        Logits become ``softcap * tanh(logits / softcap)``; 0: they stay.
    pool : int
        Odd number of positions that ``ATTENTION`` averages.
    lag : int
        Tokens in a partition of ``LAG``.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``keys``,
        for heads of up to 256 channels.

    Returns
    -------
    Tensor [len(kinds), B, H, T], float32
        One slice per kind in the order of ``kinds``.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``keys`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.

    References
    ----------
    .. [1] Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation",
       arXiv:2404.14469.
    .. [2] Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction", arXiv:2504.15364.
    .. [3] Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are
       Important", arXiv:2504.04704.
    """
    op = implementation("expert_scores", keys, for_heads(backend, keys, values))
    scores: Tensor = op(
        keys,
        values,
        queries,
        start,
        kinds=[int(kind) for kind in kinds],
        scaling=scaling,
        softcap=softcap,
        pool=pool,
        lag=lag,
    )
    return scores


def _fake(
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
    checks.native("expert_scores", "keys", keys)
    checks.expert_scores(keys, values, queries, start, kinds, scaling, softcap, pool, lag)
    checks.native_heads("expert_scores", keys, values)
    return keys.new_empty(len(kinds), *keys.shape[:3], dtype=torch.float32)


register("expert_scores", _fake)

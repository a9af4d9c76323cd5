"""The op ``expected_attention``."""

import torch
from torch import Tensor

from moekv.ops import checks
from moekv.ops.backends import for_heads, implementation
from moekv.ops.reference.expected_attention import rotated
from moekv.ops.registration import register


def expected_attention(
    queries: Tensor,
    keys: Tensor,
    start: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    scaling: float = 1.0,
    softcap: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Score pairs by the attention expected when their tokens are repeated after the text.

    Continuations and answers repeat parts of a text. A repeated token has about the same query,
    rotated to a position after the text; it attends to the pair of its first occurrence and to the
    4 pairs that follow. This op computes that attention from the queries of the prefill. KVzip [1]_
    measures it by reading the text twice; expected attention [2]_ estimates it from the
    distribution of queries.

    With ``a`` the attention of a query: ``score[t]`` is the log of the root of the sum, over the
    tokens t - 4 ... t of the row, of the mean over the group's heads of ``a[t]`` squared, where the
    sum is at least 1e-36. Of the softmax's sum over all keys the first 4 keys are terms of their
    own, 60 more represent equal parts of the others (``sample_places`` of the reference), and the
    keys being scored are added; up to 64 keys the sum is exact. A row with padding
    scores as it does alone. Memory beside the output is O(1) for each head.

    Parameters
    ----------
    queries : Tensor [B, Hq, T, D], float32, float16 or bfloat16
        Of all tokens, rotated to the position behind the last one; or not rotated, where ``keys``
        are turned back by that position, as products alone count; or as they are, beside a
        rotation. Hq is a multiple of H.
    keys : Tensor [B, H, T, D], dtype of ``queries``
    start : Tensor [B], int32, optional
        Padding positions at the left of each row. None: no padding.
    cos, sin : Tensor [B or 1, T, R], float32, optional
        Rotation of each token's query before anything else, as in Llama: of the first R channels,
        an even number, the two halves are coordinates. None: queries are not rotated. On CUDA a
        rotated copy of the queries is made first.
    scaling : float
        Factor of the query-key products, as far as it is not in the keys.
    softcap : float
        Logits become ``softcap * tanh(logits / softcap)``; 0: they stay.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``queries``,
        for heads of up to 256 channels.

    Returns
    -------
    Tensor [B, H, T], float32
        0 at padding, which is not read. NaN in a (row, head) stays there.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``queries`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.

    References
    ----------
    .. [1] Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
       arXiv:2505.23416.
    .. [2] Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from
       Future Queries Distribution", arXiv:2510.00636.
    """
    op = implementation("expected_attention", queries, for_heads(backend, keys))
    if cos is not None and sin is not None and queries.device.type == "cuda":
        checks.expected_attention(queries, keys, start, cos, sin, scaling, softcap)
        queries, cos, sin = rotated(queries, cos, sin).to(keys.dtype), None, None
    scores: Tensor = op(queries, keys, start, cos, sin, scaling=scaling, softcap=softcap)
    return scores


def _fake(
    queries: Tensor,
    keys: Tensor,
    start: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    scaling: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    checks.native("expected_attention", "queries", queries)
    checks.expected_attention(queries, keys, start, cos, sin, scaling, softcap)
    checks.native_heads("expected_attention", keys)
    return keys.new_empty(keys.shape[:3], dtype=torch.float32)


register("expected_attention", _fake)

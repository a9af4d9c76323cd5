"""The op ``ragged_attention``."""

import torch
from torch import Tensor

from moekv.ops import checks, row_checks
from moekv.ops.backends import for_device, for_heads, implementation
from moekv.ops.registration import register


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
    backend: str = "auto",
) -> Tensor:
    """Attend with a few queries to a cache whose heads keep different numbers of pairs.

    Every query sees all stored rows of its head. Of the dense tail, query i of the last Q positions
    sees the positions up to its own for which ``mask`` is True. Split-KV flash decoding [1]_: the
    query heads of a group read each key once.

    Parameters
    ----------
    query : Tensor [B, Hq, Q, D], float32, float16 or bfloat16
        Rotated queries of the last Q positions; Hq is a multiple of H.
    keys : Tensor [N, D], dtype of ``query``
        Stored keys of all heads; with quantised ``pairs`` their codes [N, KB], uint8.
    values : Tensor [N, Dv], dtype of ``query``
        Stored values, or their codes [N, VB], uint8.
    begin, end : Tensor [B, H], int32
        Head h of row b owns the stored rows ``begin[b, h]`` to ``end[b, h] - 1``. Heads may be
        empty, and may share rows, as beams do.
    tail_keys, tail_values : Tensor [B, H, S, D] and [B, H, S, Dv], optional
        Positions appended since, the Q of the queries at their end.
    mask : Tensor, bool, broadcastable to [B, Hq, Q, S], optional
        True: the query may see the tail position.
    scales : Tensor [N, M], float16, optional
        What ``quantize_pairs`` gave beside the codes.
    bias : Tensor [N], float16, optional
        Added to the logits of a stored row, behind the softcap. -inf hides the row.
    sinks : Tensor [Hq], float32, optional
        A logit for each query head that takes its share of the softmax and has no value [2]_.
    scaling : float
        Factor of the query-key products.
    softcap : float
        Logits become ``softcap * tanh(logits / softcap)``; 0: they stay. Those of ``sinks`` stay.
    pairs : str
        One of ``PAIRS``: how the rows are stored; see ``quantize_pairs``. The tail never is.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``query``.
        ``torch`` alone has gradients, and alone serves heads of more than 256 channels, and
        quantised rows to a float32 ``query``, on CUDA: ``auto`` chooses it for them there.

    Returns
    -------
    Tensor [B, Q, Hq, Dv], dtype of ``query``
        0 for a query that sees nothing. A row that ``quantize_pairs`` could not encode gives NaN,
        as NaN in a key or value does, unless it is hidden.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``query`` is elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype or device. On the CPU
        also where ``begin`` or ``end`` leave the stored rows; on CUDA they are clamped.

    References
    ----------
    .. [1] Dao et al., "Flash-Decoding for long-context inference", 2023.
    .. [2] OpenAI, "gpt-oss-120b & gpt-oss-20b model card", 2025.
    """
    is_wide = for_heads(backend, query, *((values,) if pairs == "16" else ())) != backend
    if is_wide or (pairs != "16" and getattr(query, "dtype", None) == torch.float32):
        backend = for_device(backend, query)
    op = implementation("ragged_attention", query, backend)
    output: Tensor = op(
        query,
        keys,
        values,
        begin,
        end,
        tail_keys,
        tail_values,
        mask,
        scales,
        bias,
        sinks,
        scaling=scaling,
        softcap=softcap,
        pairs=pairs,
    )
    return output


def _fake(
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
    checks.native("ragged_attention", "query", query)
    arguments = query, keys, values, begin, end, tail_keys, tail_values, mask, scales, bias, sinks
    row_checks.ragged_attention(*arguments, scaling, softcap, pairs)
    batch, num_query_heads, num_queries, _ = query.shape
    value_dim = values.shape[1] * (1 if pairs == "16" else 8 // int(pairs[3]))
    return query.new_empty(batch, num_queries, num_query_heads, value_dim)


register("ragged_attention", _fake)

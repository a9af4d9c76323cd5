"""The op ``fold_pairs``."""

from typing import NamedTuple

import torch
from torch import Tensor

from moekv.ops import checks, reference, row_checks
from moekv.ops.backends import for_device, for_heads, implementation
from moekv.ops.registration import exportable, register, without_gradient

_refusing = without_gradient("fold_pairs", reference.fold_pairs)


class FoldPairs(NamedTuple):
    """Result of :func:`fold_pairs`."""

    values: Tensor
    bias: Tensor
    joined: Tensor


exportable(FoldPairs)


def fold_pairs(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    start: Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
    gate: float = 0.0,
    least: float = 0.0,
    backend: str = "auto",
) -> FoldPairs:
    """Let evicted pairs join kept ones, so that what attended to them finds them there.

    Some queries stand for all that are to come. With ``P`` their attention over the real keys of a
    head, an evicted pair j joins the kept pair i whose column of ``P`` has the largest cosine with
    its own, if that is above ``gate``, with the weight ``w = min(1, u_j / u_i)``, where ``u`` is
    the mean of a column; one whose ``u_j`` is below ``least`` times the mean over all keys joins
    none. A kept pair's value becomes ``(v_i + sum(w v_j)) / (1 + sum(w))``, and ``bias`` of
    ``ragged_attention`` adds ``log(1 + sum(w))`` to its logit: a query that looks at all of them
    alike gets what it got from each. Kept keys stay as they are.

    Parameters
    ----------
    queries : Tensor [B, Hq, M, D], float32, float16 or bfloat16
        As they would ask behind the last key. Hq is a multiple of H; each KV head has at most 256.
    keys, values : Tensor [B, H, T, D] and [B, H, T, Dv], dtype of ``queries``
    indices : Tensor [N], int32
        Kept positions, ascending in each row.
    offsets : Tensor [B * H + 1], int32
        Where each row begins in ``indices``.
    start : Tensor [B], int32, optional
        Padding positions at the left of each row. None: no padding.
    scaling, softcap : float
        As in ``ragged_attention``.
    gate, least : float
        Between 0 and 1.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``queries``,
        for heads of up to 256 channels; on CUDA, PyTorch.

    Returns
    -------
    FoldPairs
        ``values [N, Dv]`` in their dtype, ``bias [N]`` float16, ``joined [B, H, T]`` int32: which
        of the N kept pairs an evicted one has joined; -1 for those that joined none, kept ones and
        padding. A value with NaN or numbers beyond float16 joins none; where a key has NaN
        or infinities, no pair of its head may join another. There is no gradient.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``queries`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype, device or value.

    Notes
    -----
    Columns of ``P`` are rounded to bfloat16 before their cosines are taken. Memory grows with
    ``T``, and with the queries.
    """
    backend = for_device(backend, queries)
    op = implementation("fold_pairs", queries, for_heads(backend, keys, values))
    if backend == "cuda":
        raise RuntimeError(
            "moekv::fold_pairs: expected backend 'auto' or 'torch' for tensors on a GPU, got "
            "'cuda', which has no kernel of it"
        )
    tensors = queries, keys, values
    needs_gradient = any(tensor.requires_grad for tensor in tensors)
    if op is reference.fold_pairs and torch.is_grad_enabled() and needs_gradient:
        op = _refusing
    options = {"scaling": scaling, "softcap": softcap, "gate": gate, "least": least}
    return FoldPairs(*op(*tensors, indices, offsets, start, **options))


def _fake(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    start: Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
    gate: float = 0.0,
    least: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.native("fold_pairs", "queries", queries)
    tensors = queries, keys, values, indices, offsets, start
    row_checks.fold_pairs(*tensors, scaling, softcap, gate, least)
    checks.native_heads("fold_pairs", keys, values)
    return (
        values.new_empty(len(indices), values.shape[3]),
        values.new_empty(len(indices), dtype=torch.float16),
        values.new_empty(values.shape[:3], dtype=torch.int32),
    )


register("fold_pairs", _fake)

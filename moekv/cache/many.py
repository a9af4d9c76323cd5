"""Attention of many new tokens at once over a compressed layer, on CPUs: a chunk, another turn.

``ragged_attention`` is made for decoding, where reading pairs takes the time. Of many queries the
products do, and PyTorch's flash attention computes these at the speed of a matrix product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekv.cache.rows import Rows

if TYPE_CHECKING:
    from moekv.cache.ragged import RaggedLayer

MANY = 32
"""Queries from which on it is faster; measured, as docs/design.md says."""

_HIDDEN = -1e30  # no infinity: a query that sees nothing of a part would be NaN

_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def is_served(query: Tensor, rows: Rows, softcap: float, sinks: Tensor | None) -> bool:
    """Whether :func:`attend_many` can attend, and is worth it."""
    return (
        query.device.type == "cpu"
        and query.shape[2] >= MANY
        and not softcap
        and sinks is None
        and rows.key_dim == rows.value_dim
        and query.dtype == rows.dtype
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not torch.compiler.is_compiling()
    )


def attend_many(
    query: Tensor,
    layer: RaggedLayer,
    rows: Rows,
    tail: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attend as ``ragged_attention`` does, by its contract, with PyTorch's flash attention.

    The stored pairs of a head are one part, which all queries see, and the tail is another; parts
    are joined by the logarithms of their sums of exponentials.

    Parameters
    ----------
    query : Tensor [B, Hq, Q, D]
        Of the last Q tokens of the tail.
    layer : RaggedLayer
        Says where the pairs of each head are.
    rows : Rows
    tail : (Tensor [B, H, S, D], Tensor [B, H, S, Dv])
    mask : Tensor [B or 1, Hq or 1, Q or 1, S], bool, optional
        What is seen of the tail, no later tokens among it where it says so of each query; None: the
        past.
    scaling : float

    Returns
    -------
    Tensor [B, Q, Hq, Dv]
    """
    batch, num_heads, count, dim = query.shape
    keys, values = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in tail)
    old = keys.shape[2] - count
    if old if mask is None else mask.shape[2] == 1:
        place = torch.arange(keys.shape[2], device="cpu")
        past = (place <= place[old:, None])[None, None]
        mask = past if mask is None else mask & past
    added = None
    if mask is not None:
        added = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, _HIDDEN)
        added = added.expand(batch, num_heads, -1, -1)
    output, sums = _flash(query, keys, values, 0.0, mask is None, attn_mask=added, scale=scaling)
    output = output.float().masked_fill_((sums < _HIDDEN / 2)[..., None], 0)
    stored_keys, stored_values = rows.dense()
    group = num_heads // layer.begin.shape[1]
    begins, ends = layer.begin.flatten().tolist(), layer.end.flatten().tolist()
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin == end:
            continue
        row, head = divmod(number, layer.begin.shape[1])
        ours = row, slice(head * group, (head + 1) * group)
        bias = None
        if rows.bias is not None:
            bias = rows.bias[begin:end].float().clamp(min=_HIDDEN)
            bias = bias.expand(1, 1, group * count, -1)
        part, its = _flash(
            query[ours].reshape(1, 1, group * count, dim),  # all of them see all of it
            stored_keys[None, None, begin:end],
            stored_values[None, None, begin:end],
            attn_mask=bias,
            scale=scaling,
        )
        part, its = part.view(group, count, -1), its.view(group, count)
        share = torch.sigmoid(its - sums[ours]).masked_fill_(its < _HIDDEN / 2, 0)
        output[ours] = output[ours].lerp_(part.float(), share[..., None])
    joined: Tensor = output.to(query.dtype)
    return joined.transpose(1, 2)

"""Compressed layers in models that are compiled: steps that are traced into one graph.

What decides by the numbers in a mask cannot be traced. Here it stands in ops of its own, which run
as the model does without being compiled. A layer that is asked for the size of a mask, or hands out
pairs, is noted while a graph is traced, as neither a mask nor a traced tensor can carry it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moekv.cache.growing import GrowingLayer
    from moekv.cache.layer import CompressedLayer
    from moekv.cache.ragged import RaggedLayer
    from moekv.cache.rows import Rows
    from moekv.cache.static import CompactStaticLayer


class Traced:
    """The layers that are noted, for a graph that is being traced.

    Attributes
    ----------
    asked : CompressedLayer, CompactStaticLayer or None
        Was asked last for the size of a mask, which has not been made yet.
    shown : GrowingLayer or None
        Handed out pairs last, over which attention has not been called yet.
    """

    def __init__(self) -> None:
        self.asked: CompressedLayer | CompactStaticLayer | None = None
        self.shown: GrowingLayer | None = None

    def take_asked(self) -> CompressedLayer | CompactStaticLayer | None:
        """Return what was asked, once."""
        layer, self.asked = self.asked, None
        return layer

    def take_shown(self) -> GrowingLayer | None:
        """Return what has shown pairs, once; no mask is made any more."""
        self.asked = None
        layer, self.shown = self.shown, None
        return layer


traced = Traced()

_ops = torch.library.Library("moekv", "FRAGMENT")  # type: ignore[no-untyped-call]
_ops.define(  # type: ignore[no-untyped-call]
    "shown_context(Tensor mask, Tensor? first, SymInt length, bool follows) -> Tensor"
)
_ops.define(  # type: ignore[no-untyped-call]
    "attend_ragged(Tensor query, Tensor keys, Tensor values, Tensor begin, Tensor end, "
    "Tensor tail_keys, Tensor tail_values, Tensor mask, Tensor? scales, Tensor? bias, "
    "Tensor? sinks, Tensor? first, Tensor? positions, Tensor? skips, *, SymInt length, "
    "SymInt waiting, int[] dims, float scaling, float softcap, str pairs, str backend) -> Tensor"
)


def shown_context(mask: Tensor, layer: CompressedLayer) -> Tensor:
    """Copy a caller's mask [B, T] for a graph that checks it as it runs, as ``check_context``."""
    length, follows = layer.context_length, layer.follows_masks
    shown: Tensor = torch.ops.moekv.shown_context(mask, layer.first, length, follows)
    return shown


def shown_part(mask: Tensor, count: int) -> Tensor:
    """Copy a mask [..., T] for a graph that refuses one which hides any of its first columns."""
    shown: Tensor = torch.ops.moekv.shown_context(mask, None, count, False)
    return shown


def assert_shown(mask: Tensor, context: Tensor) -> None:
    """Have a graph refuse a caller's mask [B, T] that hides positions before a number of them.

    Without waiting for the device, as graphs that CUDA replays cannot: there it ends the process's
    work on that device.
    """
    behind = torch.arange(mask.shape[1], device=mask.device) >= context
    torch._assert_async(
        (mask.bool() | behind).all() & (context <= mask.shape[1]),
        "expected an attention mask that shows all positions that were compressed together: the "
        "pairs that a static cache holds of these do not know their positions (docs/errors.md)",
    )


def attend_ragged(
    query: Tensor,
    layer: RaggedLayer,
    rows: Rows,
    tail: tuple[Tensor, Tensor],
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend over a ragged layer in a graph that reads the mask as it runs.

    Parameters
    ----------
    query : Tensor [B, Hq, Q, D]
    layer : RaggedLayer
    rows : Rows
        Its stored pairs, as they are to be read.
    tail : two Tensors [B, H, S, D] and [B, H, S, Dv]
    mask : Tensor
        Over all positions, as attention gets it.
    scaling, softcap : float
    sinks : Tensor [Hq], optional

    Returns
    -------
    Tensor [B, Q, Hq, Dv]
    """
    attended: Tensor = torch.ops.moekv.attend_ragged(
        query,
        rows.keys,
        rows.values,
        layer.begin,
        layer.end,
        *tail,
        mask,
        rows.scales,
        rows.bias,
        sinks,
        layer.first,
        layer.positions,
        layer.tail.skips,
        length=layer.context_length,
        waiting=layer.tail.waiting,
        dims=[rows.key_dim, rows.value_dim],
        scaling=scaling,
        softcap=softcap or 0.0,
        pairs=rows.pairs,
        backend=layer.backend,
    )
    return attended


def _shown_context(mask: Tensor, first: Tensor | None, length: int, follows: bool) -> Tensor:
    from moekv.cache.masks import check_hidden, shown_by

    check_hidden(shown_by(mask), first, length, follows=follows)
    return mask.clone()


def _attend_ragged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    first: Tensor | None,
    positions: Tensor | None,
    skips: Tensor | None,
    *,
    length: int,
    waiting: int,
    dims: Sequence[int],
    scaling: float,
    softcap: float,
    pairs: str,
    backend: str,
) -> Tensor:
    from moekv.cache.attention import attend_masked
    from moekv.cache.ragged import RaggedLayer
    from moekv.cache.rows import Rows

    key_dim, value_dim = dims
    rows = Rows(pairs, keys, values, scales, key_dim, value_dim, tail_keys.dtype, bias)
    layer = RaggedLayer(rows, begin, end, length=length, backend=backend)
    layer.first, layer.positions = first, positions
    layer.put_tail(tail_keys, tail_values, waiting, skips)
    with torch.autocast(query.device.type, enabled=False):  # the graph has cast what there is
        return attend_masked(query, layer.keys, mask, scaling, softcap, sinks).contiguous()


def _fake_attend_ragged(query: Tensor, *_: Any, dims: Sequence[int], **__: Any) -> Tensor:
    batch, num_heads, num_queries, _dim = query.shape
    return query.new_empty(batch, num_queries, num_heads, dims[1])


for _name, _kernel, _fake in (
    ("shown_context", _shown_context, lambda mask, *_: torch.empty_like(mask)),
    ("attend_ragged", _attend_ragged, _fake_attend_ragged),
):
    for _key in ("CPU", "CUDA"):
        _ops.impl(_name, _kernel, _key)  # type: ignore[no-untyped-call]
    _ops.impl(_name, _fake, "Meta")  # type: ignore[no-untyped-call]

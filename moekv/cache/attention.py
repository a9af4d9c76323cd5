"""Decode attention over compressed layers, inside transformers' attention interface.

Models look their attention function up by name ("sdpa", "flash_attention_2", ...) at every call.
:func:`install` wraps each of these functions once: a call that brings :class:`RaggedPairs`, or one
query for :class:`DensePairs`, goes to ``ragged_attention`` where transformers' own function would
compute the same. Every other call goes where it went before, functions of a user's own among them,
and observers of the layer get its queries. The wrapping stays when a press's block ends:
caches outlive the blocks in which they were compressed.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moekv import ops
from moekv.cache.graphs import attend_ragged, traced
from moekv.cache.layer import crop_all_layers_or_none, repeat_all_layers
from moekv.cache.many import attend_many, is_served
from moekv.cache.masks import (
    as_seen,
    check_masks,
    held_in_graph,
    held_of,
    looks_ahead,
    parts_of,
    shows_or_hides,
    slots_of,
)
from moekv.cache.pairs import DensePairs, RaggedPairs, keep_pairs_in_their_layers
from moekv.cache.rows import Rows
from moekv.models.hooks import is_usual, replace_function, wrap_method
from moekv.models.watching import Asked, report, watched

_NATIVE = ops.available_backends()["cpu"] is None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_IGNORED = {"sdpa": frozenset({"softcap", "s_aux"})}
"""What models ask for and an attention function leaves out: decoding leaves it out as well."""


def install() -> None:
    """Wrap every attention function of transformers to serve compressed layers. Idempotent.

    Eager attention, which is not among them, is shown to whoever watches. Where it has learned
    sinks, whose models have no other attention, it serves compressed layers as well.
    """
    check_masks()
    keep_pairs_in_their_layers()
    crop_all_layers_or_none()
    repeat_all_layers()
    for name, function in list(ALL_ATTENTION_FUNCTIONS.items()):
        if not getattr(function, "serves_compressed_layers", False):
            ignored = _IGNORED.get(name, frozenset())
            serving = _serve_compressed_layers(function, ignored)
            replace_function(ALL_ATTENTION_FUNCTIONS, name, serving)
    wrap_method(type(ALL_ATTENTION_FUNCTIONS), "get_interface", _show_eager_attention)


class Served:
    """Layers that attention functions have to know, those that come out of a pickle included."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a layer, in whatever process."""
        install()
        self.__dict__.update(state)


def _show_eager_attention(get_interface: Callable[..., Any]) -> Callable[..., Any]:
    def get(self: Any, name: str, default: Callable[..., Any]) -> Any:
        function = get_interface(self, name, default)
        if self is not ALL_ATTENTION_FUNCTIONS:  # a model's own, as Doge's, whose masks are, too
            function = getattr(function, "stands_in_for", function)
        known = getattr(function, "serves_compressed_layers", False)
        return function if known else _shown(function)

    return get


@functools.lru_cache(maxsize=256)
def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the eager attention of a model's file, which is not registered under a name."""

    @functools.wraps(function)
    def attention(
        module: nn.Module, query: Tensor, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        report(module, query, key, value, kwargs)
        mask = args[0] if args else kwargs.get("attention_mask")
        if isinstance(key, RaggedPairs) and kwargs.get("s_aux") is not None:
            told = {name: x for name, x in kwargs.items() if name != "attention_mask"}
            return attend(module, query, key, mask, **told), None
        # What fits a growing layer may be the model's own, with numbers for each head.
        fits = isinstance(mask, Tensor) and mask.shape[-1] == key.shape[2]
        fitted = mask if fits and isinstance(key, DensePairs) else _fitted(mask, key)
        if fitted is not mask:
            if args:
                args = (fitted, *args[1:])
            else:
                kwargs["attention_mask"] = fitted
        return function(module, query, key, value, *args, **kwargs)

    return attention


def _fitted(mask: Any, key: Any) -> Any:
    """Bring a mask, if there is one, to the pairs of a dense layer that has been compressed."""
    shown = traced.take_shown() if torch.compiler.is_compiling() else None
    if not isinstance(mask, Tensor) or isinstance(key, RaggedPairs):
        return mask
    if shown is not None:
        return held_in_graph(mask, shown, key.shape[2])
    if isinstance(key, DensePairs):
        return held_of(mask, key.layer, key.shape[2])
    return mask if torch.compiler.is_compiling() else slots_of(mask, key)


@contextmanager
def last_queries(layers: Iterable[nn.Module], window: int) -> Iterator[dict[nn.Module, Asked]]:
    """Record the last queries of attention layers, so that they need not be recomputed.

    Parameters
    ----------
    layers : iterable of nn.Module
        Attention layers; each may be recorded by one block at a time.
    window : int
        Largest number of queries to record of a call.

    Yields
    ------
    dict
        For each layer its last call, with copies [B, Hq, W, D] of its queries, without pairs. Calls
        inside compiled graphs go unseen.
    """
    install()
    seen: dict[nn.Module, Asked] = {}

    def notice(module: nn.Module, asked: Asked) -> None:
        last = copy_last(asked.query, window)
        seen[module] = replace(asked, query=last, key=None, value=None)

    with watched(layers, notice):
        yield seen


def copy_last(query: Tensor, window: int) -> Tensor:
    """Copy the last queries [B, Hq, W, D], at most `window` of them."""
    last = query.detach()[:, :, -window:]
    return last.clone(memory_format=torch.contiguous_format)


def _is_step(
    module: nn.Module,
    query: Tensor,
    keys: DensePairs,
    values: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> bool:
    """Whether ``ragged_attention`` computes, for one query, what the model's function would.

    Only on a CPU, where the native op is faster than SDPA.
    """
    return (
        _NATIVE
        and keys.layer.backend != "torch"
        and keys.device.type == "cpu"
        and keys.dtype in _DTYPES
        and query.shape[2] == 1
        and query.dtype == keys.dtype == values.dtype
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad))
        and not dropout
        and not softcap  # some functions take it, others leave it out
        and s_aux is None
        and shows_or_hides(mask)
        and (mask is None or mask.shape[-1] == keys.shape[2])
        # The function that kvpress has wrapped writes to the keys that its head-wise presses mask.
        and getattr(module, "masked_key_indices", None) is None
    )


def _serve_compressed_layers(
    function: Callable[..., Any], ignored: frozenset[str] = frozenset()
) -> Callable[..., Any]:
    usual = is_usual(function)

    @functools.wraps(function)
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor | RaggedPairs,
        value: Any,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        attention_mask = _fitted(attention_mask, key)
        told = {name: x for name, x in kwargs.items() if name not in ignored}
        report(module, query, key, value, told)
        if usual and isinstance(key, RaggedPairs):
            return attend(module, query, key, attention_mask, **told), None
        if (
            usual
            and isinstance(key, DensePairs)
            and _is_step(module, query, key, value, attention_mask, *args, **told)
        ):
            return _attend_dense(query, key, value, attention_mask, told.get("scaling")), None
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    attention.serves_compressed_layers = True  # type: ignore[attr-defined]
    attention.stands_in_for = function  # type: ignore[attr-defined]
    return attention


def attend(
    module: nn.Module,
    query: Tensor,
    key: RaggedPairs,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    **_: Any,
) -> Tensor:
    """Attention of the newest tokens over a compressed layer.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    query : Tensor
        [B, Hq, Q, D], the queries of the last Q tokens, which are in the layer's tail already.
    key : RaggedPairs
        What the layer's ``update`` returned.
    attention_mask : Tensor, optional
        bool [B or 1, Hq or 1, Q, T], additive of the same shape (0 or very negative), or bool or
        integer [B, T] over all positions. Of what was compressed it may hide padding; other
        positions where their pairs know them.
    scaling, softcap : float, optional
        Factor of the scores (default ``D ** -0.5``) and their tanh cap (default none).
    dropout : float
        Must be 0.
    s_aux : Tensor [Hq], optional
        Learned attention sinks: logits that no pair has.
    output_attentions : bool, optional
        Must be false.

    Returns
    -------
    Tensor
        [B, Q, Hq, Dv].

    Raises
    ------
    NotImplementedError
        On dropout, and on attention weights, which are not computed.
    ValueError
        If the mask does not cover all positions, adds numbers, or hides some that are stored by
        pairs that do not know them.
    """
    if dropout:
        raise NotImplementedError(
            f"compressed caches are for inference: expected dropout 0, got {dropout}; "
            "call model.eval()"
        )
    if output_attentions:
        raise NotImplementedError(
            "expected output_attentions=False with a compressed cache, whose attention has no "
            "weights to return; a budget of 'uniform' or 'layer' keeps the model's own attention"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None or not torch.compiler.is_compiling() or _learns(query, key):
        return attend_masked(query, key, attention_mask, scaling, softcap or 0.0, s_aux)
    query, rows, tail = _cast(query, key)
    return attend_ragged(query, key.layer, rows, tail, attention_mask, scaling, softcap, s_aux)


def attend_masked(
    query: Tensor,
    key: RaggedPairs,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float,
    s_aux: Tensor | None,
) -> Tensor:
    """Attend as :func:`attend` does, which says what is what. Reads the mask."""
    layer = key.layer
    mask, context = parts_of(attention_mask, layer, layer.tail_length)
    if (had := layer.tail.seen()) is not None:
        mask = had if mask is None else mask & had
    ahead = looks_ahead(attention_mask, query.shape[2])
    if _learns(query, key) or ahead or context is not None:
        stored = None if context is None else layer.stored_of(context, query.shape[1])
        seen = None if mask is None else (stored, mask)
        return _attend_plainly(query, key, seen, scaling, softcap, s_aux, causal=not ahead)
    query, rows, tail = _cast(query, key)
    if is_served(query, rows, softcap, s_aux) and layer.backend != "torch":
        return attend_many(query, layer, rows, tail, mask, scaling)
    return ops.ragged_attention(
        query,
        rows.keys,
        rows.values,
        layer.begin,
        layer.end,
        *tail,
        mask,
        scaling=scaling,
        softcap=softcap,
        pairs=rows.pairs,
        scales=rows.scales,
        bias=rows.bias,
        sinks=None if s_aux is None else s_aux.detach().float(),
        backend=layer.backend,
    )


def _learns(query: Tensor, key: RaggedPairs) -> bool:
    """Whether gradients are to reach queries or later tokens."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (query, *key.tail))


def _cast(query: Tensor, key: RaggedPairs) -> tuple[Tensor, Rows, tuple[Tensor, Tensor]]:
    """Give queries, stored pairs and tail in autocast's dtype, as PyTorch's own attention does."""
    rows, (keys, values) = key.rows, key.tail
    if not torch.is_autocast_enabled(query.device.type):
        return query, rows, (keys, values)
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), rows.read_as(dtype, dtype), (keys.to(dtype), values.to(dtype))


def _attend_plainly(
    query: Tensor,
    key: RaggedPairs,
    shown: tuple[Tensor | None, Tensor] | None,
    scaling: float,
    softcap: float,
    s_aux: Tensor | None,
    *,
    causal: bool,
) -> Tensor:
    """Attention in plain operations, over padded pairs.

    Gradients reach queries and the tail, tokens may see later ones where the mask says so, and each
    may see other pairs of the context: `shown` says which of the stored ones (None: all) and of the
    tail, each as bool [B or 1, Hq or 1, Q or 1, n].
    """
    layer = key.layer
    keys, values, bias, lengths = layer.beside_tail()
    num_queries, longest, tail_length = query.shape[2], keys.shape[2], layer.tail_length
    place = torch.arange(longest, device=query.device)
    latest = longest - num_queries + torch.arange(num_queries, device=query.device)
    seen = (place >= (longest - lengths)[..., None, None]) & (
        (place <= latest[:, None]) if causal else place.new_ones(num_queries, 1).bool()
    )
    groups = query.shape[1] // keys.shape[1]
    keys, values, seen = (x.repeat_interleave(groups, 1) for x in (keys, values, seen))
    if bias is not None:
        bias = bias.repeat_interleave(groups, 1)[:, :, None]
    if shown is not None:
        stored, tail = shown
        if stored is None:
            stored = tail.new_ones(()).expand(*tail.shape[:-1], longest - tail_length)
        sizes = list(map(max, stored.shape[:-1], tail.shape[:-1]))
        seen = seen & torch.cat([stored.expand(*sizes, -1), tail.expand(*sizes, -1)], -1)
    # Scaled first, and not in 16 bits: products of these may be no numbers of float16.
    logits = ((query.float() * scaling) @ keys.mT.float()).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    # No infinity: a query that sees nothing would have gradients that are no numbers.
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    if s_aux is not None:
        sinks = s_aux.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1)[..., :longest].masked_fill(~seen, 0).to(values.dtype)
    return (weights @ values).transpose(1, 2)


def _attend_dense(
    query: Tensor, key: DensePairs, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of one query over the dense keys [B, H, T, D]: a tail with nothing before it."""
    batch, num_kv_heads, _, dim = key.shape
    nothing = torch.zeros((batch, num_kv_heads), dtype=torch.int32, device=key.device)
    return ops.ragged_attention(
        query,
        key.new_empty((0, dim)),
        value.new_empty((0, value.shape[3])),
        nothing,
        nothing,
        key,
        value,
        None if mask is None else as_seen(mask),
        scaling=dim**-0.5 if scaling is None else scaling,
        backend=key.layer.backend,
    )

"""What is refused: blocks in which nothing could be compressed, and forwards before they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from moekv.cache.caches import check_cache, is_compressed, is_static
from moekv.cache.layer import CompressedLayer
from moekv.cache.masks import check_shown, of_full_attention
from moekv.cache.rows import check_pairs
from moekv.experts.builder import read_starts
from moekv.models.habits import check_attention, follows_masks, habits_of
from moekv.models.hooks import implementation_of, index_of
from moekv.models.weights import device_of
from moekv.ops.formats import MAX_HEAD_DIM
from moekv.press.forward import Plan
from moekv.press.options import Options
from moekv.press.rater import Rater
from moekv.press.routing import check_able


def check_block(
    layers: Sequence[nn.Module],
    rotary: nn.Module | None,
    options: Options,
    rater: Rater,
    context_length: int | None,
) -> None:
    """Raise if no forward of a block could be compressed.

    Parameters
    ----------
    layers : sequence of nn.Module
        The attention layers whose pairs may be evicted.
    rotary : nn.Module or None
        The decoder's rotary embedding.
    options : Options
    rater : Rater
    context_length : int, optional
        Length of a prompt in chunks.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        See docs/errors.md.
    """
    habits = [habits_of(layer, rotary) for layer in layers]
    if not all(x.is_seen for x in habits):
        raise TypeError(
            "expected attention layers whose queries can be seen, got "
            f"{type(layers[0]).__name__}, which multiplies them by its keys by itself"
        )
    size, backend = max(x.head_dim for x in habits), options.backend
    if size > MAX_HEAD_DIM and backend not in ("auto", "torch"):
        raise TypeError(
            f"expected heads of at most {MAX_HEAD_DIM} channels for backend {backend!r}, got "
            f"{size} in {type(layers[0]).__name__}; backend='auto' takes others as well"
        )
    if (options.decoding is not None or context_length is not None) and any(
        x.mixes for x in habits
    ):
        raise ValueError(
            "expected attention layers of which each head reads its own pairs where "
            "compression goes on during decoding or between chunks, got "
            f"{type(layers[0]).__name__}, which reads those of all together"
        )
    if context_length is not None:
        if options.fold is True:
            raise ValueError(
                "expected fold or context_length, got both: pairs join others once, when the "
                "whole text has been read"
            )
        if options.streaming:
            raise ValueError(
                "expected streaming or context_length, got both: a prompt in chunks is "
                "compressed after each chunk, which bounds the peak already"
            )
        if options.policy == "dominant":
            raise ValueError(
                "expected policy 'mixture' where compression goes on during decoding or "
                "between chunks, got 'dominant', which has no budget to come back to"
            )
        check_able(rater.experts)
    if options.budget in ("head", "model") and options.evicts:
        check_attention(layers, rotary, f"budget {options.budget!r}")
    if options.budget == "layer" and not fits_masks(layers, rotary):
        raise ValueError(
            "expected attention layers that get their attention function by name, whose masks "
            "can be fitted to layers of different lengths, for budget 'layer', got "
            f"{type(layers[0]).__name__} with {implementation_of(layers[0])!r}; "
            "use budget='uniform'"
        )
    if options.fold is True and backend == "cuda":
        raise RuntimeError(
            "expected backend 'auto' or 'torch' with fold=True on a GPU, got 'cuda', which has no "
            "kernel of fold_pairs"
        )
    if options.pairs not in ("16", "auto"):
        check_attention(layers, rotary, f"pairs {options.pairs!r}")
        device = device_of(layers[0])
        for sizes in {x.sizes for x in habits if x.sizes is not None}:
            check_pairs(options.pairs, *sizes, device=device, backend=backend)


def fits_masks(layers: Sequence[nn.Module], rotary: nn.Module | None) -> bool:
    """Return whether masks can be fitted to dense layers of different lengths."""
    return all(follows_masks(layer, rotary) for layer in layers)


def check_prefill(
    plan: Plan,
    rotary: nn.Module | None,
    cache: Any,
    num_tokens: int,
    given: Mapping[str, Any],
) -> None:
    """Refuse a prompt, the first tokens of a cache, that cannot be compressed as planned."""
    layers = plan.layers
    if is_static(cache):
        _check_room(cache, index_of(layers[0]), num_tokens)
    if plan.options.decoding is not None:
        _check_positions(given, num_tokens, plan.origin)
    mask, padded = of_full_attention(given.get("attention_mask")), False
    if isinstance(mask, Tensor) and plan.acts:
        padded = any(read_starts(mask[..., :num_tokens] if is_static(cache) else mask))
    if cache is not None:
        check_cache(
            cache,
            indices=[index_of(layer) for layer in layers],
            static=_not_for_static(plan, padded),
        )
    if plan.context_length is not None:
        _check_chunk(plan, 0, num_tokens, given)
        if plan.acts:
            check_attention(layers, rotary, "a prompt in chunks")
    if padded:
        check_attention(layers, rotary, "rows with padding")


def check_more(
    plan: Plan,
    cache: Cache,
    is_own: bool,
    num_cached: int,
    num_tokens: int,
    wanted: int,
    given: Mapping[str, Any],
) -> None:
    """Refuse tokens for a cache that is not empty, unless their positions are right.

    ``is_own``: whether the block has filled it.
    """
    index = index_of(plan.layers[0])
    first_layer = cache.layers[index]
    if is_static(cache):
        _check_room(cache, index, num_tokens)
    serves = plan.goes_on or is_own or is_compressed(first_layer)
    if plan.acts and not serves:
        raise RuntimeError(
            f"MoERouterPress compressed nothing: expected a prefill inside the block, got "
            f"{num_tokens} token(s) for a cache that holds {num_cached}, fed outside of it"
        )
    if plan.goes_on and isinstance(first_layer, CompressedLayer):
        check_shown(given.get("attention_mask"), first_layer)
    if num_tokens <= 1:
        return
    if plan.context_length is not None and num_cached < plan.context_length:
        _check_chunk(plan, num_cached, num_tokens, given)
        return
    if plan.options.decoding is None and wanted != num_tokens:
        raise RuntimeError(
            f"expected a prefill in one forward, got {num_tokens} tokens for a cache that "
            f"holds {num_cached}: leave the `with` block before feeding more than one "
            "token at a time, and feed the whole prompt at once, or give its length "
            "as context_length (moekv.prefill_in_chunks does)"
        )
    position = given.get("cache_position")
    first = num_cached if position is None else int(position[0])
    if is_compressed(first_layer) and first != num_cached:
        raise RuntimeError(
            f"expected tokens at position {num_cached}, behind what the cache has seen, got "
            f"{num_tokens} at {first}: their masks would be wrong"
        )
    _check_positions(given, num_cached + num_tokens, plan.origin)


def _not_for_static(plan: Plan, padded: bool) -> str | None:
    """Name the option that excludes static caches."""
    options = plan.options
    if plan.goes_on:
        return "repeated compression (decoding, context_length)"
    if options.streaming:
        return "streaming, which frees memory while layers run"
    if options.quantises:
        return f"pairs {options.pairs!r}"
    if plan.evicts and (plan.budget != "uniform" or options.policy != "mixture"):
        return f"budget {plan.budget!r} with policy {options.policy!r}"
    return "rows with padding" if padded else None


def _check_chunk(plan: Plan, num_cached: int, num_tokens: int, given: Mapping[str, Any]) -> None:
    """Refuse a chunk beyond the prompt, or at wrong positions."""
    length, seen = plan.context_length, num_cached + num_tokens
    if length is not None and seen > length:
        raise RuntimeError(
            f"expected a prompt of context_length = {length} tokens, got "
            f"{num_tokens} for a cache that holds {num_cached}"
        )
    _check_positions(given, seen, plan.origin)


def _check_positions(given: Mapping[str, Any], seen: int, origin: int) -> None:
    """Refuse positions beyond the tokens fed so far, the first of which is at `origin`."""
    position_ids, end = given.get("position_ids"), seen + origin
    if isinstance(position_ids, Tensor) and int(position_ids.max()) >= end:
        raise RuntimeError(
            f"expected positions below {end} for the last of {seen} tokens, got "
            f"{int(position_ids.max())}: some versions of transformers number the chunks of "
            "generate(prefill_chunk_size=...) wrongly; moekv.prefill_in_chunks does not"
        )


def _check_room(cache: Cache, index: int, num_tokens: int) -> None:
    """Refuse tokens for which a static cache has no slots."""
    layer = cache.layers[index]
    slots: int = layer.max_cache_len  # type: ignore[attr-defined]
    filled = int(layer.get_seq_length()) - int(getattr(layer, "evicted", 0))
    if filled + num_tokens > slots:
        raise ValueError(
            f"expected a static cache of at least {filled + num_tokens} slots, got {slots}, of "
            f"which {filled} are filled, and {num_tokens} more token(s)"
        )

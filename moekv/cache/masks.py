"""Attention masks over compressed layers: their meaning is kept, or they are refused.

A layer that knows the positions of its pairs follows any mask that shows and hides
(``CompressedLayer.follows_masks``). Over others a mask can only show all of a context, and hide
padding, which is never stored; for later tokens it holds as it is. transformers builds a mask from
the caller's once for all layers of a forward, with the size that a cache layer reports: there the
caller's mask is checked whole.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from moekv.cache.graphs import assert_shown, shown_context, shown_part, traced
from moekv.models.hooks import replace_function

if TYPE_CHECKING:
    from moekv.cache.growing import GrowingLayer
    from moekv.cache.layer import CompressedLayer
    from moekv.cache.static import CompactStaticLayer


@dataclass
class Known:
    """What a mask does that transformers has made of one which has been checked.

    Attributes
    ----------
    hides : bool
        Whether it hides positions of a context that may be stored.
    ahead : bool or None
        Whether it looks ahead; None: that has not been asked.
    """

    hides: bool = False
    ahead: bool | None = None


_seen_whole = WeakIdKeyDictionary()
"""Such masks, with a ``Known`` of each."""
_static = WeakIdKeyDictionary()
"""Static layers, by what they hand to attention: the buffers of their keys."""


class Offset(int):
    """Position of a mask's first column, with the layer that reported it.

    Attributes
    ----------
    layer : CompressedLayer or CompactStaticLayer
    expect : callable, optional
        Prepares other layers of its cache for so many rows.
    """

    layer: "CompressedLayer | CompactStaticLayer"
    expect: Callable[[int], None] | None = None


def offset_of(layer: "CompressedLayer | CompactStaticLayer", offset: int) -> int:
    """Return where a layer's mask begins, so that the mask is checked when it is made."""
    if torch.compiler.is_compiling():
        traced.asked = layer if layer.context_length else None
        return offset
    if not layer.context_length:
        return offset
    marked = Offset(offset)
    marked.layer = layer
    return marked


def check_masks() -> None:
    """Make transformers' mask functions check masks for compressed layers. Idempotent."""
    for name, function in list(ALL_MASK_ATTENTION_FUNCTIONS.items()):
        if not getattr(function, "checks_masks", False):
            replace_function(ALL_MASK_ATTENTION_FUNCTIONS, name, _checking(function))


def _checking(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _make_in_graph(function, args, kwargs)
        offset, given = kwargs.get("kv_offset"), kwargs.get("attention_mask")
        if not isinstance(offset, Offset):
            return function(*args, **kwargs)
        if offset.expect is not None:
            offset.expect(kwargs["batch_size"])
        hides = isinstance(given, Tensor) and check_context(given.bool(), offset.layer)
        made = function(*args, **_with_window(kwargs, offset.layer))
        if isinstance(made, Tensor):
            _seen_whole[made] = Known(hides)
        return made

    make.checks_masks = True  # type: ignore[attr-defined]
    return make


def _make_in_graph(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make a mask while a model is traced: the caller's is checked when the graph runs."""
    layer, given = traced.take_asked(), kwargs.get("attention_mask")
    if layer is None:
        return function(*args, **kwargs)
    if isinstance(layer, StaticLayer):
        if isinstance(given, Tensor):
            assert_shown(given, layer.context)
        return function(*args, **kwargs)
    kwargs = _with_window(kwargs, layer)
    if isinstance(given, Tensor):
        return function(*args, **kwargs | {"attention_mask": shown_context(given, layer)})
    is_causal = kwargs.get("mask_function") is causal_mask_function
    # One token sees all that there is: transformers makes no mask then, but of graphs it does.
    return None if is_causal and _num_queries(kwargs) == 1 else function(*args, **kwargs)


def _with_window(
    kwargs: dict[str, Any], layer: "CompressedLayer | CompactStaticLayer"
) -> dict[str, Any]:
    """Have a mask with a window be made over all positions.

    Layers with windows are not compressed. Where a cache does not know them (``DynamicCache()``
    without a config), transformers takes the size of their mask from the first layer, which may
    hold fewer pairs; dense layers cut a mask that is wider than they are, see :func:`held_of`.
    """
    if kwargs.get("local_size") is None or isinstance(layer, StaticLayer):
        return kwargs
    return kwargs | {"kv_length": kwargs["kv_length"] + kwargs["kv_offset"], "kv_offset": 0}


def _num_queries(kwargs: dict[str, Any]) -> int:
    """Count the tokens that ask, by the arguments of a mask function."""
    positions = kwargs.get("cache_position")  # before transformers 5.4 or so
    return int(kwargs["q_length"]) if positions is None else len(positions)


def check_context(seen: Tensor, layer: "CompressedLayer | CompactStaticLayer") -> bool:
    """Return whether a mask hides positions of a context that may be stored.

    Waits for the device.

    Parameters
    ----------
    seen : Tensor [B or 1, ..., T], bool
        From position 0 on.
    layer : CompressedLayer

    Raises
    ------
    ValueError
        It does, and the layer cannot follow it.
    """
    return check_hidden(seen, layer.first, layer.context_length, follows=layer.follows_masks)


def check_hidden(seen: Tensor, first: Tensor | None, length: int, *, follows: bool) -> bool:
    """Do what :func:`check_context` does, by what it needs to know of a layer."""
    hidden = ~seen[..., :length]
    if first is not None:
        if len(first) > 1 < len(seen):
            check_rows(len(first), len(seen))
        first = first.to(seen.device).view(-1, *[1] * (seen.dim() - 1))
        hidden = hidden & (torch.arange(hidden.shape[-1], device=seen.device) >= first)
    hides = bool(hidden.any())
    if seen.shape[-1] < length or (hides and not follows):
        _refuse(length, seen.shape[-1])
    return hides


def check_rows(held: int, rows: int) -> None:
    """Raise where a cache has other rows than new tokens.

    Raises
    ------
    ValueError
        Says how the cache is made to have as many, if each may be continued as often.
    """
    if rows == held:
        return
    instead = ""
    if rows % held == 0:
        instead = (
            f"; cache.reorder_cache(torch.arange({held}).repeat_interleave({rows // held})) has "
            "each row continued as often, as generate(num_return_sequences=...) does"
        )
    raise ValueError(f"expected new tokens of {held} rows for this cache, got {rows}{instead}")


def of_full_attention(mask: Any) -> Any:
    """Take a mask as a model gets it, which is one for each kind of layer in hybrid models."""
    return mask.get("full_attention") if isinstance(mask, dict) else mask


def check_shown(mask: Any, layer: "CompressedLayer") -> None:
    """Raise if a mask hides what may be stored from tokens behind which pairs are evicted.

    What is hidden would count as padding there.

    Parameters
    ----------
    mask : Any
        As a model gets it. In two dimensions, or in four.
    layer : CompressedLayer

    Raises
    ------
    ValueError
        It does.
    """
    mask = of_full_attention(mask)
    if not isinstance(mask, Tensor) or not layer.context_length or not layer.follows_masks:
        return  # or attention checks it
    if check_context(as_seen(mask), layer):
        raise ValueError(
            f"expected an attention mask that shows the {layer.context_length} positions that were "
            "compressed together, but for padding at their left, while compression goes on "
            "(decoding, context_length), got one that hides some of them: feed these tokens "
            "outside of the block"
        )


def _refuse(length: int, width: int) -> None:
    raise ValueError(
        f"expected an attention mask that shows the {length} positions that were "
        f"compressed together, but for padding at their left, got one over {width} that hides some "
        "of them: the pairs that a layer holds of these do not know their positions, or hold more "
        "than their own (docs/errors.md)"
    )


def shown_by(mask: Tensor) -> Tensor:
    """Mark the keys that a mask shows, in its own shape: to those it adds 0."""
    return mask == 0 if mask.is_floating_point() else mask.bool()


def as_seen(mask: Tensor) -> Tensor:
    """Read a mask as bool [B or 1, Hq or 1, Q or 1, T], True where a key is seen.

    Raises
    ------
    ValueError
        It adds anything but 0 and the most negative number, or less.
    """
    if mask.dim() == 2:
        return mask[:, None, None].bool()
    if not mask.is_floating_point():
        return mask.bool()
    seen = mask == 0
    hides = mask <= torch.finfo(mask.dtype).min / 2
    if mask not in _seen_whole and not bool((seen | hides).all()):
        raise ValueError(
            "expected an attention mask that shows or hides keys, got one that adds finite "
            "numbers, which attention over a compressed layer leaves out"
        )
    return seen


def looks_ahead(mask: Tensor | None, num_queries: int) -> bool:
    """Return whether a mask shows new tokens to such as come before them.

    As those of images and of prefixes do. Waits for the device, once for all layers if transformers
    has made it.

    Parameters
    ----------
    mask : Tensor, optional
        As attention gets it, over all positions.
    num_queries : int
        New tokens, the last positions.
    """
    if mask is None or mask.dim() == 2 or num_queries == 1:
        return False
    known: Known = _seen_whole[mask] if mask in _seen_whole else Known()
    if known.ahead is None:
        seen = as_seen(mask)[..., -num_queries:]
        known.ahead = seen.shape[-2] == 1 or bool(seen.triu(1).any())
    return known.ahead


def shows_or_hides(mask: Tensor | None) -> bool:
    """Return, without reading the mask, whether it is known to do no more than that."""
    return mask is None or not mask.is_floating_point() or mask in _seen_whole


def parts_of(
    mask: Tensor | None, layer: "CompressedLayer", tail_length: int
) -> tuple[Tensor | None, Tensor | None]:
    """Take a mask apart, as bool [B or 1, Hq or 1, Q or 1, ...].

    Parameters
    ----------
    mask : Tensor, optional
        As attention gets it, over all positions.
    layer : CompressedLayer
        With the tokens that are asking.
    tail_length : int
        Positions at the end, S, those behind the context among them.

    Returns
    -------
    tail : Tensor [..., S] or None
        None: all are seen.
    context : Tensor [..., T] or None
        None: all that may be stored are seen.

    Raises
    ------
    ValueError
        It is not over all positions, adds numbers, or hides some of a context that does not know
        its positions.
    """
    if mask is None:
        return None, None
    length = layer.get_seq_length()
    if mask.shape[-1] != length:
        raise ValueError(
            f"expected an attention mask over all {length} positions of the compressed cache, "
            f"got one over {mask.shape[-1]}"
        )
    seen = as_seen(mask)
    if mask not in _seen_whole:
        hides = check_context(seen, layer)
    elif (hides := _seen_whole[mask].hides) and not layer.follows_masks:  # as the first layer does
        _refuse(layer.context_length, length)
    tail = seen[..., length - tail_length :]
    return tail, seen[..., : layer.context_length] if hides else None


def held_of(mask: Tensor, layer: "CompressedLayer", held: int) -> Tensor:
    """Bring a mask to what a dense layer holds.

    transformers makes one mask for all layers, as wide as the first one needs, whose columns stand
    for the last positions. Pairs before these are shown: all of a dense context are.

    Parameters
    ----------
    mask : Tensor
        As attention gets it, or over all positions, where it is the caller's.
    layer : CompressedLayer
        With the tokens that are asking.
    held : int
        Pairs of a head.
    """
    length, width = layer.get_seq_length(), mask.shape[-1]
    if mask in _seen_whole:
        if _seen_whole[mask].hides and not layer.follows_masks:  # as the first layer does
            _refuse(layer.context_length, width)
        fitted = widened(mask, held)
        _seen_whole[fitted] = _seen_whole[mask]
        return fitted
    if held == length or width not in (held, length):
        return mask  # places are positions; or it does not fit
    part = mask[..., : _context_in(mask, layer)]
    if not bool(shown_by(part).all()):
        _refuse(layer.context_length, width)
    return mask[..., width - held :]


def held_in_graph(mask: Tensor, layer: "GrowingLayer", held: int) -> Tensor:
    """Do what :func:`held_of` does in a graph, which checks any mask as it runs."""
    context = _context_in(mask, layer)
    return widened(shown_part(mask, context) if layer.evicted and context > 0 else mask, held)


def _context_in(mask: Tensor, layer: "CompressedLayer") -> int:
    """Count a mask's columns for a layer's context, where its last column is the last token's.

    Negative, if it begins behind the context.
    """
    return layer.context_length - (layer.get_seq_length() - mask.shape[-1])


def widened(mask: Tensor, width: int) -> Tensor:
    """Cut a mask at its left, or show what is before it."""
    if mask.shape[-1] == width:
        return mask
    shown = 0.0 if mask.is_floating_point() else 1
    return functional.pad(mask, (width - mask.shape[-1], 0), value=shown)


def remember_buffer(keys: Tensor, layer: "CompactStaticLayer") -> None:
    """Remember the layer whose keys attention is going to get."""
    _static[keys] = weakref.ref(layer)


def slots_of(mask: Tensor, keys: Tensor) -> Tensor:
    """Bring a caller's own mask to the slots of a static layer that has been compressed.

    transformers' are over slots already, of which slot s behind the context stands for position
    s + evicted; so may the caller's be. Or it is one for an uncompressed cache, over
    positions. The newest token's own column, which it sees, tells one from the other: it is the
    last slot that is filled in the one, and behind that in the other.

    Parameters
    ----------
    mask : Tensor [..., T]
        As attention gets it.
    keys : Tensor
        As the cache has handed them to attention; a mask over those of other layers comes back.

    Raises
    ------
    ValueError
        The mask hides pairs of the context, or it is over neither.
    """
    layer: CompactStaticLayer | None = _static[keys]() if keys in _static else None
    if layer is None or not layer.num_evicted or mask in _seen_whole:
        return mask
    width, slots, evicted = mask.shape[-1], layer.max_cache_len, layer.num_evicted
    length = int(layer.get_seq_length())
    seen = shown_by(mask)

    def newest_sees(column: int) -> bool:
        return column < width and bool(seen[..., -1, column].any())

    context = layer.context_length
    if newest_sees(length - 1):
        made = mask[..., evicted : evicted + slots]
    elif width == slots and newest_sees(length - evicted - 1):
        made, context = mask, context - evicted
    else:
        raise ValueError(
            f"expected an attention mask over all {length} positions, or over the {slots} slots of "
            f"the static cache, that shows the newest token itself, got one over {width}"
        )
    if not bool(seen[..., :context].all()):
        _refuse(layer.context_length, width)
    missing = slots - made.shape[-1]
    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    return functional.pad(made, (0, missing), value=hidden) if missing else made

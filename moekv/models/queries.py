"""How an attention layer forms its queries: projected, normed or not, rotated or not."""

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.phi3.modeling_phi3 import Phi3Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from moekv.models.hooks import positions_of

_rotates: weakref.WeakKeyDictionary[nn.Module, bool | None] = weakref.WeakKeyDictionary()
"""Whether an attention layer rotates its queries; None: they are none that can be formed here."""

_BEGUN = torch.empty(0)  # in the place of projections that are still to come


@contextmanager
def projected_queries(
    layers: Iterable[nn.Module], holder: Callable[[], dict[nn.Module, Tensor] | None]
) -> Iterator[None]:
    """Hold what the running layers' queries are before their rotation, to project only once.

    Parameters
    ----------
    layers : iterable of nn.Module
        Attention layers.
    holder : callable
        Gives the dict of the forward that runs in this thread, or None where nobody wants them.
        For each layer it then has what its query projection, or the norm behind it, gave. Whoever
        takes it out gives the memory back. Compiled graphs go unseen.
    """
    handles = []

    def begin(layer: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and (held := holder()) is not None:
            held[layer] = _BEGUN

    def hold(layer: nn.Module, _: nn.Module, args: Any, output: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        held = holder()
        # Whoever projects beside the layer's forward is not meant.
        if held is not None and held.get(layer) is _BEGUN:
            held[layer] = output.detach()

    for layer in layers:
        last = _last_before_rotation(layer)
        if last is not None:
            handles.append(layer.register_forward_pre_hook(begin))
            handles.append(last.register_forward_hook(partial(hold, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_before_rotation(module: nn.Module) -> nn.Module | None:
    """Find what gives an attention layer's queries in a layout that is known."""
    if isinstance(module, Phi3Attention):
        return module.qkv_proj
    normed = isinstance(module, (Qwen3Attention, Gemma3Attention))
    if hasattr(module, "q_norm") and not normed:
        return None
    return getattr(module, "q_norm" if normed else "q_proj", None)


def as_queries(module: nn.Module, projected: Tensor | None, num_tokens: int) -> Tensor | None:
    """Cut queries out of what :func:`projected_queries` held.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    projected : Tensor or None
    num_tokens : int

    Returns
    -------
    Tensor [B, Hq, N, D] or None
        None if it is of other tokens, or in a layout that is not known.
    """
    if projected is None or projected is _BEGUN:
        return None
    num_heads: int = module.config.num_attention_heads  # type: ignore[assignment, union-attr]
    dim: int = module.head_dim  # type: ignore[assignment]
    if isinstance(module, Gemma3Attention):  # whose norm comes behind the transposition
        queries = projected
    else:
        queries = projected.flatten(2)
        if isinstance(module, Phi3Attention):
            queries = queries[..., : num_heads * dim]
        if queries.shape[2] != num_heads * dim:
            return None
        queries = queries.view(*queries.shape[:2], num_heads, dim).transpose(1, 2)
    return queries if queries.shape[1:] == (num_heads, num_tokens, dim) else None


def window_queries(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    window: int,
    offset: int | None,
    rotary: nn.Module | None = None,
) -> Tensor:
    """Form the rotated queries of the last tokens of a prefill or of a part of it.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    hidden_states : Tensor [B, N, hidden]
    kwargs : mapping
        Of the layer's forward.
    window : int
        Tokens, at most.
    offset : int or None
        Where in the forward the hidden states begin; None: they end with it.
    rotary : nn.Module, optional
        The decoder's rotary embedding, where the layer has none of its own.

    Returns
    -------
    Tensor [B, Hq, W, D]
    """
    queries = project_queries(module, hidden_states[:, -window:])
    num_queries = queries.shape[2]
    if offset is None:
        cos, sin = rotations(module, hidden_states, kwargs, range(1 - num_queries, 1), rotary)
    else:
        end = offset + hidden_states.shape[1]
        cos, sin = (x[:, end - num_queries : end] for x in kwargs["position_embeddings"])
    return rotate(module, queries, cos, sin)


def recent_queries(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    rotary: nn.Module | None = None,
) -> Tensor:
    """Form the queries of the last tokens, rotated at their true positions.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    hidden_states : Tensor [B, N, hidden]
        Its inputs, of the last N tokens that were fed, one after another.
    kwargs : mapping
        Of the layer's last forward, whose positions end with the last token's.
    rotary : nn.Module, optional
        The decoder's rotary embedding, where the layer has none of its own.

    Returns
    -------
    Tensor [B, Hq, N, D]
    """
    back = range(1 - hidden_states.shape[1], 1)
    cos, sin = rotations(module, hidden_states, kwargs, back, rotary)
    return rotate(module, project_queries(module, hidden_states), cos, sin)


def rotations(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    steps: range,
    rotary: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Give the cosines and sines [B or 1, steps, dim] so many positions from the last token's."""
    position_ids = positions_of(kwargs)
    positions = position_ids[:, -1:] + torch.arange(
        steps.start, steps.stop, device=position_ids.device
    )
    rotary = getattr(module, "rotary_emb", rotary)
    assert rotary is not None
    options = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        options["layer_type"] = module.layer_type
    cos, sin = rotary(hidden_states, positions, **options)
    return cos, sin


def project_queries(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """Form the queries of tokens, normed if they are, not rotated.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    hidden_states : Tensor [B, N, hidden]

    Returns
    -------
    Tensor [B, Hq, N, D]

    Raises
    ------
    NotImplementedError
        The layer has neither ``q_proj`` nor ``qkv_proj``.
    """
    layer: Any = module
    num_channels = layer.config.num_attention_heads * layer.head_dim
    if hasattr(layer, "q_proj"):
        queries = layer.q_proj(hidden_states)
    elif hasattr(layer, "qkv_proj"):
        queries = layer.qkv_proj(hidden_states)[..., :num_channels]
    else:
        raise NotImplementedError(
            f"expected an attention layer with q_proj or qkv_proj, got {type(module).__name__}"
        )
    norm = getattr(layer, "q_norm", None)
    heads = (*hidden_states.shape[:2], -1, layer.head_dim)
    if norm is None:
        return queries.view(heads).transpose(1, 2)  # type: ignore[no-any-return]
    # Over all channels at once (OLMo 2), or head by head (Qwen3, Gemma 3).
    together = getattr(norm, "weight", queries[:0]).shape[-1] == num_channels
    queries = norm(queries).view(heads) if together else norm(queries.view(heads))
    return queries.transpose(1, 2)  # type: ignore[no-any-return]


@torch.no_grad()
def learn_rotation(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    queries: Tensor,
    projected: Tensor | None,
) -> None:
    """Find out from a layer's own last query how it forms it. Waits for the device, once.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    hidden_states : Tensor [B, N, hidden]
    kwargs : mapping
        Of the layer's forward.
    queries : Tensor [B, Hq, W, D]
        The layer's own, of the last tokens.
    projected : Tensor [B, Hq, N, D] or None
        Before their rotation, where they are at hand.
    """
    if module in _rotates or not hasattr(module, "head_dim"):
        return
    asked = queries[:, :, -1:].float()
    if not asked.isfinite().all():
        return
    if projected is None:
        projected = project_queries(module, hidden_states[:, -1:])
    plain = projected[:, :, -1:]
    turned = rotate(module, plain, *(x[:, -1:] for x in kwargs["position_embeddings"]))
    near = [(x.float() - asked).abs().amax() <= 0.05 * asked.abs().amax() for x in (turned, plain)]
    is_turned, is_plain = torch.stack(near).tolist()
    if not (is_turned and is_plain):  # as at position 0, which says nothing
        _rotates[module] = is_turned if is_turned or is_plain else None


@functools.cache
def _own_rotation(name: str) -> Callable[..., Any] | None:
    """Find the rotation in a model's file, if it turns neighbours and not halves of a head."""
    file = sys.modules[name]
    half, apply = (getattr(file, name, None) for name in ("rotate_half", "apply_rotary_pos_emb"))
    if half is None or apply is None or half(torch.arange(4)).tolist() == [-2, -3, 0, 1]:
        return None
    return apply  # type: ignore[no-any-return]


def logit_options(module: nn.Module) -> dict[str, float]:
    """Say how a layer makes logits of the products of queries and keys.

    Parameters
    ----------
    module : nn.Module
        The attention layer.

    Returns
    -------
    dict
        ``scaling``, that of SDPA if the layer names none, and ``softcap``, 0: none.
    """
    layer: Any = module
    scaling = getattr(layer, "scaling", None)
    return {
        "scaling": float(layer.head_dim) ** -0.5 if scaling is None else scaling,
        "softcap": getattr(layer.config, "attn_logit_softcapping", None) or 0.0,
    }


def rotates(module: nn.Module) -> bool | None:
    """Say whether a layer rotates its queries, as far as is known; None: they are of its own."""
    return _rotates.get(module, True)


def rotate(module: nn.Module, queries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels, as many as the cosines have (Phi3: not all).

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    queries : Tensor [B, Hq, N, D]
    cos, sin : Tensor [B or 1, N or 1, dim]

    Returns
    -------
    Tensor [B, Hq, N, D]
        As they are where the layer rotates nothing (as some of SmolLM3).
    """
    if _rotates.get(module) is False:
        return queries
    # In the layout that projections have, [B, W, Hq, D]: several times faster than across it.
    source = queries.transpose(1, 2)
    dim = cos.shape[-1]
    if (own := _own_rotation(type(module).__module__)) is not None:
        part = source[..., :dim]
        rotated, _ = own(part, part, cos, sin, unsqueeze_dim=2)
        return torch.cat([rotated, source[..., dim:]], dim=-1).transpose(1, 2)
    cos, sin = cos[:, :, None], sin[:, :, None]
    half = dim // 2
    left, right = source[..., :half], source[..., half:dim]
    rotated = source[..., :dim] * cos
    rotated[..., :half] -= right * sin[..., :half]
    rotated[..., half:] += left * sin[..., half:]
    if dim < source.shape[-1]:
        rotated = torch.cat([rotated, source[..., dim:]], dim=-1)
    return rotated.transpose(1, 2)

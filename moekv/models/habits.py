"""How attention layers use their pairs, tested before a forward runs."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moekv.models.hooks import (
    SHARED_PAIRS,
    has_usual_attention,
    implementation_of,
    looks_up,
    names,
    needed_by,
    takes,
)
from moekv.models.traceless import traceless
from moekv.models.watching import HEAD_BY_HEAD, StandIn, ask
from moekv.models.weights import device_of


@dataclass(frozen=True)
class Habits:
    """Properties of an attention layer, observed on one token.

    Attributes
    ----------
    is_seen : bool
        Whether its queries can be observed.
    hands_over : bool
        Whether its attention function gets exactly what the cache returns. Only then heads may hold
        different numbers of pairs.
    mixes : bool
        Whether it combines the pairs of all heads, so that all have to hold the same tokens:
        latents from which keys and values are computed (DeepSeek V3), a mask (Doge).
    head_dim : int
        Of keys or values as attention gets them, whichever is larger; 0: not known.
    has_sinks : bool
        Whether logits that no pair has are learned beside those of the pairs (GPT-OSS).
    sizes : tuple of int, int, torch.dtype, or None
        Channels of a key and a value, and their dtype, where both were observed.
    """

    is_seen: bool
    hands_over: bool
    mixes: bool
    head_dim: int = 0
    has_sinks: bool = False
    sizes: tuple[int, int, torch.dtype] | None = None


_known: weakref.WeakKeyDictionary[nn.Module, tuple[str, Habits]] = weakref.WeakKeyDictionary()


def habits_of(layer: nn.Module, rotary: nn.Module | None = None) -> Habits:
    """Test an attention layer, once for each attention implementation.

    Parameters
    ----------
    layer : nn.Module
    rotary : nn.Module, optional
        The decoder's rotary embedding.
    """
    implementation = implementation_of(layer)
    if layer not in _known or _known[layer][0] != implementation:
        _known[layer] = implementation, _try(layer, rotary)
    return _known[layer][1]


def _try(layer: nn.Module, rotary: nn.Module | None) -> Habits:
    size = _hidden_size(layer)
    if names(layer, "sinusoidal_pos"):  # which it cannot be told again for some of its tokens
        return Habits(False, False, False)
    if size is None:
        return Habits(looks_up(layer), False, False)
    dtypes = (p.dtype for p in layer.parameters() if p.is_floating_point())  # not quantised ones
    dtype = next(dtypes, torch.get_default_dtype())
    device = device_of(layer)
    states = torch.ones(1, 1, size, dtype=dtype, device=device)
    positions = torch.zeros(1, 1, dtype=torch.long, device=device)
    given: dict[str, Any] = dict.fromkeys(needed_by(layer))
    if names(layer, SHARED_PAIRS):
        given[SHARED_PAIRS] = {}
    if takes(layer, "position_ids"):
        given["position_ids"] = positions
    cache = StandIn(int)
    try:
        if rotary is not None and takes(layer, "position_embeddings"):
            given["position_embeddings"] = rotary_of(rotary, layer, states, positions)
        asked = ask(layer, states, given, cache)
    except NotImplementedError:
        return Habits(False, False, False)
    except Exception:  # a layer that needs further arguments: nothing is known of it
        return Habits(looks_up(layer), False, False, getattr(layer, "head_dim", 0) or 0)
    if cache.pairs is None:
        return Habits(True, False, False)
    if asked.key is None:  # it computes attention itself
        mixes = bool(cache.touched - HEAD_BY_HEAD)
        return Habits(True, False, mixes, getattr(layer, "head_dim", 0) or 0)
    is_whole = asked.key is cache.pairs[0] and asked.value is cache.pairs[1]
    hands_over = is_whole and not cache.touched
    sizes = int(asked.key.shape[3]), int(asked.value.shape[3])
    return Habits(
        True, hands_over, not hands_over, max(sizes), asked.has_sinks, (*sizes, asked.key.dtype)
    )


def _hidden_size(layer: nn.Module) -> int | None:
    """Find the size of an attention layer's input; None: not known."""
    size = getattr(getattr(layer, "config", None), "hidden_size", getattr(layer, "embed_dim", None))
    linear = next((x for x in layer.modules() if isinstance(x, nn.Linear)), None)
    return size if size is not None or linear is None else linear.in_features


EAGER = "'eager' attention"


def why_dense(layer: nn.Module, rotary: nn.Module | None = None) -> str | None:
    """Say why an attention layer can only read dense pairs; None: it reads ragged ones as well."""
    habits = habits_of(layer, rotary)
    if not habits.hands_over:
        return f"{type(layer).__name__}, whose attention gets more or less than its cache returns,"
    if habits.has_sinks and not _has_kernel_with_sinks(layer):
        return f"attention with learned sinks, without a kernel on {device_of(layer)},"
    if not has_usual_attention(layer):
        return (
            f"{implementation_of(layer)!r}, an attention function that transformers does not have,"
        )
    if not habits.has_sinks and implementation_of(layer) == "eager":
        return EAGER
    return None


def _has_kernel_with_sinks(layer: nn.Module) -> bool:
    return device_of(layer).type == "cpu"


def follows_masks(layer: nn.Module, rotary: nn.Module | None = None) -> bool:
    """Return whether each layer's attention can be given a mask of its own length.

    It cannot where the model's own code computes attention, cuts a mask, or reads latents of all
    heads, and where a mask is not a tensor (flex attention).
    """
    own = not looks_up(layer) or habits_of(layer, rotary).mixes
    return not own and implementation_of(layer) != "flex_attention"


def check_attention(layers: Iterable[nn.Module], rotary: nn.Module | None, what: str) -> None:
    """Raise unless the model's attention implementation can serve ragged layers.

    Parameters
    ----------
    layers : iterable of nn.Module
        Attention layers of the model.
    rotary : nn.Module or None
        The decoder's rotary embedding.
    what : str
        Why the layers are ragged, for the message.

    Raises
    ------
    ValueError
        It is in the model's own code, and cannot be replaced.
    """
    layer = next((layer for layer in layers if why_dense(layer, rotary) is not None), None)
    if layer is None:
        return
    habits = habits_of(layer, rotary)
    if habits.has_sinks and habits.hands_over:
        raise ValueError(
            f"expected a model without learned attention sinks for {what}, got "
            f"{type(layer).__name__} on {device_of(layer)}, whose kernels have none yet; use "
            "budget='uniform' or 'layer' and rows without padding"
        )
    if looks_up(layer) and implementation_of(layer) == "eager":
        raise ValueError(
            f"expected an attention implementation such as 'sdpa' for {what}, got 'eager', which "
            'reads dense caches only; load the model with attn_implementation="sdpa"'
        )
    if not has_usual_attention(layer):
        raise ValueError(
            f"expected an attention function of transformers such as 'sdpa' for {what}, got "
            f"{implementation_of(layer)!r}, which reads dense caches only. If it hands what it "
            "gets to a registered function, it may say so: function.serves_compressed_layers = True"
        )
    raise ValueError(
        f"expected a model whose attention can be replaced for {what}, got "
        f"{type(layer).__name__}, which reads dense caches only; use budget='uniform' and rows "
        "without padding"
    )


def rotary_of(rotary: nn.Module, layer: nn.Module, states: Any, positions: Any) -> Any:
    """Call a rotary embedding for a layer, at positions [B or 1, N]."""
    options: dict[str, Any] = {}
    by_kind = not isinstance(getattr(rotary, "rope_type", None), str)  # Phi-MoE's has one for all
    if by_kind and "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds = getattr(getattr(layer, "config", None), "layer_types", None)
        kind = getattr(layer, "layer_type", None)
        options["layer_type"] = kind or (kinds[layer.layer_idx] if kinds else "full_attention")
    if axes := _num_axes(rotary):
        positions = positions.expand(axes, *positions.shape)
    with traceless(rotary):
        return rotary(states, positions, **options)


def _num_axes(rotary: Any) -> int:
    """Count what a position consists of, such as time, height and width (M-RoPE); 0: a number."""
    parameters = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    given = next((kind["mrope_section"] for kind in kinds if kind.get("mrope_section")), None)
    sections = given or getattr(rotary, "mrope_section", None) or ()
    if isinstance(sections, dict):  # for each kind of layer
        sections = next(iter(sections.values()))
    return len(sections)

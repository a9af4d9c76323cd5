"""What the press takes for granted about transformers models, checked."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn


def find_layers(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """Find the decoder of a language model and the attention layers in it.

    Parameters
    ----------
    model : PreTrainedModel
        With or without a head.

    Returns
    -------
    decoder : nn.Module
    layers : list of nn.Module

    Raises
    ------
    TypeError
        The model has no ``layers[i].self_attn``, or is in float64.
    """
    decoder: Any = getattr(model, "model", model)
    decoder = getattr(decoder, "language_model", decoder)
    layers: list[Any] = [
        getattr(layer, "self_attn", None) for layer in getattr(decoder, "layers", ())
    ]
    if not layers or not all(hasattr(layer, "layer_idx") for layer in layers):
        raise TypeError(
            "expected a decoder-only transformers model with `model.layers[i].self_attn`, "
            f"got {type(model).__name__}"
        )
    dtype = next(layers[0].parameters()).dtype
    if dtype == torch.float64:
        raise TypeError("expected a model in float32, float16 or bfloat16, got float64")
    return decoder, layers


def is_sliding(layer: Any) -> bool:
    """Say whether an attention layer sees anything but the whole past.

    Parameters
    ----------
    layer : nn.Module
        With ``config`` and ``layer_idx``.

    Returns
    -------
    bool
    """
    config = layer.config
    if getattr(config, "layer_types", None) is not None:
        kind: str = config.layer_types[layer.layer_idx]
        return kind != "full_attention"
    return getattr(config, "sliding_window", None) is not None


def has_own_attention(layer: Any) -> bool:
    """Say whether an attention layer runs attention of its model's own file.

    So does eager attention, and every implementation of models that have a class for each
    (Nemotron, DiffLlama).
    """
    of_class = type(layer).__name__.endswith(("SdpaAttention", "FlashAttention2"))
    return of_class or layer.config._attn_implementation == "eager"


def check_attention(layer: nn.Module, what: str) -> None:
    """Raise unless the model's attention implementation can serve ragged layers.

    Parameters
    ----------
    layer : nn.Module
        An attention layer of the model.
    what : str
        What makes the layers ragged, for the message.

    Raises
    ------
    ValueError
        It is of the model's own file, out of reach.
    """
    if layer.config._attn_implementation == "eager":  # type: ignore[union-attr]
        raise ValueError(
            f"expected an attention implementation such as 'sdpa' for {what}, got 'eager', which "
            'reads dense caches only; load the model with attn_implementation="sdpa"'
        )
    if has_own_attention(layer):
        raise ValueError(
            f"expected a model whose attention can be replaced for {what}, got "
            f"{type(layer).__name__}, which reads dense caches only; use budget='uniform' and rows "
            "without padding"
        )


@contextmanager
def lent_rotary(decoder: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Give attention layers the decoder's rotary embedding, where kvpress's scorers look for it.

    Parameters
    ----------
    decoder : nn.Module
    layers : iterable of nn.Module
        Its attention layers; those that have one of their own keep it.
    """
    rotary: Any = getattr(decoder, "rotary_emb", None)
    bare = [layer for layer in layers if not hasattr(layer, "rotary_emb")]
    try:
        for layer in bare:
            layer.rotary_emb = rotary
        yield
    finally:
        for layer in bare:
            layer._modules.pop("rotary_emb", None)


def is_pressed(layer: nn.Module) -> bool:
    """Say whether a kvpress press has a hook on an attention layer."""
    owners = (getattr(hook, "__self__", None) for hook in layer._forward_hooks.values())
    kinds = (kind for owner in owners for kind in type(owner).__mro__)
    return any(kind.__module__.partition(".")[0] == "kvpress" for kind in kinds)


def index_of(layer: nn.Module) -> int:
    """Return an attention layer's index in the model, which is that of its cache layer."""
    index: int = layer.layer_idx  # type: ignore[assignment]
    return index


def attentions_of(output: Any) -> torch.Tensor | None:
    """Take the attention weights out of what an attention layer returns, where there are any."""
    return output[1] if isinstance(output, tuple) and len(output) > 1 else None


def hook_arguments(kwargs: dict[str, Any], *names: str) -> list[Any]:
    """Take from the keyword arguments of an attention layer what a press cannot do without.

    Parameters
    ----------
    kwargs : dict
    *names : str
        Those to return; ``position_embeddings`` must be there as well.

    Returns
    -------
    list
        The arguments of these names.

    Raises
    ------
    RuntimeError
        One is missing, as in a version of transformers that calls its layers in another way; or
        there is no cache.
    """
    for name in (*names, "position_embeddings"):
        if name not in kwargs:
            raise RuntimeError(
                f"expected attention layers to be called with `{name}`, got "
                f"{sorted(kwargs)}: transformers {transformers.__version__} and this model are not "
                "supported together"
            )
    if kwargs["past_key_values"] is None:
        raise RuntimeError("expected a KV cache to compress, got none; run with use_cache=True")
    return [kwargs[name] for name in names]

"""What is taken for granted about transformers and its models, checked.

Versions of transformers differ in what is named here, and nowhere else. A press checks the rest
when its block begins (:func:`check_transformers`, :func:`find_layers`), so that what a later
version changes is an error and no press that does nothing.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CACHE_NAMES = ("past_key_values", "cache")
"""What forwards call their cache, that of the transformers that runs first: since 5.24 the last."""
if "cache" in inspect.signature(create_causal_mask).parameters:
    CACHE_NAMES = CACHE_NAMES[::-1]

CROPS_BY_COUNT = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters
"""Whether 0 crops nothing off a cache, or everything, as it once did."""

STATIC_COUNTS_SLOTS = "cumulative_length" in vars(StaticLayer(1))
"""Whether static layers know how many slots are filled; else every call names its slots."""

_LAYER_METHODS = {
    "update": ({"key_states", "value_states"}, {"cache_kwargs", "args", "kwargs"}),
    "get_mask_sizes": (set(), {"query_length", "cache_position"}),
    "get_seq_length": (set(), set()),
    "lazy_initialization": ({"key_states", "value_states"}, set()),
    "offload": (set(), set()),
    "prefetch": (set(), set()),
    "reset": (set(), set()),
    "reorder_cache": ({"beam_idx"}, set()),
}
"""Methods of cache layers: parameters that each version has, and that some have."""


def check_transformers() -> None:
    """Raise unless caches and attention of the transformers that runs are as is taken for granted.

    Raises
    ------
    RuntimeError
        Something is called otherwise.
    """
    for name, (needed, known) in _LAYER_METHODS.items():
        parameters = set(inspect.signature(getattr(CacheLayerMixin, name)).parameters) - {"self"}
        if not needed <= parameters or parameters - needed - known:
            _unknown(f"{name}({', '.join(sorted(needed | known))})", f"{sorted(parameters)}")
    abstract = set(CacheLayerMixin.__abstractmethods__)
    if unknown := abstract - {*_LAYER_METHODS, "get_max_length", "get_max_cache_shape"}:
        _unknown("no other abstract methods of cache layers", f"{sorted(unknown)}")
    for kind in (DynamicCache, StaticCache):
        if not issubclass(kind, Cache):
            _unknown("caches that derive from Cache", kind.__name__)
    if "sdpa" not in ALL_ATTENTION_FUNCTIONS or not hasattr(ALL_ATTENTION_FUNCTIONS, "__setitem__"):
        _unknown("attention functions by name, such as 'sdpa'", f"{list(ALL_ATTENTION_FUNCTIONS)}")


def _unknown(expected: str, got: str) -> None:
    raise RuntimeError(
        f"expected {expected}, got {got}: this moekv does not know transformers "
        f"{transformers.__version__}; install another version of either"
    )


def num_fed(tokens: Tensor | int) -> int:
    """Count the tokens that a cache layer is to make a mask for: given as such, or by positions."""
    return tokens if isinstance(tokens, int) else tokens.shape[0]


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """Take the cache out of a forward's arguments, by whatever name; None where there is none."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def cache_argument(module: nn.Module, cache: Cache) -> dict[str, Cache]:
    """Name a cache as a model's forward wants it."""
    parameters = inspect.signature(module.forward).parameters
    return {next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0]): cache}


def is_prefill(kwargs: Mapping[str, Any], layer: Any, num_tokens: int) -> bool:
    """Say whether an attention layer has just been fed the beginning of a text.

    Parameters
    ----------
    kwargs : mapping
        Of its forward.
    layer : CacheLayerMixin
        Of the cache, with the pairs of these tokens, or fewer where another press has cut them.
    num_tokens : int
        Tokens that were fed.
    """
    position = kwargs.get("cache_position")
    if position is not None:
        return int(position[-1]) + 1 == num_tokens
    return int(layer.get_seq_length()) <= num_tokens


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
    first = next(layers[0].parameters(), None)  # none: quantised as torch does it
    if first is not None and first.dtype == torch.float64:
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


def hook_arguments(kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Take from the keyword arguments of an attention layer what a press cannot do without.

    Parameters
    ----------
    kwargs : mapping
        ``position_embeddings`` must be among them.

    Returns
    -------
    hidden_states : Tensor [B, Q, hidden]
    cache : Cache

    Raises
    ------
    RuntimeError
        One is missing, as in a version of transformers that calls its layers in another way; or
        there is no cache.
    """
    for names in (("hidden_states",), CACHE_NAMES, ("position_embeddings",)):
        if not any(name in kwargs for name in names):
            raise _called_without(names[0], kwargs)
    cache = cache_of(kwargs)
    if cache is None:
        raise RuntimeError("expected a KV cache to compress, got none; run with use_cache=True")
    return kwargs["hidden_states"], cache


def positions_of(kwargs: Mapping[str, Any]) -> Tensor:
    """Find the positions [B or 1, Q] of the tokens that an attention layer was fed.

    Raises
    ------
    RuntimeError
        The layer was told none.
    """
    if (position_ids := kwargs.get("position_ids")) is not None:
        return position_ids  # type: ignore[no-any-return]
    if (position := kwargs.get("cache_position")) is not None:
        return position[None]  # type: ignore[no-any-return]
    raise _called_without("position_ids", kwargs)


def _called_without(name: str, kwargs: Mapping[str, Any]) -> RuntimeError:
    return RuntimeError(
        f"expected attention layers to be called with `{name}`, got {sorted(kwargs)}: transformers "
        f"{transformers.__version__} and this model are not supported together"
    )

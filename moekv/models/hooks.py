"""Internals of transformers and its models that moekv depends on, with checks.

All differences between versions of transformers are handled here. A press checks the rest when its
block begins (:func:`check_transformers`, :func:`find_layers`), so that a change in a later version
is an error and not a press that does nothing.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CACHE_NAMES: tuple[str, ...] = ("past_key_values", "cache", "past_key_value", "layer_past")
"""Names of a forward's cache argument, the installed transformers' first: from 5.24 on `cache`."""
if "cache" in inspect.signature(create_causal_mask).parameters:
    CACHE_NAMES = ("cache", *(name for name in CACHE_NAMES if name != "cache"))

SHARED_PAIRS = "shared_kv_states"
"""Name of the mapping in which layers leave their pairs for others (Gemma 3n and 4, from 5.24)."""

CROPS_BY_COUNT = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters
"""Whether ``crop(0)`` removes nothing, or everything, as in older versions."""

STATIC_COUNTS_SLOTS = "cumulative_length" in vars(StaticLayer(1))
"""Whether static layers count their filled slots; otherwise every call passes its slots."""


def sliding_layer(window: int) -> DynamicSlidingWindowLayer:
    """Make an empty cache layer that holds a window: of other arguments in each version."""
    return DynamicSlidingWindowLayer(sliding_window=window)


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


_COUNTS_FROM_ONE = ("paligemma",)
"""Kinds of models whose first token is at position 1."""


def first_position(model: nn.Module) -> int:
    """Return the position of a text's first token."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return int(kind in _COUNTS_FROM_ONE)


def check_prompt_learning(model: Any) -> None:
    """Raise where PEFT's ``generate`` of a learned prompt does not know the model's cache.

    It takes the model's place while it generates, and looks for a cache by the name that older
    transformers have: it feeds its virtual tokens again with each new token, or loses its prefix.

    Raises
    ------
    RuntimeError
        It does.
    """
    prepare = vars(model).get("prepare_inputs_for_generation")
    config = getattr(getattr(prepare, "__self__", None), "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        function = inspect.unwrap(getattr(prepare, "__func__", prepare))
        if CACHE_NAMES[0] not in function.__code__.co_consts:
            raise RuntimeError(
                "expected a PEFT whose generate finds caches by the name "
                f"{CACHE_NAMES[0]!r} of transformers {transformers.__version__} for "
                f"{type(config).__name__}, got one that feeds its virtual tokens again at each "
                "step, or drops them, with a press or without; install a newer peft, or an earlier "
                "transformers (5.12)"
            )


def check_transformers() -> None:
    """Raise unless caches and attention functions of the installed transformers are as expected.

    Raises
    ------
    RuntimeError
        Something differs.
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
    """Count the tokens that a cache layer makes a mask for: given as a number, or by positions."""
    return tokens if isinstance(tokens, int) else tokens.shape[0]


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache in a forward's arguments, by any of its names; None without one."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def cache_argument(module: nn.Module, cache: Cache) -> dict[str, Cache]:
    """Return a cache as an argument of a model's forward."""
    parameters = inspect.signature(module.forward).parameters
    return {next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0]): cache}


def is_prefill(kwargs: Mapping[str, Any], layer: Any, num_tokens: int) -> bool:
    """Return whether an attention layer has just been fed the beginning of a text.

    Parameters
    ----------
    kwargs : mapping
        Of its forward.
    layer : CacheLayerMixin
        Of the cache, with the pairs of these tokens, or fewer if another press has compressed it.
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
        The innermost model that holds them all.
    layers : list of nn.Module
        Those that write their own pairs to a cache: no cross attention, no recurrent layers.

    Raises
    ------
    TypeError
        There are none, or they cannot be served: positions by distances within the cache, float64.
    """
    layers = [
        module
        for name, module in model.named_modules()
        if _is_attention(module) and not any(word in name for word in ("cross", "encoder_attn"))
    ]
    layers = [layer for layer in layers if not any(_is_attention(x) for x in _inside(layer))]
    layers = [layer for layer in layers if not getattr(layer, "is_kv_shared_layer", False)]
    indices = [index_of(layer) for layer in layers]
    if not layers or sorted(set(indices)) != sorted(indices):
        raise TypeError(
            "expected a decoder-only transformers model, each of whose attention layers has a "
            f"cache layer of its own by `layer_idx`, got {type(model).__name__} with those of "
            f"{sorted(indices)}"
        )
    biased = {"alibi", "position_bias", "rel_pos"} & set(_parameters(_kind(layers[0])))
    biased -= {"alibi"} if getattr(config_of(layers[0]), "alibi", True) is False else set()
    if biased or "relative" in str(getattr(layers[0], "position_embedding_type", "")):
        raise TypeError(
            "expected a model that tells positions by its keys, got "
            f"{type(model).__name__}, which tells them by distances within the cache "
            f"({', '.join(biased) or 'relative positions'}): they are wrong once pairs are evicted"
        )
    first = next(layers[0].parameters(), None)  # none: quantised as torch does it
    if first is not None and first.dtype == torch.float64:
        raise TypeError("expected a model in float32, float16 or bfloat16, got float64")
    layers.sort(key=index_of)
    decoder = model
    for module in model.modules():  # from the outside in
        if isinstance(module, PreTrainedModel) and set(layers) <= set(module.modules()):
            decoder = module
    return decoder, layers


def _inside(layer: nn.Module) -> Iterator[nn.Module]:
    return (module for module in layer.modules() if module is not layer)


def _is_attention(module: nn.Module) -> bool:
    """Return whether a module is a decoder's attention layer, by its name and arguments."""
    return (
        _attends(_kind(module))  # first, as asking a module for what it has not is slow
        and isinstance(getattr(module, "layer_idx", None), int)
        and not getattr(module, "is_cross_attention", False)
    )


@functools.cache
def _attends(kind: Any) -> bool:
    return (
        any(word in kind.__name__ for word in ("Attention", "Attn", "MLA"))
        and not any(word in kind.__name__ for word in _NO_ATTENTION)
        and not {"encoder_hidden_states", "key_value_states", "cross_attention_states"}
        & set(_needed(kind))
        and _inputs(kind) != ()
        and any(name in _parameters(kind) for name in CACHE_NAMES)
    )


@functools.cache
def _inputs(kind: Any) -> tuple[str, ...]:
    """Names of the first arguments of a module's forward, if these are hidden states alone."""
    known = (("hidden_states",), ("v", "k", "q"))  # the latter CTRL's, which are all the same
    found = next((names for names in known if _parameters(kind)[: len(names)] == names), ())
    return found if len(found) == 1 or _looks_up(kind) else ()  # older ones attend by themselves


_NO_ATTENTION = ("CrossAttention", "DecoderLayer", "Block", "Delta", "Lightning", "Mamba")
"""Names of layers that contain attention layers, or hold no pairs."""


def _kind(module: nn.Module) -> Any:
    return type(module)


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    forward: Any = inspect.unwrap(kind.forward)
    return tuple(inspect.signature(forward).parameters)[1:]


@functools.cache
def _needed(kind: Any) -> tuple[str, ...]:
    """Names of the required arguments of a module's forward."""
    forward: Any = inspect.unwrap(kind.forward)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(x.name for x in parameters if x.default is x.empty and x.kind not in variable)


def takes(layer: nn.Module, name: str) -> bool:
    """Return whether an attention layer's forward takes an argument of this name."""
    return name in _parameters(_kind(layer)) or _takes_any(_kind(layer))


@functools.cache
def _takes_any(kind: Any) -> bool:
    parameters = inspect.signature(inspect.unwrap(kind.forward)).parameters.values()
    return any(x.kind is x.VAR_KEYWORD for x in parameters)


def names(layer: nn.Module, name: str) -> bool:
    """Return whether an attention layer's forward names an argument so."""
    return name in _parameters(_kind(layer))


def inputs_of(layer: nn.Module) -> tuple[str, ...]:
    """Name the arguments by which an attention layer is fed hidden states: one, or all the same."""
    return _inputs(_kind(layer)) or ("hidden_states",)


def needed_by(layer: nn.Module) -> tuple[str, ...]:
    """Name the required arguments of an attention layer, without its inputs."""
    return _needed(_kind(layer))[len(inputs_of(layer)) :]


def config_of(layer: nn.Module, default: Any = None) -> Any:
    """Return the configuration of an attention layer."""
    return getattr(layer, "config", default)


def option(config: Any, name: str) -> Any:
    """Read an option; None if it is missing, a list if it differs between layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # which is what transformers says of the latter
        return [getattr(each, name, None) for each in config.per_layer_config]


def is_sliding(layer: Any, config: Any = None) -> bool:
    """Return whether an attention layer attends to anything but the whole past.

    A window as long as the model's context hides nothing (Phi-3.5, Phi-4).

    Parameters
    ----------
    layer : nn.Module
        With ``layer_idx``.
    config : PreTrainedConfig, optional
        Of the text decoder, for layers without one.

    Returns
    -------
    bool
    """
    config = config_of(layer, config)
    window, kind = getattr(config, "sliding_window", None), _kind_in(layer, config)
    if kind in ("full_attention", "attention"):
        return False
    if kind is None and window is None:
        return getattr(config, "attention_chunk_size", None) is not None
    if kind not in (None, "sliding_attention") or not isinstance(window, int):
        return True
    return window < (getattr(config, "max_position_embeddings", None) or window + 1)


def _kind_in(layer: Any, config: Any) -> str | None:
    """Read the kind of an attention layer in its model's configuration; None: it says none."""
    kinds = getattr(config, "layer_types", None)
    return kinds[layer.layer_idx] if kinds is not None else None


_WHY_LEFT: dict[str | None, str] = {
    **dict.fromkeys(
        (None, "sliding_attention", "chunked_attention"),
        "sliding windows or chunks, whose caches are bounded already",
    ),
    **dict.fromkeys(
        ("hybrid", "hybrid_sliding"),
        "pairs and states in one cache layer, which moekv cannot take apart",
    ),
}


def why_left_alone(layers: Iterable[nn.Module], config: Any) -> str:
    """Say why attention layers that :func:`is_sliding` names are left as they are.

    Parameters
    ----------
    layers : iterable of nn.Module
    config : PreTrainedConfig
        Of the text decoder, for layers without one.
    """
    kinds = dict.fromkeys(_kind_in(layer, config_of(layer, config)) for layer in layers)
    other = "attention of kind {!r}, whose cache layers are of a kind of their own"
    return "; ".join(dict.fromkeys(_WHY_LEFT.get(x, other.format(x)) for x in kinds))


def looks_up(layer: nn.Module) -> bool:
    """Return whether an attention layer calls a function that is looked up by name."""
    return _looks_up(_kind(layer))


@functools.cache
def _looks_up(kind: Any) -> bool:
    names = inspect.unwrap(kind.forward).__code__.co_names
    return "ALL_ATTENTION_FUNCTIONS" in names


def replace_function(functions: Any, name: str, function: Any) -> None:
    """Put a function in the place of another one of transformers' tables, where that one is.

    What is registered for all, and later registered anew, would lose against what the table holds.
    """
    if name in getattr(functions, "_local_mapping", (name,)):
        functions[name] = function
    else:
        functions.register(name, function)


def wrap_method(owner: type, name: str, wrap: Callable[..., Callable[..., Any]]) -> None:
    """Put what `wrap` makes of a method of transformers in its place. Idempotent."""
    method = getattr(owner, name)
    if not getattr(method, "knows_compressed_layers", False):
        wrapped: Any = functools.wraps(method)(wrap(method))
        wrapped.knows_compressed_layers = True
        setattr(owner, name, wrapped)


def is_usual(function: Any) -> bool:
    """Return whether an attention function is one of transformers', as kvpress may have wrapped it.

    What another one does with queries, pairs and masks only itself can do, unless it says that it
    serves compressed layers, as one does that hands what it gets to a registered function.
    """
    function = getattr(function, "stands_in_for", function)
    if getattr(function, "serves_compressed_layers", False):
        return True
    while isinstance(function, functools.partial):
        function = function.func
    # Not `__module__`, which `functools.wraps` takes from what is wrapped.
    home = getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]
    if home == "kvpress":
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        return all(is_usual(each) for each in held if callable(each))
    return bool(home == "transformers")


def has_usual_attention(layer: nn.Module) -> bool:
    """Return whether attention that a layer looks up is a function of transformers."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation_of(layer))
    return function is None or not looks_up(layer) or is_usual(function)


def implementation_of(layer: nn.Module) -> str:
    """Name an attention layer's implementation."""
    return str(getattr(getattr(layer, "config", None), "_attn_implementation", "eager"))


def rotary_in(decoder: nn.Module) -> nn.Module | None:
    """Find a decoder's rotary embedding, by any of its names."""
    found: Any = getattr(decoder, "rotary_emb", None)
    children = (x for x in decoder.children() if "Rotary" in type(x).__name__)
    return found if found is not None else next(children, None)


@contextmanager
def lent_rotary(decoder: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Set the decoder's rotary embedding on attention layers, where kvpress's scorers expect it.

    Parameters
    ----------
    decoder : nn.Module
    layers : iterable of nn.Module
        Its attention layers; those that have one of their own keep it.
    """
    rotary: Any = rotary_in(decoder)
    bare = [layer for layer in layers if not hasattr(layer, "rotary_emb")]
    try:
        for layer in bare:
            layer.rotary_emb = rotary
        yield
    finally:
        for layer in bare:
            layer._modules.pop("rotary_emb", None)


def is_pressed(layer: nn.Module) -> bool:
    """Return whether a kvpress press has a hook on an attention layer."""
    owners = (getattr(hook, "__self__", None) for hook in layer._forward_hooks.values())
    kinds = (kind for owner in owners for kind in type(owner).__mro__)
    return any(kind.__module__.partition(".")[0] == "kvpress" for kind in kinds)


def index_of(layer: nn.Module) -> int:
    """Return an attention layer's index in the model, which is that of its cache layer."""
    index: int = layer.layer_idx  # type: ignore[assignment]
    return index


def attentions_of(output: Any) -> torch.Tensor | None:
    """Return the attention weights in an attention layer's output, if there are any."""
    return output[1] if isinstance(output, tuple) and len(output) > 1 else None


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of an attention layer's forward, of which the first are its inputs."""
    if not args:
        return kwargs
    named = dict(zip(_parameters(_kind(module)), args, strict=False)) | kwargs
    return {"hidden_states": args[0]} | named


def routers_in(decoder: nn.Module) -> list[nn.Module]:
    """Find the routers of a model that is a mixture of experts itself (Mixtral, GPT-OSS)."""
    kinds = (type(module).__name__ for module in decoder.modules())
    found = zip(decoder.modules(), kinds, strict=True)
    return [module for module, name in found if name.lower().endswith("topkrouter")]


def choice_of(output: Any, batch: int) -> Tensor | None:
    """Read what such a router returns: logits, weights and experts of each token.

    Parameters
    ----------
    output : Any
        Of its forward.
    batch : int
        Rows.

    Returns
    -------
    Tensor [B, N, E], float32, or None
        Weight of each expert, 0 where it was not chosen. None: it returns something else.
    """
    if not isinstance(output, tuple) or len(output) != 3:
        return None
    logits, weights, experts = output
    if experts.is_floating_point() or weights.shape != experts.shape:
        return None
    choice = torch.zeros(len(logits), logits.shape[-1], device=weights.device)
    return choice.scatter_(1, experts, weights.float()).view(batch, -1, choice.shape[1])


def experts_in(decoder: nn.Module) -> int:
    """Count the experts that such routers choose from; 0: the model is no mixture of experts."""
    return max((len(router.weight) for router in routers_in(decoder)), default=0)  # type: ignore[arg-type]


def with_choice(hidden_states: Tensor, choice: Tensor | None, count: int) -> Tensor:
    """Put the weights of a model's own experts behind hidden states, for routers that read both.

    Parameters
    ----------
    hidden_states : Tensor [B, N, hidden]
    choice : Tensor [B, N, E] or None
        See :func:`choice_of`; None, as before the model's first router, stands for zeros.
    count : int
        E, of those that the router reads; 0: none.

    Returns
    -------
    Tensor [B, N, hidden + E]
        In the dtype of the hidden states.

    Raises
    ------
    ValueError
        The model chose among another number of experts.
    """
    if not count:
        return hidden_states
    if choice is None:
        choice = hidden_states.new_zeros(*hidden_states.shape[:2], count)
    if choice.shape[-1] != count:
        raise ValueError(
            f"expected a model that is a mixture of {count} experts, whose choice the router of "
            f"the press reads, got one of {choice.shape[-1]}"
        )
    return torch.cat([hidden_states, choice.to(hidden_states)], -1)


def hook_arguments(kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Return what a press needs of an attention layer's keyword arguments.

    Parameters
    ----------
    kwargs : mapping
        See :func:`by_name`.

    Returns
    -------
    hidden_states : Tensor [B, Q, hidden]
    cache : Cache

    Raises
    ------
    RuntimeError
        One is missing, as in a version of transformers that calls its layers differently; or there
        is no cache.
    """
    for names in (("hidden_states",), CACHE_NAMES):
        if not any(name in kwargs for name in names):
            raise _called_without(names[0], kwargs)
    cache = cache_of(kwargs)
    if cache is None:
        raise RuntimeError(
            "expected a KV cache to compress, got none; run with use_cache=True, and not with "
            "gradient checkpointing in training, which makes none"
        )
    return kwargs["hidden_states"], cache


def positions_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the positions [B or 1, Q] of the tokens in an attention layer's call, if any."""
    if (position_ids := kwargs.get("position_ids")) is not None:
        return position_ids  # type: ignore[no-any-return]
    if (position := kwargs.get("cache_position")) is not None:
        return position[None]  # type: ignore[no-any-return]
    return None


def _called_without(name: str, kwargs: Mapping[str, Any]) -> RuntimeError:
    return RuntimeError(
        f"expected attention layers to be called with `{name}`, got {sorted(kwargs)}: transformers "
        f"{transformers.__version__} and this model are not supported together"
    )

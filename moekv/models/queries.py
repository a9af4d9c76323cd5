"""Computes queries that were not observed: runs the layer again, at given positions."""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moekv.models.habits import rotary_of
from moekv.models.hooks import positions_of
from moekv.models.watching import Asked, StandIn, ask
from moekv.ops.reference.precision import exact

Turn = tuple[Tensor, ...]
"""Cosines and sines [B or 1, N, dim]."""

_turns: weakref.WeakKeyDictionary[nn.Module, bool | None] = weakref.WeakKeyDictionary()
"""Whether an attention layer rotates as Llama does; False: not at all; None: in another way."""


def window_queries(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    window: int,
    offset: int | None,
    rotary: nn.Module | None = None,
) -> Asked:
    """Compute the queries of the last tokens of a prefill, or of a part of it.

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
        First token of the hidden states in the forward; None: they end with it.
    rotary : nn.Module, optional
        The decoder's rotary embedding, where the layer has none of its own.

    Returns
    -------
    Asked
        Queries [B, Hq, W, D].
    """
    states = hidden_states[:, -window:]
    count = states.shape[1]
    if offset is None:
        given = at_steps(module, hidden_states, kwargs, range(1 - count, 1), rotary)
    else:
        end = offset + hidden_states.shape[1]
        given = at_slice(kwargs, end - count, end)
    return ask(module, states, given, _behind_tokens(given))


def next_queries(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    rotary: nn.Module | None = None,
) -> Tensor:
    """Compute the queries of all tokens at the position after the last one: [B, Hq, N, D]."""
    given = at_steps(module, hidden_states, kwargs, range(1, 2), rotary)
    cache = _behind_tokens(given)
    count = hidden_states.shape[1]
    for name in ("position_ids", "cache_position"):
        if isinstance(given.get(name), Tensor):
            given[name] = given[name].expand(*given[name].shape[:-1], count)
    return ask(module, hidden_states, given, cache).query


def behind(
    queries: Tensor,
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    rotary: nn.Module | None,
    shared: dict[Any, Any],
    places: Tensor | None = None,
) -> Tensor:
    """Rotate the queries of tokens further, to the position after the last one.

    Parameters
    ----------
    queries : Tensor [B, Hq, N, D]
    module : nn.Module
        Their attention layer, whose rotation is known.
    hidden_states, kwargs, rotary
        As in :func:`window_queries`.
    shared : dict
        Of the forward: layers that share their rotations share the result.
    places : Tensor [B, M], int64, optional
        Of the tokens that are wanted; None: all.

    Returns
    -------
    Tensor [B, Hq, N or M, D]
    """
    if places is not None:
        queries = tokens_at(queries, places)
    turn = turn_behind(module, hidden_states, kwargs, rotary, shared)
    if turn is None:
        return queries
    cos, sin = turn
    if places is not None:
        cos, sin = (x.expand(len(places), -1, -1) for x in (cos, sin))
        cos, sin = (x.gather(1, places[..., None].expand(-1, -1, x.shape[2])) for x in (cos, sin))
    return rotate(queries, cos, sin)


def turn_behind(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    rotary: nn.Module | None,
    shared: dict[Any, Any],
) -> Turn | None:
    """Return what rotates each token's query to the position after the last one.

    Parameters
    ----------
    module, hidden_states, kwargs, rotary, shared
        As in :func:`behind`.

    Returns
    -------
    tuple of two Tensor [B or 1, N, dim], float32, or None
        Cosines and sines, for the first channels. None: queries are not rotated.
    """
    if not _turns.get(module):
        return None
    turn = kwargs["position_embeddings"]
    key = id(turn[0])  # as long as the forward lasts
    if key not in shared:
        shared[key] = turn_by(turn, turns(module, hidden_states, kwargs, range(1, 2), rotary))
    found: Turn = shared[key]
    return found


def tokens_at(queries: Tensor, places: Tensor) -> Tensor:
    """Copy the queries [B, Hq, M, D] of some tokens [B, M] of all [B, Hq, N, D]."""
    _, heads, _, dim = queries.shape
    return queries.gather(2, places[:, None, :, None].expand(-1, heads, -1, dim))


def _behind_tokens(kwargs: Mapping[str, Any]) -> StandIn:
    """Make a cache of as many tokens as came before a layer's call, of which it holds no more."""
    positions = {name: kwargs.get(name) for name in ("cache_position", "position_ids")}
    return StandIn(partial(_first, positions))


def _first(kwargs: Mapping[str, Any]) -> int:
    """Return the position of the first token of a layer's call; 0 without. Waits for the device."""
    for name in ("cache_position", "position_ids"):
        if isinstance(positions := kwargs.get(name), Tensor):
            return int(positions.flatten()[0])
    return 0


def at_slice(kwargs: Mapping[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Return a layer's arguments with the positions of some of its tokens."""
    given = dict(kwargs)
    if (turn := kwargs.get("position_embeddings")) is not None:
        given["position_embeddings"] = _each(turn, lambda x: x[..., begin:end, :])
    for name in ("position_ids", "cache_position"):
        if isinstance(positions := kwargs.get(name), Tensor):
            given[name] = positions[..., begin:end]
    return given


def at_steps(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    steps: range,
    rotary: nn.Module | None = None,
) -> dict[str, Any]:
    """Return a layer's arguments with positions at some steps from its last token."""
    given = dict(kwargs)
    away = torch.arange(steps.start, steps.stop, device=hidden_states.device)
    if isinstance(kwargs.get("position_ids"), Tensor):
        given["position_ids"] = kwargs["position_ids"][..., -1:] + away
    if isinstance(kwargs.get("cache_position"), Tensor):
        given["cache_position"] = kwargs["cache_position"][-1:] + away
    if kwargs.get("position_embeddings") is not None:
        given["position_embeddings"] = turns(module, hidden_states, kwargs, steps, rotary)
    return given


def turns(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    steps: range,
    rotary: nn.Module | None = None,
) -> Any:
    """Return the rotations at some steps from the last token's, as arguments of a layer's forward.

    The last token's own rotation is rotated further, by the model's embedding: where positions
    differ from the number of tokens, as after an image (M-RoPE), only that one is known.

    Returns
    -------
    tuple of two Tensor [..., steps, dim], or one such complex Tensor
    """
    last = _each(kwargs["position_embeddings"], lambda x: x[..., -1:, :])
    rotary = getattr(module, "rotary_emb", rotary)
    if rotary is None:
        raise NotImplementedError(
            "expected a rotary embedding of the model to form queries by, got none beside "
            f"{type(module).__name__}"
        )
    at = positions_of(kwargs)
    if at is None:  # Llama 4 passes none; the rotation of one step is the same anywhere
        at = torch.full((1, 1), hidden_states.shape[1] - 1, device=hidden_states.device)
    at = at[0] if at.dim() == 3 else at
    at = at[:, -1:] + torch.arange(min(steps.start, 0), steps.stop, device=at.device)
    found = rotary_of(rotary, module, hidden_states, at)
    here = -min(steps.start, 0)
    there = slice(steps.start + here, steps.stop + here)
    if isinstance(last, Tensor):  # complex numbers
        found = found.view(-1, *found.shape[-2:])
        return last * found[..., there, :] / found[..., here : here + 1, :]
    shape = last[0].shape[-1]
    found = tuple(x[..., :shape].float() for x in found)
    now = tuple(x[..., here : here + 1, :] for x in found)
    step = turn_by(now, tuple(x[..., there, :] for x in found))
    return tuple(x.to(last[0].dtype) for x in turn_on(last, step))


def _each(turn: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(turn) if isinstance(turn, Tensor) else tuple(change(x) for x in turn)


def turn_by(begin: Turn, end: Turn) -> Turn:
    """Return the rotation, without its scale, that leads from one to another."""
    (a, b), (c, d) = ([x.float() for x in turn] for turn in (begin, end))
    scale = a * a + b * b
    return (a * c + b * d) / scale, (a * d - b * c) / scale


def turn_on(begin: Turn, step: Turn) -> Turn:
    """Compose two rotations."""
    (a, b), (c, d) = ([x.float() for x in turn] for turn in (begin, step))
    return a * c - b * d, a * d + b * c


@torch.no_grad()
def learn_rotation(
    module: nn.Module, hidden_states: Tensor, kwargs: Mapping[str, Any], queries: Tensor
) -> bool | None:
    """Test on a layer's last query whether queries can be rotated further. Waits once.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    hidden_states : Tensor [B, N, hidden]
    kwargs : mapping
        Of the layer's forward.
    queries : Tensor [B, Hq, W, D]
        The layer's own, of the last tokens.

    Returns
    -------
    bool or None
        Whether it rotates as Llama does, the first channels or all; False: not at all; None: in
        another way, or not known yet.
    """
    if module in _turns:
        return _turns[module]
    turn = kwargs.get("position_embeddings")
    asked = queries[:, :, -1:].float()
    if turn is None or not (isinstance(turn, tuple) and turn[0].dim() == 3):
        _turns[module] = None
        return None
    end = hidden_states.shape[1]
    given = at_slice(kwargs, end - 1, end)
    nothing = (torch.ones_like(turn[0][:, -1:]), torch.zeros_like(turn[1][:, -1:]))
    last, cache = hidden_states[:, -1:], StandIn(lambda: end - 1)
    plain = ask(module, last, given | {"position_embeddings": nothing}, cache).query
    if turn[0].shape[-1] > plain.shape[-1] or turn[0].shape[-1] % 2:
        _turns[module] = None
        return None
    turned = rotate(plain, *(x[:, -1:] for x in turn))
    near = [(x.float() - asked).abs().amax() <= 0.02 * asked.abs().amax() for x in (turned, plain)]
    is_turned, is_plain, is_known = torch.stack([*near, asked.isfinite().all()]).tolist()
    # At position 0 rotations are the same.
    if (is_turned and is_plain) or not is_known:
        return None
    found = is_turned if is_turned or is_plain else None
    if found is not None or not module.training:  # where dropout may have drawn
        _turns[module] = found
    return found


def logit_options(module: nn.Module, asked: Asked | None, dim: int) -> dict[str, float]:
    """Return a layer's scaling and softcap of the products of queries and keys.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    asked : Asked or None
        Its observed queries.
    dim : int
        Of a query.

    Returns
    -------
    dict
        ``scaling``, by default that of SDPA, and ``softcap``, 0: none.
    """
    layer: Any = module
    scaling = None if asked is None else asked.scaling
    if scaling is None:
        scaling = getattr(layer, "scaling", None)
    softcap = 0.0 if asked is None else asked.softcap
    config = getattr(layer, "config", None)
    return {
        "scaling": float(dim) ** -0.5 if scaling is None else float(scaling),
        "softcap": softcap or getattr(config, "attn_logit_softcapping", None) or 0.0,
    }


@exact
def logits_of(queries: Tensor, keys: Tensor, *, scaling: float, softcap: float) -> Tensor:
    """Return the logits of queries over keys.

    Parameters
    ----------
    queries, keys : Tensor [..., N, D] and [..., T, D]
        Of one dtype.
    scaling, softcap : float
        As :func:`logit_options` gives them.

    Returns
    -------
    Tensor [..., N, T], float32
    """
    # Scaled first, and not in float16: a product beyond 65,504 is no number of it.
    if keys.dtype == torch.float16:
        queries, keys = queries.float(), keys.float()
    logits = torch.matmul(queries * scaling, keys.mT).float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def rotate(queries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels, as many as the cosines have (Phi3: not all).

    Parameters
    ----------
    queries : Tensor [B, Hq, N, D]
    cos, sin : Tensor [B or 1, N or 1, dim]

    Returns
    -------
    Tensor [B, Hq, N, D]
    """
    # In the layout that projections have, [B, W, Hq, D]: several times faster than across it.
    source = queries.transpose(1, 2)
    dim = cos.shape[-1]
    cos, sin = cos[:, :, None].to(source.dtype), sin[:, :, None].to(source.dtype)
    half = dim // 2
    left, right = source[..., :half], source[..., half:dim]
    rotated = source[..., :dim] * cos
    rotated[..., :half] -= right * sin[..., :half]
    rotated[..., half:] += left * sin[..., half:]
    if dim < source.shape[-1]:
        rotated = torch.cat([rotated, source[..., dim:]], dim=-1)
    return rotated.transpose(1, 2)

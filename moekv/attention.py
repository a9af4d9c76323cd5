"""Decode attention over compressed layers, inside transformers' attention interface.

Models look their attention function up by name ("sdpa", "flash_attention_2", ...) at every call.
:func:`install` wraps each of these functions once: a call that brings :class:`RaggedPairs`, or one
query for keys that :func:`serve_steps` has marked, goes to ``ragged_attention``. Every other call
goes where it went before, and :func:`last_queries` sees what it asks.
"""

import functools
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moekv import ops

if TYPE_CHECKING:
    from moekv.layers import RaggedLayer


NOT_DENSE = (
    "the keys and values of a compressed layer are ragged: heads keep different numbers of pairs. "
    "Attention reads them through moekv.attention, which serves every attention implementation of "
    "transformers but 'eager'. Call cache.layers[i].to_dense() for padded tensors and their lengths"
)


_BACKEND = "_moekv_backend"  # attribute of the keys that ragged_attention may serve
_NATIVE = ops.available_backends()["cpu"] is None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_watched: dict[nn.Module, tuple[int, dict[nn.Module, Tensor]]] = {}  # window, what was seen


class RaggedPairs:
    """The keys or the values of a :class:`RaggedLayer`, as the cache hands them to attention.

    Looks like a tensor [B, H, T, D] of the true length in ``shape``, ``dtype`` and ``device``, can
    be cropped by a slice of positions, and refuses everything else: no dense tensor exists.

    Parameters
    ----------
    layer : RaggedLayer
        The layer that owns the pairs.
    dim : int
        Size of the last dimension, head_dim of the keys or of the values.
    length : int
        Positions that are visible, counting those that were evicted.
    """

    def __init__(self, layer: "RaggedLayer", dim: int, length: int) -> None:
        self.layer = layer
        self.dim = dim
        self.length = length
        # As they are now: an offloaded cache moves a layer away before attention reads it.
        self.stored = layer.stored_keys, layer.stored_values
        self.tail = layer.tail_keys, layer.tail_values

    @property
    def shape(self) -> torch.Size:
        """The shape that the uncompressed tensor would have, [B, H, T, D]."""
        batch, num_kv_heads = self.layer.begin.shape
        return torch.Size((batch, num_kv_heads, self.length, self.dim))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored pairs."""
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        """The device of the stored pairs."""
        return self.layer.device

    def __getitem__(self, index: Any) -> "RaggedPairs":
        """Crop to the first positions: ``pairs[:, :, :n]`` or ``pairs[..., :n, :]``."""
        everything = slice(None)
        if isinstance(index, tuple):
            positions = None
            if len(index) in (3, 4) and index[:2] == (everything, everything):
                positions = index[2] if index[3:] in ((), (everything,)) else None
            elif len(index) == 3 and index[0] is Ellipsis and index[2] == everything:
                positions = index[1]
            if isinstance(positions, slice) and positions.start is None and positions.step is None:
                return RaggedPairs(self.layer, self.dim, positions.indices(self.length)[1])
        raise TypeError(f"expected a crop such as pairs[:, :, :n], got pairs[{index}]: {NOT_DENSE}")

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse every other attribute of a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(f"a ragged cache has no dense tensor to take '{name}' of: {NOT_DENSE}")

    def _refuse_operator(self, *_: Any) -> NoReturn:
        raise TypeError(f"a ragged cache has no dense tensor to calculate with: {NOT_DENSE}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse_operator
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __neg__ = _refuse_operator

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse to take part in any torch function."""
        raise TypeError(
            f"{getattr(function, '__name__', function)} needs dense tensors: {NOT_DENSE}"
        )


def install() -> None:
    """Teach every attention function of transformers to serve compressed layers. Idempotent."""
    for name, function in list(ALL_ATTENTION_FUNCTIONS.items()):
        if not getattr(function, "serves_compressed_layers", False):
            ALL_ATTENTION_FUNCTIONS[name] = _serve_compressed_layers(function)


@contextmanager
def last_queries(
    layers: Iterable[nn.Module], window: int
) -> Generator[dict[nn.Module, Tensor], None, None]:
    """Note what attention layers ask last, which nobody has to compute again.

    Parameters
    ----------
    layers : iterable of nn.Module
        Attention layers, each in one block at a time.
    window : int
        Queries of a call to note, at most.

    Yields
    ------
    dict
        For each layer copies [B, Hq, W, D] of the rotated queries of its last call that had
        several. Eager attention, and calls inside compiled graphs, go unseen.
    """
    install()
    seen: dict[nn.Module, Tensor] = {}
    noted = list(layers)
    _watched.update((layer, (window, seen)) for layer in noted)
    try:
        yield seen
    finally:
        for layer in noted:
            del _watched[layer]


def _note(module: nn.Module, query: Tensor) -> None:
    window, seen = _watched.get(module, (0, {}))
    if window and query.shape[2] > 1:
        last = query.detach()[:, :, -window:]
        seen[module] = last.clone(memory_format=torch.contiguous_format)


def serve_steps(keys: Tensor, backend: str) -> None:
    """Let decode steps over the dense keys of a compressed layer go to ``ragged_attention``.

    Only on a CPU, where the native op is faster than SDPA. Keys that it does not serve stay as
    they are.

    Parameters
    ----------
    keys : Tensor [B, H, T, D]
        What the layer's ``update`` returns.
    backend : str
        Of the op.
    """
    native = _NATIVE and backend != "torch"
    if native and keys.device.type == "cpu" and keys.dtype in _DTYPES:
        setattr(keys, _BACKEND, backend)


def _is_step(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> bool:
    """Whether ``ragged_attention`` gives what the model's own function would, to one query."""
    return (
        hasattr(keys, _BACKEND)
        and query.shape[2] == 1
        and query.dtype == keys.dtype
        and not query.requires_grad
        and not dropout
        and not softcap  # some functions take it, others leave it out
        and s_aux is None
        and (mask is None or mask.shape[-1] == keys.shape[2])
        # The function that kvpress has wrapped writes to the keys that its head-wise presses mask.
        and getattr(module, "masked_key_indices", None) is None
    )


def _serve_compressed_layers(function: Callable[..., Any]) -> Callable[..., Any]:
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
        if isinstance(key, RaggedPairs):
            return attend(module, query, key, attention_mask, **kwargs), None
        if _is_step(module, query, key, attention_mask, *args, **kwargs):
            return _attend_dense(query, key, value, attention_mask, kwargs.get("scaling")), None
        if not torch.compiler.is_compiling() and _watched:
            _note(module, query)
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    attention.serves_compressed_layers = True  # type: ignore[attr-defined]
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
        integer [B, T] over all positions; only the columns of the tail matter.
    scaling, softcap : float, optional
        Factor of the scores (default ``D ** -0.5``) and their tanh cap (default none).
    dropout : float
        Must be 0.
    s_aux : Tensor, optional
        Learned attention sinks, which are not supported.

    Returns
    -------
    Tensor
        [B, Q, Hq, Dv].

    Raises
    ------
    NotImplementedError
        On dropout or learned attention sinks.
    ValueError
        If the mask does not cover all positions.
    """
    if dropout:
        raise NotImplementedError(
            f"compressed caches are for inference: expected dropout 0, got {dropout}; "
            "call model.eval()"
        )
    if s_aux is not None:
        raise NotImplementedError("compressed caches do not support learned attention sinks")
    layer = key.layer
    return ops.ragged_attention(
        query,
        *key.stored,
        layer.begin,
        layer.end,
        *key.tail,
        _tail_mask(attention_mask, layer.get_seq_length(), layer.tail_length),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        backend=layer.backend,
    )


def _attend_dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of one query over the dense keys [B, H, T, D]: a tail with nothing before it."""
    batch, num_kv_heads, length, dim = key.shape
    nothing = torch.zeros((batch, num_kv_heads), dtype=torch.int32)
    return ops.ragged_attention(
        query,
        key.new_empty((0, dim)),
        value.new_empty((0, value.shape[3])),
        nothing,
        nothing,
        key,
        value,
        _tail_mask(mask, length, length),
        scaling=dim**-0.5 if scaling is None else scaling,
        backend=getattr(key, _BACKEND),
    )


def _tail_mask(mask: Tensor | None, length: int, tail_length: int) -> Tensor | None:
    """Cut the columns of the tail out of transformers' mask, as bool [B, Hq, Q, S]."""
    if mask is None:
        return None
    if mask.shape[-1] != length:
        raise ValueError(
            f"expected an attention mask over all {length} positions of the compressed cache, "
            f"got one over {mask.shape[-1]}"
        )
    tail = mask[..., length - tail_length :]
    if tail.ndim == 2:
        return tail[:, None, None].bool()
    return tail if tail.dtype == torch.bool else tail == 0

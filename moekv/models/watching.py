"""Seeing what attention layers ask: while a block is open, or by having them ask once more."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from moekv.models.hooks import cache_argument, inputs_of, looks_up
from moekv.models.traceless import traceless


@dataclass(frozen=True)
class Asked:
    """What an attention layer hands to its attention function.

    Attributes
    ----------
    query : Tensor [B, Hq, Q, D]
    key, value : Any
        Tensors [B, H, T, D] and [B, H, T, Dv], or what a compressed layer hands out.
    scaling : float or None
        None: not told.
    softcap : float
        0: none.
    has_sinks : bool
        Whether logits that no pair has are learned beside those of the pairs.
    """

    query: Tensor
    key: Any
    value: Any
    scaling: float | None = None
    softcap: float = 0.0
    has_sinks: bool = False

    @classmethod
    def of(cls, query: Tensor, key: Any, value: Any, kwargs: Mapping[str, Any]) -> Asked:
        """Read the arguments of an attention function."""
        scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap") or 0.0
        return cls(query, key, value, scaling, softcap, kwargs.get("s_aux") is not None)


_watchers: dict[nn.Module, Callable[[nn.Module, Asked], None]] = {}
_asking = threading.local()


@contextmanager
def watched(
    layers: Iterable[nn.Module], notice: Callable[[nn.Module, Asked], None]
) -> Iterator[None]:
    """Have attention layers watched in a block.

    The functions that ``moekv.cache.attention.install`` puts around transformers' own say what
    they are asked, eager attention included. Layers that call none of them go unseen, and so do
    calls inside compiled graphs.

    Parameters
    ----------
    layers : iterable of nn.Module
        Attention layers, each in one block at a time.
    notice : callable
        Gets a layer and what it asks, in the thread of the call.
    """
    noted = list(layers)
    _watchers.update(dict.fromkeys(noted, notice))
    try:
        yield
    finally:
        for layer in noted:
            _watchers.pop(layer, None)


def report(
    module: nn.Module, query: Tensor, key: Any, value: Any, kwargs: Mapping[str, Any]
) -> None:
    """Tell whoever watches an attention layer what it asks."""
    if torch.compiler.is_compiling():
        return
    if getattr(_asking, "module", None) is module:
        raise _AskedError(Asked.of(query, key, value, kwargs))
    if _watchers and module in _watchers:
        _watchers[module](module, Asked.of(query, key, value, kwargs))


class _AskedError(BaseException):
    """Ends a layer's forward where its queries are known; no model's own handler may take it."""

    def __init__(self, asked: Asked | None) -> None:
        super().__init__()
        self.asked = asked


class _Products(TorchFunctionMode):
    """Sees the first product of queries and keys of a layer that attends by itself."""

    _KNOWN = (scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__)
    _FOLDED = (torch.bmm, Tensor.bmm)  # rows and heads in one, of queries that are scaled before
    _ADDED = (torch.baddbmm,)  # the same, scaled with the product

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.batch, self.num_tokens = hidden_states.shape[:2]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._KNOWN and len(args) > 1:
            query, key = args[:2]
            if query.dim() == key.dim() == 4 and query.shape[2] == self.num_tokens:
                raise _AskedError(Asked(query, None, None, (kwargs or {}).get("scale")))
        if func in self._FOLDED:
            raise _AskedError(self._unfolded(args[0], 1.0))
        if func in self._ADDED:
            raise _AskedError(self._unfolded(args[1], (kwargs or {}).get("alpha", 1.0)))
        return func(*args, **(kwargs or {}))

    def _unfolded(self, query: Tensor, scaling: float) -> Asked | None:
        rows, count, dim = query.shape
        if count != self.num_tokens or rows % self.batch:
            return None
        return Asked(query.view(self.batch, -1, count, dim), None, None, scaling)


HEAD_BY_HEAD = {"__getitem__", "contiguous", "expand", "permute", "reshape", "to", "transpose"}
HEAD_BY_HEAD |= {"view"}
"""What a layer may do with its pairs and leave heads for themselves."""


class _Watched(Tensor):
    """Pairs that tell when something is computed of them."""

    cache: StandIn

    @classmethod
    def of(cls, pairs: Tensor, cache: StandIn) -> _Watched:
        watched = pairs.as_subclass(cls)
        watched.cache = cache
        return watched

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ not in ("__get__", "size", "dim"):
            for x in args:
                if isinstance(x, cls):
                    x.cache.touched.add(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func.__name__ in HEAD_BY_HEAD and isinstance(args[0], cls):
            return cls.of(result, args[0].cache)
        return result


class StandIn:
    """A cache of which a layer learns only how many tokens came before; it holds nothing.

    Parameters
    ----------
    length : callable
        Counts these; called if the layer asks, as it may wait for the device.

    Attributes
    ----------
    pairs : tuple or None
        What it handed back.
    touched : set of str
        What has been computed of that.
    """

    def __init__(self, length: Callable[[], int]) -> None:
        self._length = length
        self.pairs: tuple[Tensor, Tensor] | None = None
        self.touched: set[str] = set()

    def get_seq_length(self, *_: Any) -> int:
        """Return the number of tokens before those of the call."""
        return self._length()

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Hand back what came, as tensors that tell when something is computed of them."""
        self.pairs = _Watched.of(keys, self), _Watched.of(values, self)
        return self.pairs


@torch.no_grad()
def ask(
    module: nn.Module,
    hidden_states: Tensor,
    kwargs: Mapping[str, Any],
    cache: StandIn | None = None,
) -> Asked:
    """Have an attention layer ask for some tokens, as its own forward does.

    It runs up to its attention call, over no cache and without dropout.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    hidden_states : Tensor [B, N, hidden]
    kwargs : mapping
        Of its forward, with the positions of these tokens.
    cache : StandIn, optional
        By default of no tokens.

    Returns
    -------
    Asked
        Queries [B, Hq, N, D] normed, rotated and scaled as the layer does.

    Raises
    ------
    NotImplementedError
        It was not seen to ask anything.
    """
    stand_in: Any = cache or StandIn(int)
    inputs = inputs_of(module)
    names = {"hidden_states", *inputs, "cache", *cache_argument(module, stand_in)}
    # What layers share their pairs in (Gemma 3n) is theirs to write to, and not that of this call.
    own = {n: copy.copy(x) if isinstance(x, MutableMapping) else x for n, x in kwargs.items()}
    given = {n: x for n, x in own.items() if n not in names} | cache_argument(module, stand_in)
    given["attention_mask"] = None
    before = getattr(_asking, "module", None)
    _asking.module = module
    try:
        products = _Products(hidden_states) if not looks_up(module) else nullcontext()
        with traceless(module), products:
            module.forward(*[hidden_states] * len(inputs), **given)
    except _AskedError as error:
        if error.asked is not None:
            return error.asked
    finally:
        _asking.module = before
    raise NotImplementedError(
        "expected an attention layer whose queries can be seen, got "
        f"{type(module).__name__}, which multiplies them by its keys unseen"
    )

"""The contract between kvpress's wrappers and a press.

A wrapper calls ``score``, or ``compress``, in a hook of an attention layer and acts on that layer
at once. It announces neither itself nor what it evicts; both are detected here.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress
from kvpress.utils import dequantize_layer
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

from moekv.cache.caches import held_bytes
from moekv.cache.ragged import RaggedLayer
from moekv.models.hooks import index_of
from moekv.press.stats import Statistics

_LEAST = 1e-30  # less than any attention, and far from 0


def wrapper_hook(module: nn.Module, press: BasePress) -> Any:
    """Find the hook by which a wrapper calls a press, a bound method; None without a wrapper."""
    for hook in module._forward_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, BasePress) and owner is not press:
            return hook
    return None


def as_attention(scores: Tensor, expected: Tensor | None, start: Tensor | None = None) -> Tensor:
    """Map scores to the expected attention of pairs in the same order.

    Wrappers add, average and multiply scores and compare those of heads, as if they were attention
    weights. So the best pair of a head gets the largest attention that a pair of this head can
    expect, the second the second largest, and so on.

    Parameters
    ----------
    scores : Tensor [B, H, T], float32
        Finite, padding last; only their order in each head counts. Of equal ones the first comes
        first.
    expected : Tensor [B, H, T], float32, or None
        Logarithms of expected attention, see ``moekv.ops.expected_attention``. None, or NaN in a
        head: the r-th pair gets 1 / r, in proportion, so that a head's sum is 1.
    start : Tensor [B], int32, or None
        Padding at the left of each row; None: no padding.

    Returns
    -------
    Tensor [B, H, T], float32
        Positive, and distinct in each head, so that its order is that of `scores`.
    """
    num_keys = scores.shape[2]
    places = torch.arange(num_keys, dtype=torch.int32, device=scores.device)
    padding = places[None] < (0 if start is None else start[:, None])  # [B or 1, T]
    ranks = (places + 1.0).reciprocal()
    shares = (ranks / (ranks * ~padding.flip(-1)).sum(-1, keepdim=True))[:, None].expand_as(scores)
    if expected is not None:
        known = expected.isfinite().all(-1, keepdim=True)
        attention = expected.exp().masked_fill(padding[:, None], _LEAST)
        shares = torch.where(known, attention.sort(dim=-1, descending=True).values, shares)
    # Equal ones become neighbours: positive floats are in the order of their bits.
    bits = shares.contiguous().view(torch.int32) + places
    shares = (bits.cummin(-1).values.int() - places).view(torch.float32)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(scores).scatter_(-1, order, shares)


@dataclass
class _Pending:
    """A layer that has been scored, and on which a wrapper is about to act."""

    module: nn.Module
    cache: Cache
    pairs: int
    num_bytes: int
    statistics: Statistics


class Outcomes:
    """Counts the pairs that wrappers leave in the layers that a press has scored for them.

    It is read off the cache before anything else can happen to it: when the layer is called again,
    when the wrapper's block ends, or when statistics are read. Every pair counts once, however
    often its layer is scored.
    """

    def __init__(self) -> None:
        self._pending: dict[int, _Pending] = {}
        self._hooks: list[Any] = []
        self._ended: Any = None
        self._counted: weakref.WeakKeyDictionary[Cache, dict[int, tuple[int, int]]] = (
            weakref.WeakKeyDictionary()
        )

    def expect(
        self, module: nn.Module, cache: Cache, hook: Any, statistics: Statistics, *, fresh: bool
    ) -> None:
        """Note how a layer of a cache is before a wrapper acts on it.

        Parameters
        ----------
        module : nn.Module
            The attention layer.
        cache : Cache
        hook : bound method
            Of the wrapper, which is running.
        statistics : Statistics
            Where to count.
        fresh : bool
            Whether all pairs of the layer have just come.
        """
        index = index_of(module)
        if index in self._pending and self._pending[index].cache is cache:
            return  # rated in parts
        counted = self._counted.setdefault(cache, {})
        if fresh:
            counted.pop(index, None)
        self._pending[index] = _Pending(module, cache, *_size(module, cache), statistics)
        self._hooks.append(module.register_forward_pre_hook(lambda *_: self.settle()))
        if self._ended is None or not self._ended.alive:
            self._ended = weakref.finalize(hook, self.settle)
            self._ended.atexit = False

    def settle(self) -> None:
        """Count what has become of the layers."""
        self.forget()
        pending, self._pending = self._pending, {}
        for index, before in pending.items():
            counted = self._counted[before.cache]
            known, left = counted.get(index, (0, 0)), _size(before.module, before.cache)
            counted[index] = left
            before.statistics.count(
                (before.pairs - known[0], left[0] - known[0]),
                (before.num_bytes - known[1], left[1] - known[1]),
            )

    def forget(self) -> None:
        """Take the hooks away."""
        while self._hooks:
            self._hooks.pop().remove()


def _size(module: nn.Module, cache: Cache) -> tuple[int, int]:
    """Pairs of a layer that attention still sees, and bytes of its storages."""
    layer = cache.layers[index_of(module)]
    if isinstance(layer, RaggedLayer):
        return sum(layer.count_pairs([0] * layer.batch_size)), held_bytes(layer)
    if isinstance(layer, QuantizedLayer):  # how, and in how many bytes, its library knows
        keys, _ = dequantize_layer(layer)
        return keys.shape[:3].numel(), 0
    keys = layer.keys
    assert keys is not None
    masked = getattr(module, "masked_key_indices", None)
    num_masked = 0 if masked is None else len(masked[0])
    return keys.shape[:3].numel() - num_masked, held_bytes(layer)

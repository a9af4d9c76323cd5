"""Seeing what attention layers ask, while a block is open."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_watchers: dict[nn.Module, Callable[[nn.Module, Tensor], None]] = {}


@contextmanager
def watched(
    layers: Iterable[nn.Module], notice: Callable[[nn.Module, Tensor], None]
) -> Iterator[None]:
    """Have attention layers watched in a block.

    The functions that ``moekv.cache.attention.install`` puts around transformers' own say what
    they are asked. Eager attention, and calls inside compiled graphs, go unseen.

    Parameters
    ----------
    layers : iterable of nn.Module
        Attention layers, each in one block at a time.
    notice : callable
        Gets a layer and its rotated queries [B, Hq, Q, D], in the thread of the call.
    """
    noted = list(layers)
    _watchers.update(dict.fromkeys(noted, notice))
    try:
        yield
    finally:
        for layer in noted:
            _watchers.pop(layer, None)


def report(module: nn.Module, query: Tensor) -> None:
    """Tell whoever watches an attention layer what it asks."""
    if _watchers and not torch.compiler.is_compiling() and module in _watchers:
        _watchers[module](module, query)

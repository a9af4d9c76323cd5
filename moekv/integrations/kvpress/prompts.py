"""What folding needs of a prompt that one of kvpress's presses compresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from moekv.cache.attention import install
from moekv.cache.caches import cached_pairs
from moekv.cache.folding import Folding
from moekv.experts.builder import ViewBuilder
from moekv.models.hooks import cache_of, index_of
from moekv.press.prefill import folding_of

_WINDOW = 1  # the queries of folding are of tokens from all over the text

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Prompt:
    """One layer's pairs before a press evicted any, and what says which are looked at alike.

    Attributes
    ----------
    keys, values : Tensor
        [B, H, T, D] and [B, H, T, Dv].
    folding : Folding
    stay : Tensor [B, H, T], bool, or None
        What a press of dense layers has left; None: it has evicted none.
    """

    keys: Tensor
    values: Tensor
    folding: Folding
    stay: Tensor | None = None

    def compare(self, keys: Tensor, values: Tensor) -> None:
        """Find out which pairs have stayed.

        Raises
        ------
        ValueError
            There are others among them.
        """
        if keys.shape[2] == self.keys.shape[2]:
            return
        places = _places((self.keys, self.values), (keys, values))
        for whole, left in ((self.keys, keys), (self.values, values)):
            found = whole.gather(2, places[..., None].expand(-1, -1, -1, whole.shape[3]))
            if not torch.equal(_bits(found), _bits(left)):
                raise ValueError(
                    "expected a press that leaves pairs of the prompt as they are with fold, got "
                    "one that changes keys or values"
                )
        stay = torch.zeros(self.keys.shape[:3], dtype=torch.bool, device=self.keys.device)
        self.stay = stay.scatter_(2, places, True)

    @property
    def num_left(self) -> int:
        """Pairs that each head has left, after a press of dense layers."""
        return self.keys.shape[2] if self.stay is None else int(self.stay[0, 0].sum())


class Prompts:
    """Reads prompts as they arrive, before a press evicts pairs.

    Parameters
    ----------
    modules : sequence of nn.Module
        Attention layers.
    rotary : nn.Module, optional
        The decoder's rotary embedding.
    backend : str
        Of the ops.
    """

    def __init__(
        self, modules: Sequence[nn.Module], rotary: nn.Module | None, backend: str
    ) -> None:
        self._modules, self._rotary, self._backend = modules, rotary, backend
        self._found: WeakKeyDictionary[Cache, dict[int, Prompt]] = WeakKeyDictionary()
        self._new: list[tuple[Cache, int, Prompt]] = []
        self._view = ViewBuilder(rotary)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read every prompt in the block; entered before the press is."""
        install()
        hooks = [m.register_forward_hook(self._read, with_kwargs=True) for m in self._modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _read(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache, hidden_states = cache_of(kwargs), kwargs["hidden_states"]
        index = index_of(module)
        layer = None if cache is None else cache.layers[index]
        if type(layer) is not DynamicLayer:
            return
        keys, values = cached_pairs(layer)
        if keys.shape[2] != hidden_states.shape[1]:  # not all of the prompt
            return
        if module is self._modules[0]:
            self._view = ViewBuilder(self._rotary)
        with torch.no_grad():
            view = self._view(
                module,
                hidden_states,
                keys,
                values,
                None,
                kwargs,
                window=_WINDOW,
                backend=self._backend,
            )
            prompt = Prompt(keys, values, folding_of(view))
        self._found.setdefault(cache, {})[index] = prompt
        self._new.append((cache, index, prompt))

    def compare(self) -> None:
        """Find out what presses of dense layers have left; called at a forward's end."""
        for cache, index, prompt in self._new:
            if type(layer := cache.layers[index]) is DynamicLayer:
                prompt.compare(*cached_pairs(layer))
        self._new.clear()

    def pop(self, cache: Cache, index: int) -> Prompt | None:
        """Hand out a layer's prompt; None if it did not come in one forward."""
        return self._found.get(cache, {}).pop(index, None)


def _bits(x: Tensor) -> Tensor:
    """View numbers as integers: NaN are equal to themselves then."""
    return x.contiguous().view(_INTEGERS[x.element_size()])


def _places(whole: tuple[Tensor, Tensor], left: tuple[Tensor, Tensor]) -> Tensor:
    """Guess where in [B, H, T, .] the pairs [B, H, N, .] come from: [B, H, N].

    Pairs are looked up by a sum of their bits with random factors. Of equal ones each gets a place
    of its own.
    """
    generator = torch.Generator().manual_seed(0)
    factors = [
        torch.randint(-(2**62), 2**62, (x.shape[3],), generator=generator).to(x.device)
        for x in whole
    ]

    def marks(pairs: tuple[Tensor, Tensor]) -> Tensor:
        sums = [(_bits(x).long() * f).sum(-1) for x, f in zip(pairs, factors, strict=True)]
        return sums[0] + sums[1]

    known, order = marks(whole).sort(stable=True)
    wanted, back = marks(left).sort(stable=True)
    first = torch.searchsorted(known, wanted)
    nth = torch.arange(wanted.shape[2], device=wanted.device) - torch.searchsorted(wanted, wanted)
    found = order.gather(2, (first + nth).clamp(max=known.shape[2] - 1))
    return torch.empty_like(found).scatter_(2, back, found)

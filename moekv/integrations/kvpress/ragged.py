"""kvpress's head-wise presses with the memory freed, and any of its presses with quantised pairs.

kvpress masks the keys that a head-wise press evicts, and frees none of them. ``ragged(press)`` lets
the press decide as it always did, then stores what it keeps, and nothing else. With ``pairs`` that
are quantised it also stores what a press of dense layers leaves; with ``fold`` what leaves joins
what stays.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from kvpress.presses.base_press import BasePress
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from moekv import ops
from moekv.budget import Kept
from moekv.cache.caches import agree_on_padding
from moekv.cache.ragged import RaggedLayer
from moekv.cache.rows import check_pairs
from moekv.integrations.kvpress.prompts import Prompt, Prompts
from moekv.models.hooks import cache_of, index_of, rotary_in
from moekv.press.checks import check_choice, check_flag
from moekv.press.press import MoERouterPress
from moekv.units import kind


def ragged(
    press: BasePress, *, pairs: str = "16", fold: bool = False, backend: str = "auto"
) -> "RaggedPress":
    """Free the memory of what a head-wise kvpress press evicts, and store the rest in fewer bits.

    Parameters
    ----------
    press : kvpress.BasePress
        Any press that sets ``masked_key_indices``: ``AdaKVPress``, ``CriticalAdaKVPress``,
        ``DMSPress``, ``DuoAttentionPress``, ``KVgradPress``, ``KVzipPress``, ... With quantised
        ``pairs`` any press: layers that it leaves dense are stored at the block's end.
    pairs : str
        How what stays is stored: ``"16"``, as the model makes it, ``"k8v8"``, ``"k8v4"`` or
        ``"k4v4"``, see ``MoERouterPress``. The press decides on the same pairs, which take fewer
        bytes: its ratio is one of pairs.
    fold : bool
        Whether pairs of the prompt that leave join those that stay, see ``MoERouterPress``. Needs
        quantised ``pairs``, and the prompt in one forward; its pairs are held until the press has
        decided, with a press of dense layers until the block ends.
    backend : str
        Which implementation of the ops to use.

    Returns
    -------
    RaggedPress
        To be used in place of ``press``: the same tokens come out, in less memory.

    Raises
    ------
    TypeError
        If ``press`` is not a kvpress press, or ``fold`` is not a bool.
    ValueError
        If ``pairs`` is unknown, or ``"16"`` with ``fold``.
    """
    return RaggedPress(press, backend, pairs, fold)


@dataclass
class RaggedPress(BasePress):
    """See :func:`ragged`.

    Parameters
    ----------
    press : kvpress.BasePress
        The press that decides what stays.
    backend : str
        Which implementation of the ops to use.
    pairs : str
        How it is stored.
    fold : bool
        Whether what leaves joins what stays.
    """

    press: BasePress
    backend: str = "auto"
    pairs: str = "16"
    fold: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.press, BasePress):
            raise TypeError(f"expected a kvpress press, got {kind(self.press)}")
        if isinstance(self.press, MoERouterPress):
            raise TypeError(
                "expected a kvpress press that masks what it evicts, got moekv's own, which frees "
                "it: use it as it is"
            )
        check_choice("pairs", self.pairs, ops.PAIRS)
        check_flag("fold", self.fold)
        if self.fold and self.pairs == "16":
            raise ValueError(
                "expected quantised pairs ('k8v8', 'k8v4' or 'k4v4') with fold, got '16'"
            )
        ops.check_backend(self.backend)

    @property
    def compression_ratio(self) -> float:
        """The ratio of the press within."""
        ratio: float = self.press.compression_ratio
        return ratio

    @compression_ratio.setter
    def compression_ratio(self, ratio: float) -> None:
        self.press.compression_ratio = ratio

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        """Apply the press to every prefill in the block, and store ragged what it keeps.

        Raises
        ------
        TypeError
            If the cache is not a ``DynamicCache`` of dense layers.
        ValueError
            If ``pairs`` cannot serve the model's head dim or dtype; with ``fold``, if what a press
            of dense layers leaves is not pairs of the prompt.
        RuntimeError
            If the block ran the model and nothing was stored: the press masked no keys.
        NotImplementedError
            With ``fold``, if a layer's queries can neither be observed nor computed.
        """
        language_model = getattr(model.model, "language_model", model.model)
        modules = [layer.self_attn for layer in language_model.layers]
        caches: dict[int, Cache] = {}
        filled: WeakSet[Cache] = WeakSet()
        prompts = Prompts(modules, rotary_in(language_model), self.backend) if self.fold else None
        stored = 0

        def remember_cache(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            cache = cache_of(kwargs)
            if cache is not None:
                caches[module.layer_idx] = cache
                if not cache.get_seq_length(module.layer_idx):
                    filled.add(cache)

        def store(*_: Any) -> None:
            nonlocal stored
            for module in modules:
                masked = getattr(module, "masked_key_indices", None)
                if masked is None:
                    continue
                cache, index = caches[module.layer_idx], module.layer_idx
                prompt = None if prompts is None else prompts.pop(cache, index)
                cache.layers[index] = self._compress(cache.layers[index], masked, prompt)
                module.masked_key_indices = None
                stored += 1
            if prompts is not None:
                prompts.compare()
            for cache in caches.values():
                agree_on_padding(cache.layers)

        hooks = [m.register_forward_pre_hook(remember_cache, with_kwargs=True) for m in modules]
        hooks.append(language_model.register_forward_hook(store))
        try:
            # Prompts are read before the press evicts: hooks run in the order in which they come.
            with nullcontext() if prompts is None else prompts.reading(), self.press(model):
                yield
            store()  # presses that decide after the prefill, as KVzip does
            if self.pairs != "16":
                for cache in filled:
                    stored += self._compress_dense(cache, modules, prompts)
        finally:
            for hook in hooks:
                hook.remove()
        if caches and not stored and (self.compression_ratio > 0 or self.pairs != "16"):
            raise RuntimeError(
                f"{type(self.press).__name__} masked no keys, so nothing was stored ragged; "
                "without quantised pairs ragged() is for head-wise presses such as AdaKVPress"
            )

    def _compress_dense(
        self, cache: Cache, modules: Sequence[nn.Module], prompts: Prompts | None
    ) -> int:
        """Store the layers that a press of dense layers has left; one with a window stays."""
        dense = [i for i in map(index_of, modules) if type(cache.layers[i]) is DynamicLayer]
        for i in dense:
            prompt = None if prompts is None else prompts.pop(cache, i)
            cache.layers[i] = self._compress(cache.layers[i], None, prompt)
        agree_on_padding(cache.layers)
        return len(dense)

    def _compress(
        self, layer: CacheLayerMixin, masked: Sequence[Tensor] | None, prompt: Prompt | None
    ) -> RaggedLayer:
        keys, values = layer.keys, layer.values
        if type(layer) is not DynamicLayer or keys is None or values is None:
            raise TypeError(
                f"expected a DynamicCache with dense layers, got a {type(layer).__name__}"
            )
        if self.pairs != "16":
            sizes = keys.shape[3], values.shape[3], keys.dtype
            check_pairs(self.pairs, *sizes, device=keys.device, backend=self.backend)
        if prompt is not None and prompt.stay is None and keys.shape[2] < prompt.keys.shape[2]:
            prompt.compare(keys, values)  # evicted when the block ended
        later, stay = None, None
        if prompt is not None:
            later = keys[:, :, prompt.num_left :], values[:, :, prompt.num_left :]
            keys, values, stay = prompt.keys, prompt.values, prompt.stay
        kept = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
        if stay is not None:
            kept &= stay
        if masked is not None:
            kept[tuple(masked)] = False  # of some presses it is a list
        folding = None if prompt is None or bool(kept.all()) else prompt.folding
        found = RaggedLayer.compress(
            keys,
            values,
            Kept.from_mask(kept),
            pairs=self.pairs,
            folding=folding,
            backend=self.backend,
        )
        found.positions = None  # places in what another press may have left are none
        if later is not None and later[0].shape[2]:
            found.update(*later)
        return found

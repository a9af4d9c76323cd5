"""Measurements: summed on the device, and read by ``get_stats``."""

from __future__ import annotations

import copy
import threading
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from moekv.cache.caches import bits_per_number, bytes_by_kind, held_bytes
from moekv.cache.layer import CompressedLayer
from moekv.press.reports import HeldCache, LayerReport, Stats

_ALIKE = Fraction(1)

HIT_RATE_DECAY = 0.9
"""Decay of the moving average of hit rates, for each call."""


@dataclass
class Observation:
    """Measurements of one rating of L layers. E acting experts, B rows, T cached pairs.

    Attributes
    ----------
    num_tokens : int
        Real tokens that each layer routed.
    load : Tensor [L, E], int64
        How often each expert was chosen.
    entropy : Tensor [L]
        Sum over the real tokens of the entropy of the router's probabilities, in nats.
    aux_loss : Tensor [L]
    shares : Tensor [L, B, T, E], float32
        Weight of each expert at each position, 0 at padding.
    hit_rates : Tensor [L, E], float32
        Share of the window queries' attention on what each expert alone would retain.
    silent : Tensor [E], bool
        Experts whose scores do not count: all equal, NaN or infinite.
    """

    num_tokens: int
    load: Tensor
    entropy: Tensor
    aux_loss: Tensor
    shares: Tensor
    hit_rates: Tensor
    silent: Tensor

    def among(self, count: int) -> Observation:
        """Return this of more experts, `count` in all, of which the last did not act."""
        more = 0, count - len(self.silent)
        return replace(
            self,
            load=functional.pad(self.load, more),
            shares=functional.pad(self.shares, more),
            hit_rates=functional.pad(self.hit_rates, more, value=torch.nan),
            silent=functional.pad(self.silent, more),
        )


def _moved(before: Tensor, rates: Tensor) -> Tensor:
    """Move averages of hit rates [E] by further ones; NaN: not measured."""
    mean = torch.where(before.isnan(), rates, rates.lerp(before, HIT_RATE_DECAY))
    return torch.where(rates.isnan(), before, mean)


class LayerStats:
    """Sums of one layer's observations.

    Parameters
    ----------
    num_experts : int
    device : torch.device
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.num_calls = 0
        self.num_tokens = 0
        self.load = torch.zeros(num_experts, dtype=torch.int64, device=device)
        # Of weights: all, those of pairs that were compressed, and of evicted ones; entropy; loss.
        self.sums = torch.zeros(3 * num_experts + 2, dtype=torch.float32, device=device)
        self.hit_rates = torch.full([num_experts], torch.nan, dtype=torch.float32, device=device)
        self.later = self.hit_rates

    @property
    def aux_loss(self) -> Tensor:
        """Sum of the auxiliary losses, a scalar."""
        return self.sums[-1]

    def add(self, load: Tensor, sums: Tensor, hit_rates: Tensor, num_tokens: int) -> None:
        """Add one rating."""
        # Not in place: the sums may be inference tensors.
        self.load = self.load + load
        self.sums = self.sums + sums
        self.hit_rates = _moved(self.hit_rates, hit_rates)
        self.num_calls += 1
        self.num_tokens += num_tokens

    def add_later(self, rates: Tensor) -> None:
        """Add hit rates [E] of later queries; NaN: not measured."""
        self.later = _moved(self.later, rates)

    def report(
        self,
        names: Sequence[str],
        kept_pairs: Sequence[int] = (),
        history: Mapping[str, float] = MappingProxyType({}),
    ) -> LayerReport:
        """Read the sums. Waits for the device.

        Parameters
        ----------
        names : sequence of E str
        kept_pairs : sequence of H int
            Pairs that each head retained.
        history : mapping
            Selection bias of each routed expert.
        """
        share, ruled, removed = self.sums[:-2].view(3, -1)

        def per_expert(numbers: Tensor) -> dict[str, Any]:
            return dict(zip(names, numbers.tolist(), strict=True))

        return {
            "router_stats": {
                "expert_usage_ratios": per_expert(self.load.float() / self.load.sum().clamp(min=1)),
                "expert_usage_count": per_expert(self.load),
                "total_tokens": self.num_tokens,
                "routing_decisions": int(self.load.sum()),
                "router_entropy": float(self.sums[-2]) / max(self.num_tokens, 1),
                "history_bias": dict(history),
            },
            "expert_compression_stats": {
                "expert_usage": per_expert(share / share.sum().clamp(min=1)),
                "compression_ratios": per_expert(removed / ruled),
                "cache_hit_rates": per_expert(self.hit_rates),
                "later_hit_rates": per_expert(self.later),
            },
            "kept_pairs": list(kept_pairs),
        }


class Statistics:
    """Measurements of a press on one model. Any thread may add to them.

    Attributes
    ----------
    epoch : str
        Identifies these statistics: a cache layer notes in which ones its pairs are counted.
    layers : dict
        :class:`LayerStats` of each layer, by its index.
    bytes, pairs : list of two int
        Before and after compression.
    budget, stored : str or None
        The budget and the format that were used last; None: nothing has been compressed.
    unfolded : str or None
        Why pairs that left last joined no others.
    kept : dict
        By layer index: pairs [H] that its heads retained last, summed over rows.
    silent : Tensor [E], bool, or None
        Experts whose scores have not counted so far. None: nothing has been rated.
    """

    def __init__(self) -> None:
        self.epoch = uuid.uuid4().hex
        self.layers: dict[int, LayerStats] = {}
        self.bytes = [0, 0]
        self.pairs = [0, 0]
        self._joined: Tensor | None = None  # evicted pairs that joined others
        self._worth = Fraction(0)  # evicted pairs, in bytes before quantising
        self.budget: str | None = None
        self.stored: str | None = None
        self.unfolded: str | None = None
        self.kept: dict[int, Tensor] = {}
        self.silent: Tensor | None = None
        self._cache: weakref.ref[Cache] | None = None
        self._most: int | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return a copy."""
        with self._lock:
            state = {name: x for name, x in self.__dict__.items() if name != "_lock"}
            return copy.deepcopy(state | {"_cache": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore saved statistics."""
        self.__dict__ |= state
        self._lock = threading.Lock()

    def observe(
        self, indices: Sequence[int], seen: Observation, kept: Tensor | None = None
    ) -> None:
        """Add an observation, and which pairs were retained, to the sums of its layers.

        Parameters
        ----------
        indices : sequence of L int
            Of the layers.
        seen : Observation
        kept : Tensor [L, B, T], float32, optional
            Share of the heads that retain each position. None: nothing was evicted.
        """
        share = seen.shares.sum((1, 2))
        ruled = removed = torch.zeros_like(share)
        if kept is not None:
            ruled, removed = share, torch.einsum("lbte,lbt->le", seen.shares, 1 - kept)
        parts = [share, ruled, removed, seen.entropy[:, None], seen.aux_loss[:, None]]
        sums = torch.cat(parts, -1).unbind()
        rows = zip(indices, seen.load.unbind(), sums, seen.hit_rates.unbind(), strict=True)
        with self._lock:
            before, silent = self.silent, seen.silent
            self.silent = silent if before is None else before.to(silent.device) & silent
            for index, load, more, rates in rows:
                if index not in self.layers:
                    self.layers[index] = LayerStats(len(load), load.device)
                self.layers[index].add(load, more, rates, seen.num_tokens)

    def observe_later(self, index: int, rates: Tensor) -> None:
        """Add hit rates [E] of queries after a compression of a layer."""
        with self._lock:
            if index in self.layers:
                self.layers[index].add_later(rates.to(self.layers[index].later.device))

    def count(
        self, pairs: tuple[int, int], num_bytes: tuple[int, int], gain: Fraction = _ALIKE
    ) -> None:
        """Add pairs and bytes, before and after; `gain` are now stored in the bytes of one."""
        with self._lock:
            self._worth += pairs[0] - pairs[1] / gain
            for total, more in ((self.pairs, pairs), (self.bytes, num_bytes)):
                total[0] += more[0]
                total[1] += more[1]

    def join(self, count: Tensor) -> None:
        """Add evicted pairs that joined others, a scalar on the device."""
        with self._lock:
            before = self._joined
            self._joined = count if before is None else before.to(count.device) + count

    def hold(self, index: int, counts: Tensor) -> None:
        """Note the pairs [B, H] that a layer's heads retained."""
        with self._lock:
            self.kept[index] = counts.sum(0)

    def follow(self, cache: Cache, most: int | None) -> None:
        """Note a compressed cache, to report what it holds later.

        Parameters
        ----------
        cache : Cache
        most : int or None
            The most pairs that a head may hold, on average; None: not bounded.
        """
        with self._lock:
            self._cache, self._most = weakref.ref(cache), most

    def _held(self) -> HeldCache:
        """Return what the cache that was compressed last holds now."""
        cache = None if self._cache is None else self._cache()
        layers = [] if cache is None else [cache.layers[i] for i in self.kept]
        layers = [layer for layer in layers if layer.is_initialized]
        held = [held_bytes(layer) for layer in layers]
        allowed = None
        if self._most is not None and layers:
            grown = [layer for layer in layers if isinstance(layer, CompressedLayer)]
            allowed = sum(layer.allowed_bytes(self._most) for layer in grown)
        return {
            "bytes_held": sum(held) if held else None,
            "bytes_by_kind": bytes_by_kind(layers) if held else None,
            "bits_per_number": bits_per_number(layers) if held else None,
            "bytes_allowed": allowed,
            "evictions": self.pairs[0] - self.pairs[1],
        }

    def idle(self, names: Sequence[str]) -> list[str]:
        """Name the experts that no token of any layer was routed to. Waits for the device."""
        with self._lock:
            loads = [layer.load for layer in self.layers.values()]
        if not loads:
            return []
        chosen = torch.stack([load.to(loads[0].device) for load in loads]).sum(0).tolist()
        return [name for name, n in zip(names, chosen, strict=True) if n == 0]

    def report(
        self,
        names: Sequence[str],
        router: str,
        budget: str,
        stored: str,
        fold: bool | str,
        idle: Sequence[str],
        history: Mapping[int, dict[str, float]],
    ) -> Stats:
        """Read everything, see ``MoERouterPress.get_stats``. Waits for the device.

        Parameters
        ----------
        names : sequence of E str
            Of the experts.
        router : str
            Name of the router in use.
        budget, stored, fold : str or bool
            The options.
        idle : sequence of str
            Experts that should have been chosen and were not.
        history : mapping
            Of each layer whose router has one, see ``Rater.history``.
        """
        layers = {i: layer for i, layer in sorted(self.layers.items())}
        count = max((layer.num_calls for layer in layers.values()), default=0)
        aux_loss = sum(float(layer.aux_loss) for layer in layers.values())
        before, after = self.bytes
        pairs, kept = self.pairs
        return {
            "total_aux_loss": aux_loss,
            "avg_aux_loss": aux_loss / max(count, 1),
            "forward_count": count,
            "router": router,
            "budget": {"asked": budget, "used": self.budget},
            "pairs": {"asked": stored, "used": self.stored},
            "fold": {
                "asked": fold,
                "used": None if self.stored is None else self.unfolded is None,
                "why_not": self.unfolded,
            },
            "never_chosen": list(idle),
            "compression": {
                "bytes_before": before,
                "bytes_after": after,
                "bytes_freed": before - after,
                "ratio": float(self._worth / max(pairs, 1)),
                "evicted": (pairs - kept) / max(pairs, 1),
                "folded": int(0 if self._joined is None else self._joined) / max(pairs - kept, 1),
            },
            "cache": self._held(),
            "layer_stats": {
                i: layer.report(names, self._kept(i), history.get(i, {}))
                for i, layer in layers.items()
            },
        }

    def _kept(self, index: int) -> list[int]:
        found: list[int] = self.kept[index].tolist() if index in self.kept else []
        return found

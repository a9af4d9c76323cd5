"""The router `pikv`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moekv.routing.adaptive import AdaptiveRouter


class PiKVMoERouter(AdaptiveRouter):
    """Adaptive gating that prefers experts with high cache hit rates.

    The exponential moving average of the measured cache hit rates sets the selection bias: each
    expert's average minus the mean over the experts, times `history_weight`. The bias moves the
    choice of experts, not their weights (as in the auxiliary-loss-free balancing of Wang et al.,
    2024). It changes at the first update and at every `cache_update_interval`-th one, and is
    constant in between. The hit rates of the tokens to be routed are included. Where a text is
    routed again they are used alone, as the history includes the other rows of the batch.

    Hit rates at a compression predict later attention poorly. So from the first hit rates of later
    queries on (:meth:`update_later`), these alone are the history. It acts on the next prompt.

    Parameters
    ----------
    cache_aware : bool
        False: the history is neither kept nor used.
    cache_update_interval : int
        Updates of the history per change of the bias; >= 1.
    history_decay : float
        Share of the old average that an update keeps, in [0, 1).
    history_weight : float
        Probability per unit of hit rate; >= 0.
    *args, **options
        As in `AdaptiveRouter`.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """

    hit_rate_ema: Tensor
    history_bias: Tensor
    num_updates: Tensor
    num_later: Tensor

    def __init__(
        self,
        *args: Any,
        cache_aware: bool = True,
        cache_update_interval: int = 4,
        history_decay: float = 0.9,
        history_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        counts = isinstance(cache_update_interval, int)
        if not counts or isinstance(cache_update_interval, bool) or cache_update_interval < 1:
            raise ValueError(
                f"expected cache_update_interval an integer >= 1, got {cache_update_interval!r}"
            )
        if not 0 <= history_decay < 1:
            raise ValueError(f"expected history_decay in [0, 1), got {history_decay}")
        if not (history_weight >= 0 and math.isfinite(history_weight)):
            raise ValueError(f"expected a finite history_weight >= 0, got {history_weight}")
        self.cache_aware = cache_aware
        self.cache_update_interval = cache_update_interval
        self.history_decay = history_decay
        self.history_weight = history_weight
        self.register_buffer("hit_rate_ema", torch.zeros(self.num_experts))
        self.register_buffer("history_bias", torch.zeros(self.num_experts))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_later", torch.zeros((), dtype=torch.int64))

    @property
    def history(self) -> Tensor | None:
        """Selection bias `[E]` from measured hit rates."""
        return self.history_bias if self.cache_aware else None

    @torch.no_grad()
    def update_history(self, hit_rates: Tensor) -> None:
        """Update the moving average with measured hit rates; does not wait for the device.

        Parameters
        ----------
        hit_rates : Tensor
            `[E]`, each in [0, 1] (clamped); NaN for an expert that was not measured, whose average
            stays. The first update sets the average.

        Raises
        ------
        ValueError
            If the shape is not `[E]`.
        """
        self._check_rates(hit_rates)
        if self.cache_aware:
            has_later = self.num_later > 0
            before = self.hit_rate_ema, self.num_updates, self.history_bias
            after = self._after(hit_rates)
            self._set(torch.where(has_later, x, y) for x, y in zip(before, after, strict=True))

    @torch.no_grad()
    def update_later(self, hit_rates: Tensor) -> None:
        """Update the moving average with hit rates of later queries; does not wait for the device.

        Parameters
        ----------
        hit_rates : Tensor
            As in :meth:`update_history`, whose updates no longer count from now on.

        Raises
        ------
        ValueError
            If the shape is not `[E]`.
        """
        self._check_rates(hit_rates)
        if self.cache_aware:
            # The first one restarts the average.
            self.num_updates = torch.where(self.num_later == 0, 0, self.num_updates)
            self._set(self._after(hit_rates))
            self.num_later = self.num_later + 1

    def _check_rates(self, hit_rates: Tensor) -> None:
        if hit_rates.shape != (self.num_experts,):
            raise ValueError(
                f"expected hit_rates [{self.num_experts}], got {list(hit_rates.shape)}"
            )

    def _set(self, history: Iterable[Tensor]) -> None:
        # New tensors: another thread may be reading the old ones.
        self.hit_rate_ema, self.num_updates, self.history_bias = history

    def _after(self, hit_rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the moving average, the number of updates and the bias after an update."""
        ema, num_updates = self.hit_rate_ema, self.num_updates + 1
        rates = hit_rates.to(ema).clamp(0, 1)
        rates = torch.where(rates.isnan(), ema, rates)
        ema = torch.where(num_updates == 1, rates, rates.lerp(ema, self.history_decay))
        due = (num_updates == 1) | (num_updates % self.cache_update_interval == 0)
        bias = self.history_weight * (ema - ema.mean(-1, keepdim=True))
        return ema, num_updates, torch.where(due, bias, self.history_bias)

    def _own_bias(self, hit_rates: Tensor | None) -> Tensor | None:
        if not self.cache_aware or hit_rates is None:
            return None
        rates = hit_rates.to(self.hit_rate_ema).clamp(0, 1)
        return self.history_weight * (rates - rates.nanmean(-1, keepdim=True)).nan_to_num(0.0)

    def _history_bias(self, hit_rates: Tensor | None) -> Tensor | None:
        if not self.cache_aware:
            return None
        return self.history_bias if hit_rates is None else self._after(hit_rates)[2]

"""A step over a compressed cache whose attention is measured, for routers with a history."""

from __future__ import annotations

from typing import Any

import torch

from moekv.cache.caches import present
from moekv.cache.ragged import count_stored
from moekv.experts.builder import ViewBuilder
from moekv.models.queries import window_queries
from moekv.press.forward import Call, Plan, Strategy


class Measuring(Strategy):
    """Measures later hit rates, and compresses nothing.

    Parameters
    ----------
    plan : Plan
    view : ViewBuilder
    """

    def take(self, call: Call) -> None:
        """Measure the attention of a layer."""
        self.num_taken += 1
        measure(call, self.plan, self.view)


@torch.no_grad()
def measure(call: Call, plan: Plan, view: ViewBuilder) -> None:
    """Measure a layer's last query, for the statistics and the layer's router."""
    rater = plan.rater
    asked = call.asked or window_queries(
        call.module, call.hidden_states, call.kwargs, 1, 0, view.rotary
    )
    layer: Any = call.cache.layers[call.index]
    count_stored(call.cache.layers)  # at the first layer, for all
    with present(call.cache, call.index):
        rates = plan.later.measure(
            layer,
            call.module,
            asked,
            call.hidden_states,
            rater.names,
            backend=plan.options.backend,
            rotary=view.rotary,
            ranks=view.ranks(call.module, layer.num_heads),
        )
    if rates is not None:
        plan.statistics.observe_later(call.index, rates)
        rater.routers.take_in_later(call.index, rates[len(rater.shared) :])

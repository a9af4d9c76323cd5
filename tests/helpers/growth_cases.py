"""Caches that go on growing: presses, steps, and what must hold."""

from typing import Any

import torch
from tiny_models import tokens

from moekv import Expert, LayerView, MoERouterPress

BUDGETS = ["uniform", "layer", "head", "model"]


EXPERTS = ["conservative", "selective", "semantic", "temporal"]


class Uneven(Expert):
    """Scores by the key, on one scale, so that heads and layers differ in what they keep."""

    name = "uneven"
    comparable = True

    def scores(self, view: LayerView) -> torch.Tensor:
        return view.keys.float().norm(dim=-1) + 2.0 * view.heads[..., None]


def make_press(ratio: float = 0.0, **options: Any) -> MoERouterPress:
    options = {"experts": [Uneven()], "top_k": 1, "sinks": 2, "recent": 4, "window": 7} | options
    return MoERouterPress(ratio, **options)


def assert_average(pairs: torch.Tensor, expected: torch.Tensor, budget: str) -> None:
    """Pairs [L, B, H] of each head; exact over the heads that share a budget."""
    layers, _, heads = pairs.shape
    if budget == "uniform":
        assert (pairs == expected[:, None]).all()
    elif budget == "layer":
        assert (pairs == pairs[..., :1]).all()
        assert (pairs[..., 0].sum(0) == layers * expected).all()
    elif budget == "head":
        assert (pairs.sum(2) == heads * expected).all()
    else:
        assert (pairs.sum((0, 2)) == layers * heads * expected).all()


def decode(model: Any, cache: Any, position: int, batch: int = 1) -> torch.Tensor:
    """Feed one token as ``generate`` does."""
    where = torch.tensor([position])
    with torch.no_grad():
        return model(
            tokens(batch, 1, seed=position),
            past_key_values=cache,
            cache_position=where,
            position_ids=where[None],
        ).logits

"""Experts and routers that say what a test chose, and what a press kept by them."""

import weakref
from typing import Any

import torch
from tiny_models import prefill
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from moekv import Expert, LayerView, MoERouterPress, RouterOutput, expert_names
from moekv.ops import ScoreKind

LENGTH = 80
ALL = expert_names()[:6]


class Fixed(Expert):
    """Scores that the test chose."""

    def __init__(self, name: str, scores: Tensor) -> None:
        self.name, self.fixed = name, scores

    def scores(self, view: LayerView) -> Tensor:
        return self.fixed.expand(view.keys.shape[:3])


class Spy(Expert):
    name = "spy"
    kinds = (ScoreKind.MASS,)

    def __init__(self) -> None:
        self.mass: list[Tensor] = []
        self.keys: list[weakref.ref[Tensor]] = []

    def scores(self, view: LayerView) -> Tensor:
        self.mass.append(view.scores_of(ScoreKind.MASS))
        self.keys.append(weakref.ref(view.keys))
        return self.mass[-1]


class Routed(nn.Module):
    """A router that decides what the test says."""

    history, choices = None, 0

    def __init__(self, probs: Tensor, weights: Tensor, experts: Tensor) -> None:
        super().__init__()
        self.probs, self.weights, self.experts = probs, weights, experts

    def rate(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.probs.log().expand(len(hidden_states), *self.probs.shape), None

    def decide(self, logits: Tensor, *_: Any, **__: Any) -> RouterOutput:
        batch = len(logits)
        weights, experts = (x.expand(batch, *x.shape) for x in (self.weights, self.experts))
        load = torch.bincount(experts.flatten(), minlength=logits.shape[-1])
        entropy = torch.special.entr(logits.exp()).sum()
        return RouterOutput(logits, weights, experts.int(), torch.tensor(0.5), load, entropy)

    def freeze(self) -> "Routed":
        return self

    def update_history(self, hit_rates: Tensor) -> None:
        pass


def make_press(ratio: float = 0.5, **options: Any) -> MoERouterPress:
    return MoERouterPress(ratio, **options)


def compress(
    press: MoERouterPress, model: PreTrainedModel, input_ids: Tensor, **inputs: Any
) -> DynamicCache:
    with press(model):
        return prefill(model, input_ids, **inputs)


def kept_positions(compressed: DynamicCache, full: DynamicCache, index: int) -> Tensor:
    """Which positions [B, H, n] of the full layer a compressed one has, checked pair by pair."""
    layer, whole = compressed.layers[index], full.layers[index]
    same = (layer.keys[:, :, :, None] == whole.keys[:, :, None]).all(-1)
    assert (same.sum(-1) == 1).all()
    positions = same.int().argmax(-1)
    expanded = positions[..., None].expand(-1, -1, -1, whole.values.shape[-1])
    assert torch.equal(layer.values, whole.values.gather(2, expanded))
    return positions

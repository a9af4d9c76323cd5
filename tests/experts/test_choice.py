"""The choice of models that are mixtures of experts themselves, as experts read it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_model import build
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache

from moekv import DecodingConfig, Expert, LayerView, MoERouterPress
from moekv.models.hooks import choice_of, routers_in
from moekv.ops import ScoreKind

# DeepSeek V3's router says what it chose from some later version on.
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "qwen2_moe")


class Chosen(Expert):
    """Notes what the model chose."""

    name, kinds, reads_choice = "chosen", (ScoreKind.MASS,), True

    def __init__(self) -> None:
        self.seen: dict[int, Tensor | None] = {}

    def scores(self, view: LayerView) -> Tensor:
        self.seen[view.module.layer_idx] = view.expert_choice
        return view.scores_of(ScoreKind.MASS)


@pytest.mark.parametrize("name", MIXTURES)
def test_what_the_router_before_a_layer_chose(name: str) -> None:
    model, expert, said = build(name), Chosen(), []
    routers = routers_in(model.model)
    assert len(routers) == len(model.model.layers)
    hooks = [r.register_forward_hook(lambda m, a, out: said.append(out)) for r in routers]
    with torch.no_grad(), MoERouterPress(0.5, experts=[expert])(model):
        model(tokens(2, 30) % 50 + 5, use_cache=True)
    assert all(len(router._forward_hooks) == 1 for router in routers)  # gone with the block
    for hook in hooks:
        hook.remove()
    assert expert.seen
    for index, choice in expert.seen.items():
        if index == 0:
            assert choice is None  # no router before it
            continue
        logits, weights, experts = said[index - 1]
        assert choice is not None and choice.shape == (2, 30, logits.shape[-1])
        assert choice.dtype == torch.float32
        rows = choice.view(60, -1)
        torch.testing.assert_close(rows.gather(1, experts), weights.float())
        assert ((rows > 0).sum(1) <= experts.shape[1]).all()


def test_nobody_looks_where_nobody_reads() -> None:
    model = build("mixtral")
    with MoERouterPress(0.5)(model):
        assert not any(router._forward_hooks for router in routers_in(model.model))


def test_models_without_routers_and_caches_that_grow() -> None:
    expert = Chosen()
    model = tiny_model()
    with torch.no_grad(), MoERouterPress(0.5, experts=[expert])(model):
        model(tokens(1, 30), use_cache=True)
    assert expert.seen and not any(x is not None for x in expert.seen.values())
    expert, mixture = Chosen(), build("mixtral")
    press = MoERouterPress(0.5, experts=[expert], decoding=DecodingConfig(10, 2))
    with torch.no_grad(), press(mixture):
        cache = DynamicCache()
        mixture(tokens(1, 30) % 50, past_key_values=cache)
        expert.seen.clear()
        for step in range(3):
            mixture(tokens(1, 1, step) % 50, past_key_values=cache)
    assert expert.seen and not any(x is not None for x in expert.seen.values())


@pytest.mark.parametrize("output", [torch.ones(4, 3), (torch.ones(4, 3),) * 3, (1, 2)])
def test_routers_that_return_something_else(output: Any) -> None:
    assert choice_of(output, 2) is None

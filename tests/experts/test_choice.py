"""The choice of models that are mixtures of experts themselves, as experts read it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_cases import SMALL, WORDS, texts
from every_model import build
from random_router import random_router
from tiny_models import tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast

from moekv import (
    BaseMoERouter,
    CalibratedRouter,
    DecodingConfig,
    Expert,
    LayerView,
    MoERouterPress,
    calibrate,
)
from moekv.models.hooks import choice_of, experts_in, routers_in, with_choice
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


class Reads(BaseMoERouter):
    """Notes what it is given."""

    seen: list[Tensor] = []

    def _rate(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.seen.append(hidden_states)
        return super()._rate(hidden_states, mask)


def test_a_router_of_ones_own_reads_the_choice() -> None:
    model, said = build("mixtral"), []
    count, size = experts_in(model), model.config.hidden_size
    Reads.seen.clear()
    router = Reads(size, 2, 1, choices=count)
    press = MoERouterPress(0.5, experts=["semantic", "temporal"], router_type=router)
    hooks = [
        layer.register_forward_hook(lambda m, a, out: said.append(choice_of(out, 2)))
        for layer in routers_in(model)
    ]
    with torch.no_grad(), press(model):
        model(tokens(2, 30) % 50 + 5, use_cache=True)
    for hook in hooks:
        hook.remove()
    first, *others = Reads.seen
    assert first.shape == (2, 30, size + count) and not first[..., size:].any()
    assert len(others) == len(said) - 1
    for read, choice in zip(others, said, strict=False):
        assert choice is not None
        torch.testing.assert_close(read[..., size:], choice)


def test_a_gate_chooses_by_what_the_model_chose() -> None:
    model = build("mixtral")
    count, size = experts_in(model), model.config.hidden_size
    router = BaseMoERouter(size, 2, 1, choices=count)
    expert = Chosen()
    router.gate.weight.data[1, size:] = 100.0  # in every layer with a router before it
    router.gate.bias.data[0] = 50.0  # in the first one, evidence decides little
    press = MoERouterPress(0.5, experts=["semantic", expert], router_type=router)
    with torch.no_grad(), press(model):
        model(tokens(1, 30) % 50 + 5, use_cache=True)
    layers = press.get_stats()["layer_stats"].values()
    usage = [layer["router_stats"]["expert_usage_ratios"]["chosen"] for layer in layers]
    assert usage == [0.0] + [1.0] * (len(usage) - 1)


def test_a_router_that_reads_the_choice_of_another_model() -> None:
    for model in (tiny_model(), build("mixtral")):
        router = BaseMoERouter(model.config.hidden_size, 2, 1, choices=77)
        press = MoERouterPress(0.5, experts=["semantic", "temporal"], router_type=router)
        with pytest.raises(ValueError, match="a mixture of 77 experts.*got one of"), press(model):
            pass
    with pytest.raises(ValueError, match="a mixture of 3 experts.*got one of 2"):
        with_choice(torch.zeros(1, 4, 8), torch.zeros(1, 4, 2), 3)
    with pytest.raises(ValueError, match="expected choices >= 0, got -1"):
        BaseMoERouter(64, 2, 1, choices=-1)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i % 40 + 3 for i, word in enumerate(WORDS)} | {"<unk>": 0}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_calibration_reads_the_choice_if_it_is_asked_to(tmp_path: Path) -> None:
    model, tokenizer = build("mixtral"), _tokenizer()
    count, size = experts_in(model), model.config.hidden_size
    config = replace(SMALL, expert_choice=True)
    router = calibrate(model, tokenizer, texts(8), config=config, progress=False)
    assert router.choices == count and router.surrogate_weight.shape[2] == size + count
    assert not router.surrogate_weight[0, :, size:].any()  # before the first router
    assert router.surrogate_weight[1:, :, size:].any()
    router.save_pretrained(tmp_path)
    again = CalibratedRouter.from_pretrained(tmp_path)
    assert again.choices == count
    plain = calibrate(model, tokenizer, texts(8), config=SMALL, progress=False)
    assert plain.choices == 0 and plain.surrogate_weight.shape[2] == size
    ids, kept = tokens(1, 60) % 40 + 3, []
    for given in (router, again, plain):
        cache = DynamicCache()
        with torch.no_grad(), MoERouterPress(0.5, router=given)(model):
            model(ids, past_key_values=cache)
        kept.append([layer.head_lengths([0]) for layer in cache.layers])
    assert kept[0] == kept[1]
    with pytest.raises(ValueError, match="a mixture of experts for expert_choice=True"):
        calibrate(tiny_model(), tokenizer, texts(8), config=config, progress=False)
    with pytest.raises(ValueError, match="expected expert_choice True or False, got 1"):
        replace(SMALL, expert_choice=1)


def test_notes_of_a_growing_cache_have_the_choice() -> None:
    model = build("mixtral")
    count, ids = experts_in(model), tokens(1, 24) % 50 + 5
    router = random_router(model, choices=count)
    router.surrogate_weight.data[..., : router.hidden_size] = 0  # the choice alone tells
    said: dict[int, list[Tensor]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda m, a, out, i=i: said.setdefault(i, []).append(choice_of(out, 1))
        )
        for i, layer in enumerate(routers_in(model))
    ]
    cache = DynamicCache()
    press = MoERouterPress(0.0, router=router, decoding=DecodingConfig(40, 4))
    with torch.no_grad(), press(model):
        model(ids[:, :20], past_key_values=cache)
        for step in range(20, 24):
            model(ids[:, step : step + 1], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    for index in range(1, len(cache.layers)):
        choice = torch.cat(said[index - 1], 1)
        states = torch.zeros(1, 24, router.hidden_size)
        wanted = router.read(index, router.project(index, states, choice))
        found = cache.layers[index].notes.held_pairs()[0][..., 0]
        torch.testing.assert_close(found, wanted)

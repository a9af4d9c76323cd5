"""Any life of a compressed cache, in any model, equals masks on a full cache."""

import functools
from typing import Any

import pytest
import torch
from growth_cases import EXPERTS, Uneven
from hypothesis import given, note, settings
from hypothesis import strategies as st
from masked_reference import Lockstep
from tiny_models import VOCABULARY, tokens
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moekv import DecodingConfig, MoERouterPress

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
MOST_TOKENS = 150


@functools.cache
def random_model(description: tuple[Any, ...], attention: str) -> PreTrainedModel:
    """A model of a family, with so many layers, KV heads, queries per head, and head_dim."""
    family, layers, heads, group, dim, seed = description
    config, model = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = model(
            config(
                vocab_size=VOCABULARY,
                hidden_size=heads * group * dim,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=heads * group,
                num_key_value_heads=heads,
                head_dim=dim,
                initializer_range=0.2,
            )
        )
    built.set_attn_implementation(attention)
    return built.eval()


DESCRIPTIONS = st.tuples(
    st.sampled_from(list(FAMILIES)),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([8, 20]),
    st.integers(0, 3),
)
PRESSES = st.fixed_dictionaries(
    {
        "budget": st.sampled_from(["uniform", "head", "model"]),
        "experts": st.sampled_from([EXPERTS, ["selective"], "uneven"]),
        "sinks": st.integers(0, 3),
        "recent": st.integers(0, 6),
        "window": st.integers(1, 9),
    }
)
STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 12)),
    st.tuples(st.just("compress"), st.integers(1, 30), PRESSES),
    st.tuples(st.just("crop"), st.integers(1, 8)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
)


def make_press(options: dict[str, Any], **more: Any) -> MoERouterPress:
    options = dict(options)
    if options["experts"] == "uneven":
        options["experts"] = [Uneven()]
    return MoERouterPress(top_k=1, **options, **more)


class Life:
    """A cache, and how many of its last tokens are not compressed."""

    def __init__(self, description: tuple[Any, ...], padding: tuple[int, ...]) -> None:
        self.both = Lockstep(description, padding, make=random_model)
        self.loose = self.serial = 0

    def feed(self, count: int) -> None:
        self.serial += 1
        self.loose += count
        self.both.feed(tokens(len(self.both.padding), count, seed=self.serial))

    def append(self, count: int) -> None:
        self.feed(count)

    def compress(self, target: int, options: dict[str, Any]) -> None:
        """Compress with a token that is fed in a block."""
        pairs = self.both.pairs() + 1
        with make_press(options, decoding=DecodingConfig(target, 1))(self.both.model):
            self.feed(1)
        after = self.both.pairs()
        heads = pairs.shape[2]
        if options["budget"] == "model":
            scope, share = (0, 2), heads * len(pairs)
        else:
            scope, share = (2,), heads
        if options["budget"] == "uniform":
            average = pairs.float().mean(2)
            if (average > target).any():
                assert torch.equal(after, pairs.clamp(max=target))
        elif (pairs.sum(scope) > target * share).any():
            assert torch.equal(after.sum(scope), pairs.sum(scope).clamp(max=target * share))
        if not torch.equal(after, pairs):
            self.loose = 0

    def crop(self, count: int) -> None:
        if count >= self.both.length:
            return
        reach = min(getattr(layer, "run", 0) for layer in self.both.cache.layers)
        if count > self.loose + reach:
            if self.both.pairs().sum() == self.full_pairs():
                return  # nothing has left: a crop is served, but says nothing here
            with pytest.raises(ValueError, match="compressed together"):
                self.both.cache.crop(-count)
            return
        self.both.crop(count)
        self.loose = max(self.loose - count, 0)

    def full_pairs(self) -> int:
        layers, _, heads = self.both.pairs().shape
        return int((self.both.length - self.both.padding).sum()) * layers * heads

    def reorder(self, rows: list[int]) -> None:
        batch = len(self.both.padding)
        how = "reorder_cache" if len(rows) == batch else "batch_select_indices"
        self.both.select([row % batch for row in rows], how)

    def repeat(self, times: int) -> None:
        if len(self.both.padding) * times <= 6:
            self.both.repeat(times)


@settings(max_examples=100)
@given(
    description=DESCRIPTIONS,
    length=st.integers(2, 60),
    padding=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    padded=st.booleans(),
    ratio=st.sampled_from([0.0, 0.3, 0.6, 0.9]),
    options=PRESSES,
    steps=st.lists(STEPS, min_size=1, max_size=7),
)
def test_any_life_of_a_cache_equals_masks_on_a_full_cache(
    description: tuple[Any, ...],
    length: int,
    padding: list[int],
    padded: bool,
    ratio: float,
    options: dict[str, Any],
    steps: list[tuple[Any, ...]],
) -> None:
    life = Life(description, tuple(min(p, length - 1) * padded for p in padding))
    with make_press(options, compression_ratio=ratio)(life.both.model):
        life.feed(length)
    life.loose = 0
    for name, *arguments in [*steps, ("append", 2)]:
        note(f"{name} {arguments}: {life.both.length} tokens, {life.both.pairs().tolist()}")
        if life.both.length < MOST_TOKENS:
            getattr(life, name)(*arguments)

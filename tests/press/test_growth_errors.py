"""Caches that hold some: tokens that cannot follow, and memory that runs out while they grow."""

from typing import Any

import pytest
import torch
from growth_cases import decode
from random_router import random_router
from refusals import LENGTH, assert_same, assert_untouched, held, lengths, padded
from tiny_models import prefill, tiny_model, tokens
from transformers import DynamicCache

from moekv import DecodingConfig, MoERouterPress
from moekv.cache.ragged import RaggedLayer


def test_several_tokens_for_a_cache_that_holds_some() -> None:
    model, press = tiny_model(), MoERouterPress()
    cache = prefill(model, tokens(1, LENGTH))
    message = r"compressed nothing: .* got 3 token\(s\) for a cache that holds 40, fed outside"
    with pytest.raises(RuntimeError, match=message), press(model):
        model(tokens(1, 3), past_key_values=cache)
    assert_untouched(model, press, cache)
    with press(model), torch.no_grad():
        cache = prefill(model, tokens(1, LENGTH))
        before = held(cache)
        for wanted in (0, 1, 2):
            with pytest.raises(RuntimeError, match="got 3 tokens for a cache that holds 40"):
                model(tokens(1, 3), past_key_values=cache, logits_to_keep=wanted)
            assert_same(cache, before)
        # Who wants to see what all of them say may take some back: guesses, while decoding.
        model(tokens(1, 3), past_key_values=cache, logits_to_keep=3)
    assert cache.get_seq_length() == LENGTH + 3
    with pytest.raises(RuntimeError, match="prefill in one forward"), press(model):
        model.generate(
            tokens(1, LENGTH),
            past_key_values=DynamicCache(),
            prefill_chunk_size=16,
            max_new_tokens=2,
        )


def test_tokens_at_a_wrong_position() -> None:
    model, cache = tiny_model(), DynamicCache()
    press = MoERouterPress(budget="uniform", decoding=DecodingConfig(30, 5))
    where = torch.arange(LENGTH, LENGTH + 3)
    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        before = held(cache)
        for off in (1, -20):  # -20: as if what has left had never been
            message = f"at position 40, behind what the cache has seen, got 3 at {40 + off}"
            with pytest.raises(RuntimeError, match=message):
                model(tokens(1, 3), past_key_values=cache, cache_position=where + off)
            assert_same(cache, before)
        model(tokens(1, 3), past_key_values=cache, cache_position=where)
        model(tokens(1, 3), past_key_values=cache)
    assert cache.get_seq_length() == LENGTH + 6 and lengths(cache) == [26, 26]


def test_eager_attention_and_decoding_with_padding() -> None:
    model, mask = tiny_model(attention="eager"), padded(LENGTH + 1)

    def fill() -> DynamicCache:
        return prefill(model, tokens(2, LENGTH), attention_mask=mask[:, :-1])

    cache, press = fill(), MoERouterPress(decoding=DecodingConfig(20, 5))
    message = "for heads or layers of different lengths, got 'eager'"
    with pytest.raises(ValueError, match=message), torch.no_grad(), press(model):
        model(tokens(2, 1), past_key_values=cache, attention_mask=mask)
    cache.crop(LENGTH)
    for pairs, whole in zip(held(cache), held(fill()), strict=True):
        assert torch.equal(pairs, whole)


@pytest.mark.parametrize("budget", ["head", "model"])
@pytest.mark.parametrize("failing", ["pairs", "pairs beside notes", "notes"])
def test_memory_that_runs_out_while_decoding(
    failing: str, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tiny_model(), DynamicCache()
    router = None if failing == "pairs" else random_router(model)
    press = MoERouterPress(
        budget=budget, decoding=DecodingConfig(20, 5), sinks=1, recent=2, router=router
    )
    recompress, done = RaggedLayer.recompress, []

    def run_out(layer: RaggedLayer, *args: Any, **kwargs: Any) -> None:
        kind = "notes" if layer.stored_keys.shape[1] == 1 else "pairs"
        if kind in done and kind in failing.split()[0]:
            raise MemoryError("no memory for the second layer")
        recompress(layer, *args, **kwargs)
        done.append(kind)

    def pairs() -> list[int]:
        return [int(layer.to_dense()[2].sum()) for layer in cache.layers]

    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        for step in range(4):
            decode(model, cache, LENGTH + step)
        whole = pairs()
        monkeypatch.setattr(RaggedLayer, "recompress", run_out)
        with pytest.raises(MemoryError, match="second layer"):
            decode(model, cache, LENGTH + 4)
        monkeypatch.undo()
        assert done.count("pairs") == 1
        assert all((layer.whole_notes() is None) == (router is None) for layer in cache.layers)
        if budget == "head":
            assert pairs() == [40, whole[1] + 2]
        assert cache.get_seq_length() == LENGTH + 5
        decode(model, cache, LENGTH + 5)
        assert sum(pairs()) == 80 if budget == "head" else sum(pairs()) <= 2 * 2 * 25
        for step in range(6, 12):
            decode(model, cache, LENGTH + step)
            assert sum(pairs()) <= 2 * 2 * 25

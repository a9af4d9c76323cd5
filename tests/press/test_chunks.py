"""Prompts that are fed in chunks and compressed after each."""

from typing import Any

import pytest
import torch
from growth_cases import BUDGETS, EXPERTS, assert_average, decode, make_press
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_reference import Lockstep
from tiny_models import tiny_model, tokens
from transformers import DynamicCache

from moekv import DecodingConfig, prefill_in_chunks
from moekv.cache.ragged import RaggedLayer


@settings(max_examples=30)
@given(
    chunks=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    ratio=st.floats(0, 0.95),
    budget=st.sampled_from(BUDGETS),
    padding=st.sampled_from([(0,), (0, 5), (13, 0, 31)]),
)
def test_the_budget_is_exact_after_every_chunk(
    chunks: list[int], ratio: float, budget: str, padding: tuple[int, ...]
) -> None:
    length = sum(chunks)
    padding = tuple(min(p, length - 1) for p in padding)
    press = make_press(ratio, budget=budget)
    both, fed = Lockstep(padding=padding), 0
    input_ids = tokens(len(padding), length)
    kept = [max(1, int((length - p) * (1 - ratio))) for p in padding]
    with press(both.model, context_length=length):
        for size in chunks:
            both.feed(input_ids[:, fed : fed + size])
            fed += size
            expected = [min(k, max(fed - p, 0)) for k, p in zip(kept, padding, strict=True)]
            assert_average(both.pairs(), torch.tensor(expected), budget)
        for step in range(3):  # decoding compresses nothing
            both.feed(tokens(len(padding), 1, seed=step))
    assert_average(both.pairs(), torch.tensor(kept) + 3, budget)
    before = sum(length - p for p in padding)
    if before > sum(kept):
        ratio = press.get_stats()["compression"]["ratio"]
        assert ratio == pytest.approx((before - sum(kept)) / before)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("chunk", [1, 7, 24, 25, 64])
@pytest.mark.parametrize("padding", [(0,), (8, 0)])
def test_generation_goes_on_from_a_prompt_in_chunks(
    budget: str, chunk: int, padding: tuple[int, ...]
) -> None:
    model, batch = tiny_model(), len(padding)
    prompt = tokens(batch, 26, seed=1)
    mask = (torch.arange(26) >= torch.tensor(padding)[:, None]).long()
    press = make_press(0.6, budget=budget, experts=EXPERTS)
    last = prefill_in_chunks(
        press, model, prompt[:, :-1], chunk_size=chunk, attention_mask=mask[:, :-1]
    )
    assert last.logits.shape[:2] == (batch, 1)
    out = model.generate(
        prompt,
        attention_mask=mask,
        past_key_values=last.past_key_values,
        max_new_tokens=9,
        do_sample=False,
        suppress_tokens=[0],  # whose key is 0 anywhere
        return_dict_in_generate=True,
        output_logits=True,
    )
    both, logits = Lockstep(padding=padding), []
    by_hand = make_press(0.6, budget=budget, experts=EXPERTS)
    with by_hand(both.model, context_length=25):
        for part in prompt[:, :-1].split(chunk, dim=1):
            fed = both.feed(part)[:, -1:]
    torch.testing.assert_close(last.logits, fed, atol=1e-3, rtol=1e-3)
    for token in out.sequences[:, 25:-1].T:
        logits.append(both.feed(token[:, None])[:, -1])
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(logits), atol=1e-3, rtol=1e-3)
    kept = [max(1, int((25 - p) * 0.4)) for p in padding]
    assert_average(both.pairs(), torch.tensor(kept) + 9, budget)


def test_memory_stays_below_the_budget_and_a_chunk() -> None:
    model, length, chunk, ratio = tiny_model(), 400, 40, 0.75
    press, cache = make_press(ratio, budget="uniform"), DynamicCache()
    pair = 2 * 2 * 16 * 4  # key and value of both heads
    peaks = []

    def look(module: Any, *_: Any) -> None:
        layer = cache.layers[module.layer_idx]
        held = layer.nbytes if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes
        peaks.append(held)

    with press(model, context_length=length), torch.no_grad():
        hooks = [
            block.self_attn.register_forward_hook(look, prepend=True)
            for block in model.model.layers
        ]
        for part in tokens(1, length).split(chunk, dim=1):
            model(part, past_key_values=cache)
            assert all(
                layer.nbytes <= (100 + chunk + 64) * pair
                for layer in cache.layers
                if isinstance(layer, RaggedLayer)
            )
        for hook in hooks:
            hook.remove()
    assert [layer.nbytes for layer in cache.layers] == [100 * pair] * 2
    # Room that a buffer has beyond its tokens: 64 at least.
    assert max(peaks) <= (100 + 2 * chunk + 64) * pair < length * pair * 0.75
    assert cache.get_seq_length() == length


@pytest.mark.parametrize("budget", BUDGETS)
def test_chunks_and_decoding(budget: str) -> None:
    press = make_press(0.2, budget=budget, decoding=DecodingConfig(target=25, interval=5))
    both = Lockstep(padding=(0, 30))
    with press(both.model, context_length=60):
        for part in tokens(2, 60).split(17, dim=1):
            both.feed(part)
        held = torch.tensor([25, 24])
        assert_average(both.pairs(), held, budget)
        for step in range(12):
            both.feed(tokens(2, 1, seed=step))
            held = held + 1
            held = held.where(held < 30, 25)  # each row by itself
            assert_average(both.pairs(), held, budget)


@pytest.mark.parametrize("budget", BUDGETS)
def test_one_forward_is_one_chunk(budget: str) -> None:
    """Fed at once, a prompt is compressed as without chunks, and stored ragged."""
    model, caches = tiny_model(), [DynamicCache(), DynamicCache()]
    for cache, length in zip(caches, (None, 50), strict=True):
        press = make_press(0.5, budget=budget, experts=EXPERTS)
        with press(model, context_length=length), torch.no_grad():
            model(tokens(1, 50), past_key_values=cache)
            decode(model, cache, 50)
    for layer, chunked in zip(*(cache.layers for cache in caches), strict=True):
        assert isinstance(chunked, RaggedLayer) and chunked.get_seq_length() == 51
        dense = (layer.keys, layer.values)
        if isinstance(layer, RaggedLayer):
            dense = layer.to_dense()
        for pairs, other in zip(chunked.to_dense(), dense, strict=False):
            torch.testing.assert_close(pairs, other, atol=1e-5, rtol=1e-5)

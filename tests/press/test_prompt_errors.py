"""Prompts that a press refuses, those that break down halfway, and the shortest that there are."""

from typing import Any

import pytest
import torch
from refusals import (
    LENGTH,
    Failing,
    assert_holds,
    assert_same,
    assert_untouched,
    held,
    num_hooks,
    padded,
    refuse,
)
from tiny_models import prefill, tiny_model, tokens
from transformers import DynamicCache, StaticCache

from moekv import DecodingConfig, MoERouterPress, prefill_in_chunks
from moekv.cache.ragged import RaggedLayer


def test_left_padding_and_eager_attention() -> None:
    model, press = tiny_model(attention="eager"), MoERouterPress()
    cache = DynamicCache()
    with pytest.raises(ValueError, match="'sdpa' for rows with padding, got 'eager'"), press(model):
        model(tokens(2, LENGTH), attention_mask=padded(), past_key_values=cache)
    assert not cache.layers  # nothing has run


def test_padding_at_the_right() -> None:
    model, press = tiny_model(), MoERouterPress()
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, -3:] = 0
    refuse(ValueError, "padding_side = 'left'", model, press, attention_mask=mask)


def test_memory_that_runs_out_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    model, press, cache = tiny_model(), MoERouterPress(budget="model"), DynamicCache()
    compress, done = RaggedLayer.compress, []

    def run_out(*args: Any, **kwargs: Any) -> RaggedLayer:
        if done:
            raise MemoryError("no memory for the second layer")
        done.append(compress(*args, **kwargs))
        return done[0]

    monkeypatch.setattr(RaggedLayer, "compress", run_out)
    with pytest.raises(MemoryError, match="second layer"), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert done and cache.get_seq_length() == 0  # as before the prefill
    assert not any(layer.is_initialized for layer in cache.layers)
    monkeypatch.undo()
    with press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert cache.get_seq_length() == LENGTH and isinstance(cache.layers[0], RaggedLayer)


def test_exception_halfway_through_a_stream() -> None:
    model, cache, expert = tiny_model(), DynamicCache(), Failing()
    press = MoERouterPress(experts=[expert], top_k=1, budget="model", streaming=True)
    with pytest.raises(ArithmeticError), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert cache.get_seq_length() == 0 and not any(x.is_initialized for x in cache.layers)
    assert press.get_stats()["forward_count"] == 0
    expert.layer = None
    with press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert cache.get_seq_length() == LENGTH and isinstance(cache.layers[0], RaggedLayer)


def test_context_shorter_than_what_always_stays() -> None:
    model = tiny_model()
    press = MoERouterPress(0.5, budget="uniform", sinks=4, recent=16)
    with press(model):
        cache = prefill(model, tokens(1, 18))
    kept = [0, 1, 2, 3, 13, 14, 15, 16, 17]
    assert_holds(cache, prefill(model, tokens(1, 18)), kept)


@pytest.mark.parametrize("policy", ["mixture", "dominant"])
def test_context_of_one_token(policy: str) -> None:
    model, press = tiny_model(), MoERouterPress(0.9, policy=policy)
    with press(model):
        out = model.generate(
            tokens(1, 1), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
    expected = model.generate(tokens(1, 1), max_new_tokens=3, do_sample=False)
    assert torch.equal(out.sequences, expected)
    assert press.get_stats()["compression"]["ratio"] == 0


# --- In chunks ------------------------------------------------------------------------------------


def test_prompt_longer_than_its_length() -> None:
    model, press, cache = tiny_model(), MoERouterPress(), DynamicCache()
    with torch.no_grad(), press(model, context_length=30):
        message = "context_length = 30 tokens, got 31 for a cache that holds 0"
        with pytest.raises(RuntimeError, match=message):
            model(tokens(1, 31), past_key_values=cache)
        assert not cache.get_seq_length()
        model(tokens(1, 25), past_key_values=cache)
        with pytest.raises(RuntimeError, match="got 6 for a cache that holds 25"):
            model(tokens(1, 6), past_key_values=cache)
        model(tokens(1, 5), past_key_values=cache)
        assert cache.layers[1].to_dense()[2].tolist() == [[15, 15]]


def test_chunks_at_wrong_positions() -> None:
    model, press, cache = tiny_model(), MoERouterPress(), DynamicCache()
    message = r"positions below 10 .* got 29: some versions of transformers .*prefill_in_chunks"
    where = torch.arange(20, 30)[None]
    with (
        pytest.raises(RuntimeError, match=message),
        torch.no_grad(),
        press(model, context_length=30),
    ):
        model(tokens(1, 10), past_key_values=cache, position_ids=where)
    assert not cache.get_seq_length()


def test_chunks_at_wrong_positions_and_decoding() -> None:
    """As ``generate(prefill_chunk_size=20)`` of some versions numbers a prompt of 50."""
    model, cache = tiny_model(), DynamicCache()
    press = MoERouterPress(decoding=DecodingConfig(target=16, interval=4))
    message = "expected positions below {} for the last of {} tokens, got {}"
    with torch.no_grad(), press(model):
        with pytest.raises(RuntimeError, match=message.format(20, 20, 49)):
            model(tokens(1, 20), past_key_values=cache, position_ids=torch.arange(30, 50)[None])
        assert not cache.get_seq_length()
        model(tokens(1, 20), past_key_values=cache)
        before = held(cache)
        with pytest.raises(RuntimeError, match=message.format(40, 40, 49)):
            model(tokens(1, 20), past_key_values=cache, position_ids=torch.arange(30, 50)[None])
    assert_same(cache, before)
    assert not num_hooks(model)


def test_static_cache_that_is_too_small() -> None:
    model, press = tiny_model(), MoERouterPress(0.5)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH - 1)
    message = "static cache of at least 40 slots, got 39, of which 0 are filled, and 40 more"
    refuse(ValueError, message, model, press, cache)
    cache, place = StaticCache(config=model.config, max_cache_len=LENGTH), LENGTH
    message = "static cache of at least 41 slots, got 40, of which 40 are filled, and 1 more"
    with torch.no_grad(), press(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            for place in range(LENGTH, 2 * LENGTH):
                where = torch.tensor([place])
                model(tokens(1, 1), past_key_values=cache, cache_position=where)
    assert place == LENGTH + LENGTH // 2  # half of the slots were free again
    assert int(cache.layers[0].get_seq_length()) == place


def test_arguments_of_prefill_in_chunks() -> None:
    model, press = tiny_model(), MoERouterPress()
    with pytest.raises(ValueError, match="chunk_size an integer >= 1, got 0"):
        prefill_in_chunks(press, model, tokens(1, LENGTH), chunk_size=0)
    for other in (
        MoERouterPress(budget="model", streaming=True),
        MoERouterPress(policy="dominant"),
    ):
        with pytest.raises(ValueError, match="streaming=False, .* and policy 'mixture', got"):
            prefill_in_chunks(other, model, tokens(1, LENGTH), chunk_size=9)
    for shape in ((2, LENGTH - 1), (1, LENGTH), (2, 1), (LENGTH,), (2, 1, LENGTH)):
        message = f"attention_mask .2, {LENGTH}. for these input_ids, got"
        with pytest.raises(ValueError, match=message):
            mask = torch.ones(shape, dtype=torch.long)
            ids = tokens(2, LENGTH)
            prefill_in_chunks(press, model, ids, chunk_size=9, attention_mask=mask)
    full = prefill(model, tokens(1, LENGTH))
    with pytest.raises(ValueError, match="empty cache, got one that holds 40"):
        prefill_in_chunks(press, model, tokens(1, LENGTH), chunk_size=9, past_key_values=full)
    assert press == MoERouterPress()
    assert_untouched(model, press, full)


def test_eager_attention_and_chunks() -> None:
    model, press, cache = tiny_model(attention="eager"), MoERouterPress(), DynamicCache()
    message = "for a prompt in chunks, got 'eager'"
    with pytest.raises(ValueError, match=message), press(model, context_length=LENGTH):
        model(tokens(1, 10), past_key_values=cache)
    assert not cache.layers

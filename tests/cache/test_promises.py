"""What a `DynamicCache` promises, a compressed one keeps: views, gradients, memory, softcaps."""

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from random_router import random_router
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from whole_caches import keep_all

from moekv import DecodingConfig, MoERouterPress
from moekv.cache.caches import num_rows
from moekv.cache.ragged import RaggedLayer

LENGTH = 30
BUDGETS = ["uniform", "model"]


def compressed(model: PreTrainedModel, budget: str, batch: int = 1) -> DynamicCache:
    with MoERouterPress(0.3, router=None, budget=budget)(model):
        return prefill(model, tokens(batch, LENGTH))


def feed(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, begin: int) -> Tensor:
    position = torch.arange(begin, begin + ids.shape[1])[None]
    with torch.no_grad():
        return model(ids, past_key_values=cache, position_ids=position).logits


def snapshot(cache: DynamicCache) -> list[tuple[Any, Any]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def restore(cache: DynamicCache, pairs: list[tuple[Any, Any]]) -> None:
    for layer, (keys, values) in zip(cache.layers, pairs, strict=True):
        layer.keys, layer.values = keys, values


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("others", [0, 3, 6, 9])
def test_pairs_that_are_put_back_after_a_crop(budget: str, others: int) -> None:
    """Whatever was fed meanwhile in their place: fewer tokens, as many, more."""
    model, query = tiny_model(), tokens(1, 1, 5)
    cache = compressed(model, budget)
    feed(model, cache, tokens(1, 6, 1), LENGTH)
    before = snapshot(cache)
    expected = feed(model, copy.deepcopy(cache), query, LENGTH + 6)
    cache.crop(LENGTH)
    if others:
        feed(model, cache, tokens(1, others, 2), LENGTH)
    restore(cache, before)
    assert cache.get_seq_length() == LENGTH + 6
    assert torch.equal(feed(model, cache, query, LENGTH + 6), expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_pairs_before_a_crop_are_not_written_over(budget: str) -> None:
    model = tiny_model()
    cache = compressed(model, budget)
    feed(model, cache, tokens(1, 6, 1), LENGTH)
    layer = cache.layers[0]
    view = layer.tail_keys if isinstance(layer, RaggedLayer) else layer.keys
    before = view.clone()
    cache.crop(LENGTH + 2)
    feed(model, cache, tokens(1, 7, 2), LENGTH + 2)
    assert torch.equal(view, before)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("grows", [False, True])
def test_shallow_copies_of_layers_go_on_by_themselves(budget: str, grows: bool) -> None:
    """As transformers' layers do, which write into new memory."""
    model = tiny_model()
    press = noting(model, budget) if grows else MoERouterPress(0.3, router=None, budget=budget)
    with press(model):
        cache = prefill(model, tokens(1, LENGTH))
    with press(model) if grows else contextlib.nullcontext():
        feed(model, cache, tokens(1, 3, 1), LENGTH)
    fork = DynamicCache()
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    alone = copy.deepcopy(cache)
    for seed in (2, 3):
        with press(model) if grows else contextlib.nullcontext():
            for i in range(40 if grows else 4):  # which compresses
                feed(model, cache, tokens(1, 1, seed + i), cache.get_seq_length())
        ids = tokens(1, 2, 7 * seed)
        expected = feed(model, alone, ids, alone.get_seq_length())
        assert torch.equal(feed(model, fork, ids, fork.get_seq_length()), expected)
    if grows:
        for one, other in zip(fork.layers, alone.layers, strict=True):
            assert torch.equal(one.recent.states(9), other.recent.states(9))
            notes = [layer.notes.held_pairs()[0] for layer in (one, other)]
            assert torch.equal(*notes)


def noting(model: Any, budget: str) -> MoERouterPress:
    """Make a press whose calibrated router notes what it reads of tokens."""
    router = random_router(model)
    return MoERouterPress(0.3, router=router, budget=budget, decoding=DecodingConfig(60, 2))


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_was_noted_of_other_tokens_goes_with_them(budget: str) -> None:
    """A calibrated router does not take them for those that are put back."""
    model = tiny_model()
    with noting(model, budget)(model):
        cache = prefill(model, tokens(1, LENGTH))
        feed(model, cache, tokens(1, 1, 1), LENGTH)
        before = snapshot(cache)
        cache.crop(LENGTH)
        feed(model, cache, tokens(1, 1, 2), LENGTH)
        assert all(layer.whole_notes() is not None for layer in cache.layers)
        restore(cache, before)
        assert all(layer.whole_notes() is None for layer in cache.layers)
        with pytest.raises(RuntimeError, match="all been fed in a block"):
            feed(model, cache, tokens(1, 1, 3), LENGTH + 1)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_crop_by_slices_keeps_notes(budget: str) -> None:
    model = tiny_model()
    with noting(model, budget)(model):
        cache = prefill(model, tokens(1, LENGTH))
        for step in range(3):
            feed(model, cache, tokens(1, 1, step), LENGTH + step)
        both = [(x.keys[:, :, : LENGTH + 1], x.values[:, :, : LENGTH + 1]) for x in cache.layers]
        restore(cache, both)
        assert cache.get_seq_length() == LENGTH + 1
        feed(model, cache, tokens(1, 1, 3), LENGTH + 1)
        assert all(layer.whole_notes() is not None for layer in cache.layers)


# --- gradients ------------------------------------------------------------------------------------


def gradients(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, cuts: list[int]) -> Any:
    model.zero_grad()
    logits = []
    for part in ids.split(cuts, 1):
        begin = cache.get_seq_length()
        position = torch.arange(begin, begin + part.shape[1])[None]
        logits.append(model(part, past_key_values=cache, position_ids=position).logits)
    torch.cat(logits, 1).log_softmax(-1)[..., 7].mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("cuts", [[6], [1, 1, 4], [3, 3]], ids=str)
def test_tokens_behind_a_compressed_context_get_their_gradients(
    budget: str, cuts: list[int]
) -> None:
    model, ids = tiny_model(), tokens(2, 6, 1)
    everything = MoERouterPress(0.0, router=None, budget=budget, decoding=DecodingConfig(200, 4))
    expected = gradients(model, prefill(model, tokens(2, LENGTH)), ids, cuts)
    with everything(model):
        cache = prefill(model, tokens(2, LENGTH))
    if budget == "model":
        cache = prefill(model, tokens(2, LENGTH))
        keep_all(cache, ragged=True)
    got = gradients(model, cache, ids, cuts)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)
    # Generation goes on, and holds no graph.
    feed(model, cache, tokens(2, 1, 3), LENGTH + 6)
    layer = cache.layers[0]
    last = layer.tail_keys if isinstance(layer, RaggedLayer) else layer.keys
    assert not last.requires_grad


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rows", [[1, 0], [True, False], [-1]], ids=str)
def test_rows_are_named_as_in_a_dynamic_cache(budget: str, rows: list[Any]) -> None:
    """By lists as by tensors: integers from either end, or a mask."""
    model = tiny_model()
    cache = compressed(model, budget, batch=2)
    other = copy.deepcopy(cache)
    cache.batch_select_indices(rows)
    other.batch_select_indices(torch.arange(2)[rows])
    query = tokens(other.layers[0].batch_size, 1, 5)
    assert torch.equal(feed(model, cache, query, LENGTH), feed(model, other, query, LENGTH))


# --- memory ---------------------------------------------------------------------------------------


def num_bytes(cache: DynamicCache) -> int:
    return sum(layer.nbytes for layer in cache.layers)


@pytest.mark.parametrize("budget", ["uniform", "head", "model"])
def test_rows_that_are_not_selected_give_their_memory_back(budget: str) -> None:
    model = tiny_model()
    cache = compressed(model, budget, batch=6)
    alone = copy.deepcopy(cache)
    before = num_bytes(cache)
    cache.batch_select_indices(torch.tensor([4, 1, 4]))
    assert num_bytes(cache) < before * 0.6
    alone.reorder_cache(torch.tensor([4, 1, 4]))
    got = feed(model, cache, tokens(3, 2, 1), LENGTH)
    assert torch.equal(got, feed(model, alone, tokens(3, 2, 1), LENGTH))


def test_rows_that_share_pairs_go_on_sharing_them() -> None:
    model = tiny_model()
    cache = compressed(model, "model", batch=3)
    cache.batch_repeat_interleave(4)
    shared = sum(layer.stored_keys.numel() for layer in cache.layers)
    cache.batch_select_indices(torch.arange(4, 8))
    assert sum(layer.stored_keys.numel() for layer in cache.layers) <= shared * 0.5
    cache.batch_select_indices(torch.tensor([], dtype=torch.int64))
    assert sum(layer.stored_keys.numel() for layer in cache.layers) == 0


# --- a text that is continued in several rows -----------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])  # and layers with sliding windows
def test_several_answers_from_one_filled_cache(budget: str, grows: bool, name: str) -> None:
    """``generate(num_return_sequences=...)`` repeats the tokens, and not the cache."""
    decoding = DecodingConfig(20, 4) if grows else None
    said = []
    for by_hand in (True, False):
        model = tiny_model(name)
        press = MoERouterPress(0.3, router=None, budget=budget, decoding=decoding)
        with press(model):
            cache = prefill(model, tokens(1, LENGTH))
        if by_hand:
            cache.batch_repeat_interleave(3)
        prompt = torch.cat([tokens(1, LENGTH), tokens(1, 2, 7)], 1)
        rows = prompt.repeat(3, 1) if by_hand else prompt
        torch.manual_seed(0)
        with press(model) if grows else contextlib.nullcontext():
            said.append(
                model.generate(
                    rows,
                    past_key_values=cache,
                    do_sample=True,
                    max_new_tokens=9,
                    num_return_sequences=1 if by_hand else 3,
                )
            )
        assert num_rows(cache) == 3
    assert torch.equal(*said)
    assert len({tuple(row.tolist()) for row in said[0]}) > 1


def test_rows_of_a_filled_cache_with_sliding_windows_that_are_not_repeated() -> None:
    model = tiny_model("gpt_oss")
    with MoERouterPress(0.3)(model):
        cache = prefill(model, tokens(2, LENGTH))
    held = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(ValueError, match=r"of 2 rows for this cache, got 4; .*interleave\(2\)"):
        feed(model, cache, tokens(4, 1), LENGTH)
    assert [layer.get_seq_length() for layer in cache.layers] == held


# --- what an attention function leaves out --------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_decoding_leaves_out_what_the_models_attention_leaves_out(ragged: bool, count: int) -> None:
    model, ids = tiny_model("gemma2"), tokens(1, count, 1)
    cache = prefill(model, tokens(1, 14))
    expected = feed(model, copy.deepcopy(cache), ids, 14)
    full = [cache.layers[0], cache.layers[2]]  # the other one has a sliding window
    part = DynamicCache()
    part.layers = full
    keep_all(part, ragged)
    cache.layers[0], cache.layers[2] = part.layers
    torch.testing.assert_close(feed(model, cache, ids, 14), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", ["uniform", "model", "static"])
def test_layers_out_of_a_pickle_are_served_where_none_was_made(
    budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in another process, whose attention functions nobody has wrapped so far."""
    model, ids, static = tiny_model(), tokens(1, 40), budget == "static"
    cache: Any = StaticCache(model.config, max_cache_len=60) if static else DynamicCache()
    press = MoERouterPress(0.5, budget="uniform" if static else budget, router=None)
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
    written = pickle.dumps(cache.layers)
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    while hasattr(plain, "__wrapped__"):
        plain = plain.__wrapped__
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", plain)
    read = copy.copy(cache)
    read.layers = pickle.loads(written)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].serves_compressed_layers
    with torch.no_grad():
        found, expected = (
            model(tokens(1, 1), past_key_values=each).logits for each in (read, cache)
        )
    assert torch.equal(found, expected)

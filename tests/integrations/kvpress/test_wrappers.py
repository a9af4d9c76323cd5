"""What kvpress's wrappers get from a press, and what the press says of what they did."""

import copy
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress import AdaKVPress, CAMPress, ChunkPress, DecodingPress, DMSPress, MergingPress
from quantized import IdentityLayer
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache
from wrapping import CUTTING, DECODING, MASKING

from moekv import MoERouterPress, ragged
from moekv.cache.ragged import RaggedLayer
from moekv.experts.builder import ViewBuilder
from moekv.integrations.kvpress.wrappers import as_attention

LENGTH = 80


@pytest.fixture(autouse=True)
def masks_that_any_query_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kvpress hide keys behind random queries, too, for which it may find no direction."""
    monkeypatch.setattr("kvpress.attention_patch.search_hyperplane", lambda x: x.mean(1) * -1e5)


class Spy(MoERouterPress):
    """Remembers its scores."""

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        scores = super().score(*args, **kwargs)
        self._scores = [*getattr(self, "_scores", []), scores.clone()]
        return scores


def pairs_seen(model: Any, cache: DynamicCache) -> int:
    """Pairs that attention still sees, counted from outside."""
    count = 0
    for module, layer in zip((x.self_attn for x in model.model.layers), cache.layers, strict=True):
        masked = getattr(module, "masked_key_indices", None)
        count += layer.keys.shape[:3].numel() - (0 if masked is None else len(masked[0]))
    return count


def steps(model: Any, cache: Cache, count: int, batch: int = 1) -> Iterator[int]:
    for step in range(count):
        model(tokens(batch, 1, seed=step), past_key_values=cache)
        yield step


# --- Scores ---------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=40),
    st.lists(st.sampled_from([-40.0, -3.0, -1.0, 0.0, 0.5]), min_size=40, max_size=40),
)
def test_attention_of_an_order_has_that_order(scores: list[float], expected: list[float]) -> None:
    """Ties among scores fall to the first pair; ties among attention change no order."""
    order = torch.tensor(scores)[None, None]
    known = torch.tensor(expected[: len(scores)])[None, None]
    for attention in (as_attention(order, known), as_attention(order, None)):
        assert (attention > 0).all() and attention.isfinite().all()
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        best_first = attention[0, 0, ranked]
        assert (best_first.diff() < 0).all()
    attention = as_attention(order, known)[0, 0, ranked]
    torch.testing.assert_close(attention, known[0, 0].exp().sort(descending=True).values)


def test_attention_of_an_order_that_nobody_has_an_expectation_of() -> None:
    scores, expected = torch.randn(2, 3, 50), torch.randn(2, 3, 50)
    expected[1, 2, 7] = torch.nan
    attention = as_attention(scores, expected)
    assert attention[1, 2].sum() == pytest.approx(1)
    weights = 1 / torch.arange(1, 51)
    torch.testing.assert_close(
        attention[1, 2].sort(descending=True).values, weights / weights.sum()
    )
    assert torch.equal(attention[0], as_attention(scores, expected.nan_to_num())[0])


def test_padded_rows_get_the_attention_that_they_get_alone() -> None:
    scores, expected = torch.randn(2, 3, 50), torch.randn(2, 3, 50) - 3
    start = torch.tensor([0, 20], dtype=torch.int32)
    scores[1, :, :20], expected[1, :, :20] = -9, 0
    for known in (expected, None):
        attention = as_attention(scores, known, start)
        alone = as_attention(scores[1:, :, 20:], None if known is None else known[1:, :, 20:])
        torch.testing.assert_close(attention[1:, :, 20:], alone)
        assert (attention[1, :, :20] < alone.amin()).all() and (attention > 0).all()


@pytest.mark.parametrize("options", [{}, {"num_experts": 4}, {"policy": "dominant"}])
def test_scores_are_what_pairs_of_that_rank_can_expect(options: dict[str, Any]) -> None:
    model, press = tiny_model(), Spy(0.5, **options)
    with AdaKVPress(press)(model):
        cache = prefill(model, tokens(2, LENGTH))
    seen: list[Tensor] = []
    hook = ViewBuilder.__call__

    def look(self: ViewBuilder, *args: Any, **kwargs: Any) -> Any:
        view = hook(self, *args, **kwargs)
        seen.append(view.expected().exp())
        return view

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViewBuilder, "__call__", look)
        with AdaKVPress(MoERouterPress(0.5))(model):
            prefill(model, tokens(2, LENGTH))
    assert len(cache) == len(seen) == len(press._scores) == 2
    for scores, expected in zip(press._scores, seen, strict=True):
        assert scores.shape == expected.shape and (scores > 0).all()
        torch.testing.assert_close(scores.sort(-1).values, expected.sort(-1).values)
        if "policy" not in options:
            best = scores.argsort(dim=-1, descending=True)
            assert (best[..., :4] == torch.arange(4)).all()
            assert (best[..., 4:20] == torch.arange(LENGTH - 1, LENGTH - 17, -1)).all()


def test_scores_of_decoded_tokens_are_attention_among_all_pairs() -> None:
    """What a token asks, at the place behind the last one, falls on itself and on all others."""
    model, press = tiny_model(), Spy(0.5)
    keys, states = [], []
    module = model.model.layers[0].self_attn
    with torch.no_grad(), DMSPress(press, threshold=0.0, decoding=True)(model):
        cache = prefill(model, tokens(1, LENGTH))
        hook = module.register_forward_pre_hook(
            lambda *call: states.append(call[2]["hidden_states"]), with_kwargs=True
        )
        for _ in steps(model, cache, 3):
            keys.append(cache.layers[0].keys.clone())
        hook.remove()
    for step, scores in enumerate(press._scores[2::2]):
        assert scores.shape == (1, 2, 1)
        position = torch.tensor([[LENGTH + step + 1]])
        cos, sin = model.model.rotary_emb(keys[step], position)
        query = module.q_proj(states[step]).view(1, 4, 1, 16).detach()
        left, right = query.chunk(2, -1)
        query = query * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]
        logits = query @ keys[step].repeat_interleave(2, 1).mT * module.scaling
        attention = logits.softmax(-1)[..., -1].view(1, 2, 2).square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(scores, attention, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("fed", [1, 6])
def test_decoded_tokens_leave_by_their_scores(fed: int) -> None:
    """DMS's window protects the last of them, and nothing else does."""
    model, press = tiny_model(), Spy(0.5)
    wrapper = DMSPress(press, threshold=0.02, sliding_window_size=8, decoding=True)
    with torch.no_grad(), wrapper(model):
        cache = prefill(model, tokens(1, LENGTH))
        for step in range(24 // fed):
            model(tokens(1, fed, seed=step), past_key_values=cache)
    length = LENGTH + 24
    for index, layer in enumerate(model.model.layers):
        scores = torch.cat(press._scores[index::2], -1)
        assert scores.shape[2] == length
        low = scores < 0.02
        low[..., -8:] = False
        masked = torch.zeros_like(low)
        masked[tuple(layer.self_attn.masked_key_indices)] = True
        assert torch.equal(masked, low)
        assert low[..., LENGTH:].any() and not low[..., LENGTH:-8].all()
    ratio = 1 - pairs_seen(model, cache) / (2 * 2 * length)
    assert press.get_stats()["compression"]["ratio"] == pytest.approx(ratio)


# --- Statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUTTING | MASKING)
def test_the_ratio_is_that_of_the_pairs_that_left(name: str) -> None:
    model, press, cache = tiny_model(), MoERouterPress(0.6), DynamicCache()
    with torch.no_grad(), (CUTTING | MASKING)[name](press)(model):
        model(tokens(2, LENGTH), past_key_values=cache)
        inside = press.get_stats()["compression"]
        seen = pairs_seen(model, cache)
        list(steps(model, cache, 3, batch=2))
    found = press.get_stats()["compression"]
    assert found == inside
    pair = 2 * 16 * 4  # key and value
    assert found["bytes_before"] == 2 * 2 * 2 * LENGTH * pair
    assert found["ratio"] == pytest.approx(1 - seen / (2 * 2 * 2 * LENGTH)) and found["ratio"] > 0.1
    if name in CUTTING:
        assert found["bytes_after"] == seen * pair
    else:
        assert found["bytes_freed"] == 0  # masked is not freed
    assert not press._outcomes._pending


@pytest.mark.parametrize("name", DECODING)
def test_pairs_that_leave_while_decoding_count_once(name: str) -> None:
    model, press, cache = tiny_model(), MoERouterPress(), DynamicCache()
    with torch.no_grad(), DECODING[name](press)(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        list(steps(model, cache, 12))
    assert [layer.keys.shape[2] for layer in cache.layers] == [24, 24]
    if name == "CAMPress":  # DecodingPress has the press itself cut, each time by itself
        ratio = press.get_stats()["compression"]["ratio"]
        assert ratio == pytest.approx(1 - 24 / (LENGTH + 12))


def test_masks_that_are_set_again_count_once() -> None:
    model, press, cache = tiny_model(), MoERouterPress(), DynamicCache()
    wrapper = DecodingPress(AdaKVPress(press), compression_interval=4, target_size=24)
    with torch.no_grad(), wrapper(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        list(steps(model, cache, 12))
    ratio = 1 - pairs_seen(model, cache) / (2 * 2 * (LENGTH + 12))
    assert press.get_stats()["compression"]["ratio"] == pytest.approx(ratio)


def test_what_ragged_frees_of_a_wrapper_is_counted() -> None:
    model, press, cache = tiny_model(), MoERouterPress(0.5), DynamicCache()
    with torch.no_grad(), ragged(AdaKVPress(press))(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    assert all(isinstance(layer, RaggedLayer) for layer in cache.layers)
    found = press.get_stats()["compression"]
    assert found["ratio"] == 0.5
    assert found["bytes_after"] == sum(layer.nbytes for layer in cache.layers)


def test_two_contexts_are_two_counts() -> None:
    model, press = tiny_model(), MoERouterPress(0.5)
    with torch.no_grad(), ChunkPress(press, chunk_length=32)(model):
        for length in (64, 32):
            prefill(model, tokens(1, length))
    found = press.get_stats()["compression"]
    assert found["ratio"] == 0.5 and found["bytes_before"] == 2 * 2 * 96 * 2 * 16 * 4
    press.reset_stats()
    assert press.get_stats()["compression"]["bytes_before"] == 0


class Quantized(QuantizedCache):
    """One that needs no quantisation library."""

    def __init__(self) -> None:
        Cache.__init__(self, layer_class_to_replicate=IdentityLayer)


def test_a_quantised_cache_is_counted_too() -> None:
    model, press, cache = tiny_model(), MoERouterPress(0.5), Quantized()
    with torch.no_grad(), MergingPress(press)(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        list(steps(model, cache, 2))
    assert press.get_stats()["compression"]["ratio"] == 0.5


def test_nothing_is_held_when_the_block_is_over() -> None:
    model, press, cache = tiny_model(), MoERouterPress(0.5), DynamicCache()
    with torch.no_grad(), MASKING["CriticalAdaKVPress"](press)(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    gone = weakref.ref(cache)
    del cache
    assert gone() is None
    for twin in (copy.deepcopy(press), pickle.loads(pickle.dumps(press))):
        assert twin.get_stats()["compression"] == press.get_stats()["compression"]


def test_cam_scores_pairs_whose_tokens_are_gone() -> None:
    """Nobody knows what they can expect: their rank decides alone."""
    model, press, cache = tiny_model(), Spy(), DynamicCache()
    with torch.no_grad(), CAMPress(press, compression_interval=4, target_size=24)(model):
        model(tokens(1, LENGTH), past_key_values=cache)
        list(steps(model, cache, 4))
    assert len(press._scores) == 2
    for scores in press._scores:
        assert scores.shape == (1, 2, LENGTH + 4)
        torch.testing.assert_close(scores.sum(-1), torch.ones(1, 2))

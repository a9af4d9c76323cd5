"""Calibrated routers where a cache is compressed more than once: what they note of its pairs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from growth_cases import BUDGETS, assert_average
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_reference import Lockstep
from random_router import random_router
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache

from moekv import (
    CalibratedRouter,
    DecodingConfig,
    MoERouterPress,
    load_cache,
    prefill_in_chunks,
    save_cache,
)
from moekv.budget import DENSE
from moekv.cache.ragged import RaggedLayer
from moekv.ops import ScoreKind
from moekv.press.rater import Rater


def even_router(model: Any, **options: Any) -> CalibratedRouter:
    """All experts have the same say, whatever the token: a mean of gates is the gate."""
    router = random_router(model, top_k=3, **options)
    router.gate_weight.zero_()
    router.gate_bias.zero_()
    return router


def make_press(router: CalibratedRouter, ratio: float = 0.0, **options: Any) -> MoERouterPress:
    options = {"sinks": 2, "recent": 4, "window": 7} | options
    return MoERouterPress(ratio, router=router, **options)


class Watched(Lockstep):
    """Remembers every attention layer's inputs, and looks at the notes after each forward."""

    def __init__(self, router: CalibratedRouter, **options: Any) -> None:
        super().__init__(**options)
        self.router, batch = router, len(self.padding)
        self.inputs = [torch.empty(batch, 0, 64) for _ in self.model.model.layers]
        for layer in self.model.model.layers:
            layer.self_attn.register_forward_pre_hook(self.remember, with_kwargs=True)

    def remember(self, module: Any, args: Any, kwargs: Any) -> None:
        parts = [self.inputs[module.layer_idx], kwargs["hidden_states"]]
        self.inputs[module.layer_idx] = torch.cat(parts, dim=1)

    def feed(self, input_ids: Tensor) -> Tensor:
        logits = super().feed(input_ids)
        self.check()
        return logits

    def crop(self, count: int) -> None:
        super().crop(count)
        self.inputs = [x[:, : self.length] for x in self.inputs]
        self.check()

    def select(self, rows: list[int], how: str = "reorder_cache") -> None:
        super().select(rows, how)
        self.inputs = [x[rows] for x in self.inputs]
        self.check()

    def repeat(self, times: int) -> None:
        super().repeat(times)
        self.inputs = [x.repeat_interleave(times, dim=0) for x in self.inputs]
        self.check()

    def check(self) -> None:
        """The notes are what the router reads of the tokens whose pairs are there."""
        for index, layer in enumerate(self.cache.layers):
            notes = layer.whole_notes()
            assert type(notes) is type(layer)
            if isinstance(notes, RaggedLayer):
                reads, places, _ = notes.to_dense()
            else:
                reads, places = notes.keys, notes.values
            expected = self.router.read(index, self.router.project(index, self.inputs[index]))
            for b, h in torch.cartesian_prod(*map(torch.arange, reads.shape[:2])).tolist():
                there = self.visible[index][b, h].nonzero()[:, 0]
                skip = reads.shape[2] - len(there)
                # A dense layer holds padding, too.
                assert places[b, h, skip:, 0].tolist() == there.tolist()
                torch.testing.assert_close(
                    reads[b, h, skip:, 0], expected[b, h, there], atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("padding", [(0,), (0, 9, 22)], ids=["one", "padded"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_cache_never_exceeds_its_budget_and_notes_stay_beside_their_pairs(
    budget: str, padding: tuple[int, ...], streaming: bool
) -> None:
    if streaming and budget == "layer":
        pytest.skip("which are refused together")
    target, interval, batch, length = 14, 5, len(padding), 30
    router = random_router(tiny_model())
    both = Watched(router, padding=padding)
    press = make_press(
        router,
        0.4,
        budget=budget,
        decoding=DecodingConfig(target, interval),
        streaming=streaming,
    )
    expected = torch.tensor([min(target, int((length - p) * 0.6)) for p in padding])
    compressions = 0
    with press(both.model):
        both.feed(tokens(batch, length))
        assert_average(both.pairs(), expected, budget)
        for step in range(23):
            both.feed(tokens(batch, 1, seed=step))
            expected = expected + 1
            full = expected >= target + interval  # each row by itself
            compressions += bool(full.any())
            expected = expected.where(~full, target)
            assert_average(both.pairs(), expected, budget)
    assert compressions >= 4
    assert press.get_stats()["router"] == "calibrated for a tiny model"


STEPS = st.one_of(
    st.tuples(st.just("feed"), st.integers(1, 6)),
    st.tuples(st.just("crop"), st.integers(1, 4)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.just(2)),
)


@settings(max_examples=40)
@given(
    budget=st.sampled_from(BUDGETS),
    padding=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    padded=st.booleans(),
    ratio=st.sampled_from([0.0, 0.5]),
    steps=st.lists(STEPS, min_size=3, max_size=9),
)
def test_notes_stay_beside_their_pairs_in_any_life(
    budget: str, padding: list[int], padded: bool, ratio: float, steps: list[tuple[str, Any]]
) -> None:
    router = random_router(tiny_model())
    both = Watched(router, padding=tuple(n * padded for n in padding))
    press = make_press(router, ratio, budget=budget, decoding=DecodingConfig(12, 5))
    with press(both.model):
        both.feed(tokens(len(padding), 24))
        for serial, (step, argument) in enumerate([*steps, ("feed", 6), ("feed", 6)]):
            batch = len(both.padding)
            if step == "feed":
                both.feed(tokens(batch, argument, seed=serial))
            elif step == "crop" and argument <= uncompressed(both.cache):
                both.crop(argument)
            elif step == "select":
                rows = [row % batch for row in argument]
                both.select(rows, how="batch_select_indices")
            elif step == "repeat" and batch < 3:
                both.repeat(argument)
    assert_average(both.pairs(), both.pairs().float().mean((0, 2)).long().clamp(max=16), budget)


def uncompressed(cache: DynamicCache) -> int:
    """Tokens that can be cropped from every layer."""
    return min(
        x.tail_length if isinstance(x, RaggedLayer) else x.get_seq_length() - x.context_length
        for x in cache.layers
    )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("padding", [(0,), (0, 5)])
def test_what_stays_of_a_prompt_in_chunks_is_noted(budget: str, padding: tuple[int, ...]) -> None:
    router = random_router(tiny_model())
    both = Watched(router, padding=padding)
    kept = torch.tensor([int((48 - p) * 0.25) for p in padding])
    with make_press(router, 0.75, budget=budget)(both.model, context_length=48):
        for part in tokens(len(padding), 48).split(11, dim=1):
            both.feed(part)
    assert_average(both.pairs(), kept, budget)


LASTING = ("semantic", "temporal")
"""Experts that need no hidden states: growing caches have to do without the others."""


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("padding", [(0,), (0, 12)])
def test_one_chunk_keeps_what_one_forward_keeps(budget: str, padding: tuple[int, ...]) -> None:
    check_chunks(random_router(tiny_model()), 60, budget, padding)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("padding", [(0,), (0, 12)])
def test_two_chunks_keep_what_one_forward_keeps(budget: str, padding: tuple[int, ...]) -> None:
    """Of which half stays, with gates that are even."""
    check_chunks(even_router(tiny_model(), experts=LASTING), 30, budget, padding)


def check_chunks(
    router: CalibratedRouter, chunk: int, budget: str, padding: tuple[int, ...]
) -> None:
    model, ids = tiny_model(), tokens(len(padding), 60)
    mask = (torch.arange(60) >= torch.tensor(padding)[:, None]).long()
    with make_press(router, 0.4, budget=budget)(model):
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        whole = prefill(model, ids, attention_mask=mask, position_ids=position_ids)
    press = make_press(router, 0.4, budget=budget)
    cache = prefill_in_chunks(
        press, model, ids, chunk_size=chunk, attention_mask=mask
    ).past_key_values
    assert press.get_stats()["router"] == "calibrated for a tiny model"
    for one, other in zip(whole.layers, cache.layers, strict=True):
        keys = one.stored_keys if isinstance(one, RaggedLayer) else one.keys.flatten(0, 2)
        torch.testing.assert_close(other.stored_keys, keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_decoding_keeps_what_a_prefill_of_all_tokens_keeps(budget: str) -> None:
    """Nothing has left before: 40 tokens and 5, of which 20 stay."""
    model, ids = tiny_model(), tokens(2, 45)
    router = even_router(model, experts=LASTING)
    with make_press(router, 25 / 45, budget=budget)(model):
        whole = prefill(model, ids)
    press, cache = make_press(router, budget=budget, decoding=DecodingConfig(40, 5)), DynamicCache()
    with press(model), torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        press.decoding = DecodingConfig(20, 25)
        for i in range(40, 45):
            model(ids[:, i : i + 1], past_key_values=cache)
    for one, other in zip(whole.layers, cache.layers, strict=True):
        assert type(one) is type(other)
        ragged = isinstance(one, RaggedLayer)
        keys = (x.to_dense()[0] if ragged else x.keys for x in (one, other))
        torch.testing.assert_close(*keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_each_head_has_its_own_weights_where_heads_differ_in_length(
    budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    router, seen = even_router(model), []
    mix = Rater._mix

    def spy(self: Any, looks: Any, scores: Tensor, *rest: Any, **options: Any) -> Any:
        part, given = mix(self, looks, scores, *rest, **options)
        view = looks[0].view
        notes = None if view.notes is None else [x.clone() for x in view.notes]
        seen.append((view, notes, scores, part.scores[0], view.scores_of(ScoreKind.DIVERSITY)))
        return part, given

    monkeypatch.setattr(Rater, "_mix", spy)
    press = make_press(router, 0.5, budget=budget, decoding=DecodingConfig(14, 4))
    cache = DynamicCache()
    with press(model), torch.no_grad():
        model(tokens(2, 30), past_key_values=cache)
        for _ in range(6):
            seen.clear()
            model(tokens(2, 1), past_key_values=cache)
            if seen:
                break
    # Rows are rated together where their heads are as long in one way.
    assert sum(len(view.keys) * view.keys.shape[1] for view, *_ in seen) == 2 * 2 * 2
    assert any(view.folded == 2 for view, *_ in seen) == (budget not in DENSE)
    for view, notes, scores, mixed, unlike in seen:
        layer, folded = view.module.layer_idx, view.folded
        reads, positions = (x.view(-1, 2, x.shape[-1]) for x in notes)
        scores = scores.view(3, -1, 2, scores.shape[-1])
        mixed, unlike = (x.view(-1, 2, x.shape[-1]) for x in (mixed, unlike))
        assert (positions[..., -1] == positions.max()).all()
        for head in range(2):
            position, read = positions[:, head], reads[:, head]
            age = positions.max() - position
            where = (1 + age).log(), (1 + age / 128).log(), (1 + position).log()
            place = router.surrogate_place[layer, head]
            learned = read + sum(p * x for p, x in zip(place, where, strict=True))
            learned += router.surrogate_novelty[layer, head] * unlike[:, head]
            # Hidden states are gone, and with them the say of `expected`.
            gain, offset = (x[layer, :, head] for x in (router.gain, router.offset))
            wanted = gain[0] * learned + offset[0]
            wanted = (wanted + gain[2] * scores[2, :, head] + offset[2]) / 2
            for b in range(len(mixed)):
                real = slice(mixed.shape[2] - view.lengths[b * folded + head * (folded - 1)], None)
                torch.testing.assert_close(scores[0, b, head, real], learned[b, real])
                torch.testing.assert_close(mixed[b, head, real], wanted[b, real])


def test_generate_by_the_defaults() -> None:
    """One threshold over the model, in a second block as in the first."""
    model = tiny_model()
    press = make_press(random_router(model), 0.5, decoding=DecodingConfig(12, 4))
    ids, cache = tokens(2, 40), DynamicCache()
    for _ in range(2):
        with press(model):
            ids = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=15,
                do_sample=False,
            )
    assert ids.shape[1] == 70
    assert sum(sum(x.stored_pairs) + 2 * 2 * x.tail_length for x in cache.layers) <= 16 * 8
    assert len({n for x in cache.layers for n in (x.end - x.begin).flatten().tolist()}) > 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_notes_are_saved_with_their_pairs(budget: str, tmp_path: Path) -> None:
    model = tiny_model()
    router, file = random_router(model), tmp_path / "cache"
    options = {"budget": budget, "decoding": DecodingConfig(14, 5)}
    press, cache = make_press(router, 0.5, **options), DynamicCache()
    with press(model), torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
    save_cache(cache, file, model)
    loaded = load_cache(file, model)
    for layers in zip(cache.layers, loaded.layers, strict=True):
        notes = [layer.whole_notes() for layer in layers]
        parts = (x.to_dense() if isinstance(x, RaggedLayer) else (x.keys, x.values) for x in notes)
        for one, other in zip(*parts, strict=True):
            assert torch.equal(one, other)
    with make_press(router, **options)(model), torch.no_grad():
        for _ in range(6):
            model(tokens(1, 1), past_key_values=loaded)
    dense = budget in DENSE
    held = [x.keys.shape[2] if dense else sum(x.stored_pairs) for x in loaded.layers]
    assert sum(held) < sum(19 if dense else 2 * 15 for _ in held)

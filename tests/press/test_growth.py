"""Caches that are compressed as they grow, against masks on a full cache."""

import math
from typing import Any

import pytest
import torch
from growth_cases import BUDGETS, EXPERTS, Uneven, assert_average, decode, make_press
from masked_reference import Lockstep
from peers import peer
from tiny_models import TINY_MODELS, prefill, tiny_model, tokens
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moekv import (
    DecodingConfig,
    Expert,
    LayerView,
    MoERouterPress,
    PiKVMoERouter,
    load_cache,
    save_cache,
)
from moekv.cache.attention import install
from moekv.cache.growing import GrowingLayer
from moekv.cache.ragged import RaggedLayer
from moekv.ops import ScoreKind


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("padding", [(0,), (0, 0), (0, 9, 22)], ids=["one", "two", "padded"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_growing_cache_never_exceeds_its_budget(
    budget: str, padding: tuple[int, ...], ratio: float
) -> None:
    target, interval = 20, 6
    press = make_press(ratio, budget=budget, decoding=DecodingConfig(target, interval))
    both = Lockstep(padding=padding)
    batch, length = len(padding), 30
    compressions = 0
    with press(both.model):
        both.feed(tokens(batch, length))
        prompt = [min(target, max(1, int((length - p) * (1 - ratio)))) for p in padding]
        expected = torch.tensor(prompt)
        assert_average(both.pairs(), expected, budget)
        for step in range(40):
            both.feed(tokens(batch, 1, seed=step))
            expected = expected + 1
            full = expected >= target + interval  # each row by itself
            compressions += bool(full.any())
            expected = expected.where(~full, target)
            assert_average(both.pairs(), expected, budget)
    assert compressions >= 5
    if budget != "uniform":
        pairs = both.pairs()
        assert len(set(pairs[:, 0].flatten().tolist())) > 1


# SDPA leaves out the softcap of Gemma 2.
@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name != "gemma2"])
@pytest.mark.parametrize("budget", ["uniform", "model"])
@pytest.mark.parametrize("padding", [(0, 0), (0, 4)])
def test_every_attention(name: str, budget: str, padding: tuple[int, ...]) -> None:
    press = make_press(0.5, budget=budget, experts=EXPERTS, decoding=DecodingConfig(16, 5))
    cache = DynamicCache(config=tiny_model(name).config)
    both = Lockstep(name, padding=padding, cache=cache)
    with press(both.model):
        both.feed(tokens(2, 24))
        for step in range(15):
            both.feed(tokens(2, 1, seed=step))
    assert both.pairs().float().mean() < 21


@pytest.mark.parametrize("after", BUDGETS)
@pytest.mark.parametrize("before", BUDGETS)
def test_another_press_goes_on(before: str, after: str) -> None:
    """What one press has compressed, another may compress further, whatever its budget."""
    both = Lockstep(padding=(0, 0))
    with make_press(0.4, budget=before, decoding=DecodingConfig(20, 4))(both.model):
        both.feed(tokens(2, 30))
        for step in range(7):
            both.feed(tokens(2, 1, seed=step))
    assert_average(both.pairs(), torch.tensor([21, 21]), before)
    with make_press(0.4, budget=after, decoding=DecodingConfig(9, 4))(both.model):
        for step in range(6):
            both.feed(tokens(2, 1, seed=step))
        if after == "uniform":
            assert both.pairs().max() <= 13
        else:
            assert_average(both.pairs(), torch.tensor([10, 10]), after)


@pytest.mark.parametrize(
    ("budget", "attention"), [*((budget, "sdpa") for budget in BUDGETS), ("uniform", "eager")]
)
def test_generation_without_end(budget: str, attention: str) -> None:
    """``generate`` does what feeding by hand does."""
    model = tiny_model(attention=attention)
    press = make_press(0.5, budget=budget, experts=EXPERTS, decoding=DecodingConfig(12, 4))
    prompt = tokens(2, 40, seed=1)  # after which no token 0 is generated, whose key is 0 anywhere
    with press(model):
        out = model.generate(
            prompt,
            max_new_tokens=30,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    by_hand = make_press(0.5, budget=budget, experts=EXPERTS, decoding=DecodingConfig(12, 4))
    both = Lockstep(padding=(0, 0))
    with by_hand(both.model):
        logits = [both.feed(prompt)[:, -1]]
        for token in out.sequences[:, 40:-1].T:
            logits.append(both.feed(token[:, None])[:, -1])
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(logits), atol=1e-3, rtol=1e-3)
    for layer, other in zip(out.past_key_values.layers, both.cache.layers, strict=True):
        assert type(layer) is type(other)
        assert isinstance(layer, GrowingLayer if budget in ("uniform", "layer") else RaggedLayer)


def test_dense_layers_are_compacted_in_the_memory_that_they_have() -> None:
    model, press = tiny_model(), make_press(budget="uniform", decoding=DecodingConfig(20, 10))
    pair = 2 * 16 * 4
    with press(model):
        cache = prefill(model, tokens(1, 25))
        memory = set()
        for step in range(45):
            decode(model, cache, 25 + step)
            assert all(layer.nbytes <= 30 * 2 * pair for layer in cache.layers)
            if step >= 5:
                memory.add(tuple(layer.keys.data_ptr() for layer in cache.layers))
    assert len(memory) == 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_more_is_held_than_is_allowed(budget: str) -> None:
    """Layers that keep more than others hold more, those that keep less have no room in vain."""
    model = tiny_model()
    press = make_press(0.5, budget=budget, experts=EXPERTS, decoding=DecodingConfig(24, 8))
    uneven = False
    with press(model):
        cache = prefill(model, tokens(1, 60))
        for step in range(40):
            decode(model, cache, 60 + step)
            held = press.get_stats()["cache"]
            assert held["bytes_held"] <= held["bytes_allowed"]
            uneven |= len({layer.count_pairs([0])[0] for layer in cache.layers}) > 1
    assert uneven == (budget in ("layer", "model"))


def test_ragged_tails_have_room_for_the_interval_and_keep_it() -> None:
    model = tiny_model()
    press = make_press(0.5, budget="model", decoding=DecodingConfig(20, 10))
    pair = 2 * 16 * 4
    with press(model):
        cache = prefill(model, tokens(1, 40))
        assert sum(layer.nbytes for layer in cache.layers) == 20 * 4 * pair
        memory = set()
        for step in range(45):
            decode(model, cache, 40 + step)
            assert sum(layer.nbytes for layer in cache.layers) <= 30 * 4 * pair
            memory.add(cache.layers[0].tail_keys.untyped_storage().data_ptr())
    assert len(memory) == 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_statistics_count_every_pair_once(budget: str) -> None:
    model = tiny_model()
    press = make_press(0.5, budget=budget, experts=EXPERTS, decoding=DecodingConfig(20, 10))
    with press(model):
        cache = prefill(model, tokens(1, 60))
        for step in range(25):
            decode(model, cache, 60 + step)
    # 60 pairs came with the prompt and 20 before the second compression; 20 stay of each head.
    stats = press.get_stats()
    pair, heads = 2 * 16 * 4, 2 * 2
    assert stats["compression"] == {
        "bytes_before": 80 * heads * pair,
        "bytes_after": 20 * heads * pair,
        "bytes_freed": 60 * heads * pair,
        "ratio": 60 / 80,
        "evicted": 60 / 80,
        "folded": 0,
    }
    assert stats["forward_count"] == 3
    for layer in stats["layer_stats"].values():
        # The prompt, then 7 of the 4 + 10 tokens since: as many as the window has.
        assert layer["router_stats"]["total_tokens"] == 60 + 7 + 7
        assert sum(layer["expert_compression_stats"]["expert_usage"].values()) == pytest.approx(1)
        removed = layer["expert_compression_stats"]["compression_ratios"]
        assert all(0 < ratio < 1 for ratio in removed.values() if not math.isnan(ratio))
        assert not all(map(math.isnan, removed.values()))
    press.reset_stats()
    with press(model):
        for step in range(10):
            decode(model, cache, 85 + step)
    # Only what the press has seen since: 25 pairs that were there, and 5 tokens.
    assert press.get_stats()["compression"]["ratio"] == 10 / 30


class Spy(Expert):
    name = "spy"
    kinds = (ScoreKind.MASS,)

    def __init__(self) -> None:
        self.views: list[LayerView] = []

    def scores(self, view: LayerView) -> torch.Tensor:
        self.views.append(view)
        return view.scores_of(ScoreKind.MASS)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("window", "asked"), [(6, 6), (9, 7)])
def test_queries_are_those_of_the_tokens_since_and_of_the_recent_ones(
    budget: str, window: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 tokens are recent and 3 come between two compressions: no older query is asked."""
    model, spy = tiny_model(), Spy()
    press = make_press(
        budget=budget, experts=[Uneven(), spy], window=window, decoding=DecodingConfig(20, 3)
    )
    install()
    attend, queries = ALL_ATTENTION_FUNCTIONS["sdpa"], {0: [], 1: []}

    def listen(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(query) == 2:  # no probe of the press's own
            queries[module.layer_idx].append(query)
        return attend(module, query, *args, **kwargs)

    listen.serves_compressed_layers = True  # as what it calls does
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", listen)
    compressions = 0
    with press(model):
        cache = prefill(model, tokens(2, 21))
        spy.views.clear()
        for step in range(8):
            decode(model, cache, 21 + step, batch=2)
            views, spy.views = spy.views, []
            compressions += bool(views)
            for layer in queries if views else ():
                fed = torch.cat(queries[layer], dim=2)[:, :, -asked:]
                # Rows that are seen in different ways are rated one by one.
                parts = [view for view in views if view.module.layer_idx == layer]
                assert all(view.keys.shape[1] * view.folded == 2 for view in parts)
                got = torch.cat([view.queries.reshape(-1, 4, asked, 16) for view in parts])
                torch.testing.assert_close(got, fed, atol=1e-5, rtol=1e-5)
                assert [h for view in parts for h in view.heads.flatten().tolist()] == [0, 1, 0, 1]
    assert compressions == 2


@pytest.mark.parametrize("budget", ["uniform", "head"])
def test_hit_rate_is_the_attention_on_what_the_expert_alone_would_keep(budget: str) -> None:
    """As many pairs of each head as it has, in proportion."""
    model, spy = tiny_model(), Spy()
    press = make_press(
        budget=budget, experts=[spy], shared=Uneven(), decoding=DecodingConfig(20, 3)
    )
    with press(model):
        cache = prefill(model, tokens(2, 21))
        spy.views.clear()
        layer = press._statistics.layers[0]
        layer.hit_rates = layer.hit_rates * torch.nan  # the moving average begins anew
        for step in range(3):
            decode(model, cache, 21 + step, batch=2)
    view = spy.views[0]
    mass, expected = view.scores_of(ScoreKind.MASS).flatten(0, 1), 0.0
    lengths = [n for n in view.lengths for _ in range(2 // view.folded)]
    assert len(set(lengths)) == (1 if budget == "uniform" else 2)
    for head, length in zip(mass, lengths, strict=True):
        count = length * 20 // 23
        real = head[head.shape[0] - length :]
        always = {0, 1, *range(length - 4, length)}  # sinks and recent ones
        others = [i for i in real.argsort(descending=True).tolist() if i not in always]
        expected += float(real[[*always, *others[: count - len(always)]]].sum()) / len(mass)
    assert float(press._statistics.layers[0].hit_rates[1]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_layers_remember_follows_their_rows(budget: str) -> None:
    model, press = tiny_model(), make_press(budget=budget, decoding=DecodingConfig(20, 9))
    with press(model):
        cache = prefill(model, tokens(3, 30))
        decode(model, cache, 30, batch=3)
    layer = cache.layers[1]
    before = layer.recent.states(7)
    assert before.shape == (3, 5, 64)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    assert torch.equal(layer.recent.states(7), before[[2, 0, 2]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(layer.recent.states(7), before[[2, 2, 0, 0, 2, 2]])
    cache.batch_select_indices(torch.tensor([2, 1]))
    assert torch.equal(layer.recent.states(7), before[[0, 2]])


def test_history_follows_decoding() -> None:
    model = tiny_model()
    press = make_press(
        experts=EXPERTS,
        top_k=2,
        router_type=PiKVMoERouter(64, len(EXPERTS), 2, cache_update_interval=2),
        decoding=DecodingConfig(20, 4),
    )
    biases = []
    with press(model):
        cache = prefill(model, tokens(1, 30))
        for step in range(25):
            biases.append(press._rater.routers[0].history_bias.clone())
            decode(model, cache, 30 + step)
    assert not biases[0].any()  # after the prefill alone, of which nothing had to leave
    assert biases[-1].any() and not torch.equal(biases[12], biases[-1])


@pytest.mark.parametrize("budget", BUDGETS)
def test_scorers_of_kvpress_rate_what_decoding_press_would_give_them(budget: str) -> None:
    scorers = [peer(f"{name}Press") for name in ("Knorm", "KeyDiff", "ExpectedAttention")]
    press = make_press(
        0.4,
        experts=[*(make() for make in scorers[:2]), scorers[2](n_sink=0), "selective"],
        budget=budget,
        top_k=3,
        decoding=DecodingConfig(15, 5),
    )
    both = Lockstep(padding=(0, 3))
    with press(both.model):
        both.feed(tokens(2, 30))
        for step in range(12):
            both.feed(tokens(2, 1, seed=step))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("padding", [(0,), (0, 7)])
def test_a_prompt_that_was_fed_outside_of_the_block(budget: str, padding: tuple[int, ...]) -> None:
    both, batch = Lockstep(padding=padding), len(padding)
    both.feed(tokens(batch, 40))
    press = make_press(0.5, budget=budget, decoding=DecodingConfig(20, 5))
    with press(both.model):
        both.feed(tokens(batch, 1))
        assert_average(both.pairs(), torch.tensor([20] * batch), budget)
        for step in range(7):
            both.feed(tokens(batch, 1, seed=step))
    both.feed(tokens(batch, 1))  # and goes on outside
    assert press.get_stats()["forward_count"] == 2


def test_a_prompt_within_the_budget_stays_whole() -> None:
    both, press = Lockstep(), make_press(budget="uniform", decoding=DecodingConfig(30, 10))
    with press(both.model):
        both.feed(tokens(1, 12))
        for step in range(27):
            both.feed(tokens(1, 1, seed=step))
            assert (both.pairs() == 12 + step + 1).all()
        both.feed(tokens(1, 1))
        assert (both.pairs() == 30).all()
    assert press.get_stats()["compression"]["ratio"] == 10 / 40


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_several_tokens_at_once(budget: str, name: str) -> None:
    """A second prompt in the block: masks know what has left, dense layers or ragged ones."""
    both = Lockstep(name, (0, 0), DynamicCache(config=tiny_model(name).config))
    press = make_press(0.5, budget=budget, decoding=DecodingConfig(15, 5))
    with press(both.model):
        both.feed(tokens(2, 30))
        for turn in range(3):
            both.feed(tokens(2, 11, seed=turn))
            assert_average(both.pairs(), torch.tensor([15, 15]), budget)
            both.feed(tokens(2, 1, seed=turn))
    both.feed(tokens(2, 6))


def test_several_tokens_for_padded_rows() -> None:
    both = Lockstep(padding=(0, 5))
    with make_press(0.5, budget="uniform", decoding=DecodingConfig(15, 5))(both.model):
        both.feed(tokens(2, 30))
        both.feed(tokens(2, 11, seed=1))
        assert_average(both.pairs(), torch.tensor([15, 15]), "uniform")
        both.feed(tokens(2, 3, seed=2))


@pytest.mark.parametrize("budget", BUDGETS)
def test_beams(budget: str) -> None:
    """Inputs that the layers remember follow the beams, as their pairs do."""
    model = tiny_model()
    press = make_press(0.5, budget=budget, experts=EXPERTS, decoding=DecodingConfig(12, 4))
    with press(model):
        out = model.generate(
            tokens(2, 30),
            num_beams=3,
            max_new_tokens=17,
            do_sample=False,
            return_dict_in_generate=True,
        )
    assert out.sequences.shape == (2, 47)
    rows = [layer.count_pairs([0] * 6) for layer in out.past_key_values.layers]
    heads = 2 * len(rows)
    assert [sum(row) for row in zip(*rows, strict=True)] == [12 * heads] * 6  # the 16th step's


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_saved_cache_goes_on(budget: str, tmp_path: Any) -> None:
    both = Lockstep()
    with make_press(0.5, budget=budget, decoding=DecodingConfig(15, 5))(both.model):
        both.feed(tokens(1, 30))
        both.feed(tokens(1, 1))
    save_cache(both.cache, tmp_path / "cache", both.model)
    both.cache = load_cache(tmp_path / "cache", both.model)
    with pytest.raises(ValueError, match="the first .* were compressed together"):
        both.cache.crop(-6)  # one, and further than every head reaches
    with make_press(0.5, budget=budget, decoding=DecodingConfig(15, 5))(both.model):
        for step in range(12):
            both.feed(tokens(1, 1, seed=step))
    assert both.pairs().float().mean() < 20


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("lengths", [(40, 25), (40, 21, 1)], ids=str)
@pytest.mark.parametrize(("window", "weight"), [(16, 30.0), (64, 1.0)], ids=["history", "window"])
def test_rows_of_a_padded_batch_decode_as_they_do_alone(
    budget: str, lengths: tuple[int, ...], window: int, weight: float
) -> None:
    """Each is compressed when it holds too much, by the tokens that it has itself.

    What has been seen of its neighbours moves no gate of its own; nor do they change what experts
    see of it: heads together or each by itself, all of its tokens or the last ones.
    """
    options = {"experts": EXPERTS, "window": window, "top_k": 1}
    options |= {"budget": budget, "decoding": DecodingConfig(15, 3)}
    model, longest, steps = tiny_model(), max(lengths), 14
    batch = len(lengths)
    ids = tokens(batch, longest + steps)
    mask = (torch.arange(longest + steps) >= longest - torch.tensor(lengths)[:, None]).long()

    def run(rows: list[int], begin: int) -> torch.Tensor:
        router = PiKVMoERouter(64, 4, 1, history_weight=weight, cache_update_interval=1)
        press = MoERouterPress(0.5, **options, router_type=router)
        given, seen, cache = ids[rows, begin:], mask[rows, begin:], DynamicCache()
        position = (seen.cumsum(-1) - 1).clamp(min=0)
        logits, cuts = [], [longest - begin, *[1] * steps]
        with torch.no_grad(), press(model):
            for part, where in zip(given.split(cuts, 1), position.split(cuts, 1), strict=True):
                length = cache.get_seq_length() + part.shape[1]
                out = model(
                    part,
                    past_key_values=cache,
                    attention_mask=seen[:, :length],
                    position_ids=where,
                )
                logits.append(out.logits[:, -1])
        return torch.stack(logits, 1)

    together = run(list(range(batch)), 0)
    for row, length in enumerate(lengths):
        alone = run([row], longest - length)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", ["uniform", "head", "model"])
def test_a_crop_reaches_no_further_than_an_earlier_block_has_kept(budget: str) -> None:
    """Three pairs of each head's end, whatever a later block would have kept."""
    both = Lockstep()
    with make_press(0.3, budget="model", recent=3)(both.model):
        both.feed(tokens(1, 38))
    with make_press(budget=budget, recent=6, decoding=DecodingConfig(10, 4))(both.model):
        for step in range(4):  # pairs leave behind the first
            both.feed(tokens(1, 1, step))
    with pytest.raises(ValueError, match="and the last 4 of them"):
        both.cache.crop(-8)
    both.crop(7)
    both.feed(tokens(1, 3, 1))

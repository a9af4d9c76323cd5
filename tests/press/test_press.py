import dataclasses
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress import ExpectedAttentionPress, KnormPress, ScorerPress
from random_router import random_router
from tiny_models import TINY_MODELS, prefill, tiny_model, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from moekv import (
    Expert,
    LayerView,
    MoERouterPress,
    PiKVMoERouter,
    RouterOutput,
    expert_names,
)
from moekv.experts import view as view_module
from moekv.experts.registry import build_experts
from moekv.models import watching
from moekv.models.hooks import find_layers
from moekv.ops import ScoreKind
from moekv.press import prefill as prefill_module
from moekv.press import rating
from moekv.press.options import ROUTED_EXPERTS, SHARED_EXPERT
from moekv.routing.registry import ROUTERS

LENGTH = 80
ALL = expert_names()[:6]


class Fixed(Expert):
    """Scores that the test chose."""

    def __init__(self, name: str, scores: Tensor) -> None:
        self.name, self.fixed = name, scores

    def scores(self, view: LayerView) -> Tensor:
        return self.fixed.expand(view.keys.shape[:3])


class Spy(Expert):
    name = "spy"
    kinds = (ScoreKind.MASS,)

    def __init__(self) -> None:
        self.mass: list[Tensor] = []
        self.keys: list[weakref.ref[Tensor]] = []

    def scores(self, view: LayerView) -> Tensor:
        self.mass.append(view.scores_of(ScoreKind.MASS))
        self.keys.append(weakref.ref(view.keys))
        return self.mass[-1]


class Routed(nn.Module):
    """A router that decides what the test says."""

    def __init__(self, probs: Tensor, weights: Tensor, experts: Tensor) -> None:
        super().__init__()
        self.probs, self.weights, self.experts = probs, weights, experts

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> RouterOutput:
        batch = len(hidden_states)
        probs, weights, experts = (
            x.expand(batch, *x.shape) for x in (self.probs, self.weights, self.experts)
        )
        load = torch.bincount(experts.flatten(), minlength=probs.shape[-1])
        entropy = torch.special.entr(probs).sum()
        return RouterOutput(probs.log(), weights, experts.int(), torch.tensor(0.5), load, entropy)

    def update_history(self, hit_rates: Tensor) -> None:
        pass


def make_press(ratio: float = 0.5, **options: Any) -> MoERouterPress:
    return MoERouterPress(ratio, **options)


def compress(
    press: MoERouterPress, model: PreTrainedModel, input_ids: Tensor, **inputs: Any
) -> DynamicCache:
    with press(model):
        return prefill(model, input_ids, **inputs)


def kept_positions(compressed: DynamicCache, full: DynamicCache, index: int) -> Tensor:
    """Which positions [B, H, n] of the full layer a compressed one has, checked pair by pair."""
    layer, whole = compressed.layers[index], full.layers[index]
    same = (layer.keys[:, :, :, None] == whole.keys[:, :, None]).all(-1)
    assert (same.sum(-1) == 1).all()
    positions = same.int().argmax(-1)
    expanded = positions[..., None].expand(-1, -1, -1, whole.values.shape[-1])
    assert torch.equal(layer.values, whole.values.gather(2, expanded))
    return positions


# --- What experts see -----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_window_queries_are_those_of_the_model(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken from the attention where it can be watched, the same as computed again elsewhere."""
    compute, computed = view_module.window_queries, []

    def count(*args: Any) -> Tensor:
        computed.append(args)
        return compute(*args)

    class Ask(Expert):
        name = "ask"

        def scores(self, view: LayerView) -> Tensor:
            assert view.queries.shape[2] == min(9, view.keys.shape[2])
            expected = compute(view.module, view.hidden_states, view.kwargs, 9, 0)
            torch.testing.assert_close(view.queries, expected)
            return torch.zeros(view.keys.shape[:3])

    monkeypatch.setattr(view_module, "window_queries", count)
    model = tiny_model(name, attention)
    press = make_press(experts=[Ask()], window=9, top_k=1)
    with press(model):
        for length in (1, 5, 30):
            computed.clear()
            prefill(model, tokens(2, length))
            watched = attention == "sdpa" and length > 1
            assert len(computed) == (0 if watched else len(press._statistics.layers))
    assert not watching._watchers


# --- What stays -----------------------------------------------------------------------------------


@settings(max_examples=25)
@given(length=st.integers(1, 70), ratio=st.floats(0, 0.999))
def test_every_head_keeps_exactly_the_budget(length: int, ratio: float) -> None:
    model = tiny_model()
    press = make_press(ratio, experts=ALL, window=9)
    cache = compress(press, model, tokens(2, length))
    kept = max(1, int(length * (1 - ratio)))
    for layer in cache.layers:
        assert layer.keys.shape[:3] == layer.values.shape[:3] == (2, 2, kept)
    compression = press.get_stats()["compression"]
    assert compression["ratio"] == (length - kept) / length
    pair = 2 * 16 * 4  # key and value
    assert compression["bytes_before"] == 2 * 2 * 2 * length * pair
    assert compression["bytes_after"] == 2 * 2 * 2 * kept * pair
    assert compression["bytes_freed"] == 2 * 2 * 2 * (length - kept) * pair


def test_mixture_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """For given router weights: standardise, mix, keep sinks, recent ones and the best."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(3, 2, LENGTH, generator=generator).exp()  # [E, H, T]
    raw[2] *= 100
    weights = torch.rand(LENGTH, 2, generator=generator)
    weights = weights / weights.sum(-1, keepdim=True)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(LENGTH)])
    router = Routed(torch.full((LENGTH, 3), 1 / 3), weights, chosen)
    monkeypatch.setattr(rating, "make_router", lambda *_, **__: router)
    press = make_press(0.6, experts=[Fixed(f"e{i}", raw[i]) for i in range(3)], recent=6)
    model, input_ids = tiny_model(), tokens(1, LENGTH)
    cache, full = compress(press, model, input_ids), prefill(model, input_ids)

    expected = []
    removed, ruled = [0.0] * 3, [0.0] * 3
    for head in range(2):
        mixed = []
        for t in range(LENGTH):
            score = 0.0
            for slot in range(2):
                row = raw[chosen[t, slot], head].double()
                standard = (row[t] - row.mean()) / row.std(correction=0)
                score += float(weights[t, slot]) * float(standard)
            mixed.append(score)
        always = {0, 1, 2, 3, *range(LENGTH - 6, LENGTH)}
        others = sorted(set(range(LENGTH)) - always, key=lambda t: -mixed[t])
        kept = always | set(others[: 32 - len(always)])
        expected.append(sorted(kept))
        for t in range(LENGTH):
            for slot in range(2):
                expert, weight = int(chosen[t, slot]), float(weights[t, slot])
                ruled[expert] += weight
                removed[expert] += weight * (t not in kept)
    for index in range(2):
        assert kept_positions(cache, full, index)[0].tolist() == expected
        stats = press.get_stats()["layer_stats"][index]["expert_compression_stats"]
        for e in range(3):
            ratio = stats["compression_ratios"][f"e{e}"]
            assert ratio == pytest.approx(removed[e] / ruled[e], abs=1e-5)
            usage = stats["expert_usage"][f"e{e}"]
            assert usage == pytest.approx(ruled[e] / sum(ruled), abs=1e-5)


@pytest.mark.parametrize(
    ("favourite", "kept"),
    [
        (0, [*range(16), *range(72, 80)]),
        (1, [*range(24), *range(64, 80)]),
        (2, [*range(40), *range(56, 80)]),
        (3, [*range(7, 67, 3)]),
    ],
)
def test_dominant_by_hand(favourite: int, kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The expert with the highest mean probability keeps what it keeps alone, to the position."""
    # Most tokens prefer another expert, by little.
    probs = torch.full((LENGTH, 4), 0.25)
    probs[:60, (favourite + 1) % 4] += 0.01
    probs[:60, favourite] -= 0.01
    probs[60:] = 0
    probs[60:, favourite] = 1
    weights, chosen = probs.topk(2)
    router = Routed(probs, weights, chosen)
    monkeypatch.setattr(rating, "make_router", lambda *_, **__: router)
    scores = torch.zeros(LENGTH)
    scores[7:67:3] = torch.arange(20.0) + 1
    experts = ["aggressive", "moderate", "conservative", Fixed("custom", scores)]
    press = make_press(0.75, experts=experts, policy="dominant")
    model, input_ids = tiny_model(), tokens(2, LENGTH)
    cache, full = compress(press, model, input_ids), prefill(model, input_ids)
    stats = press.get_stats()
    assert stats["compression"]["ratio"] == (LENGTH - len(kept)) / LENGTH
    for index in range(2):
        positions = kept_positions(cache, full, index)
        assert positions.tolist() == [[kept] * 2] * 2
        layer = stats["layer_stats"][index]["expert_compression_stats"]
        names = list(layer["expert_usage"])
        usage = [0.0] * 4
        usage[favourite] = 1.0
        assert list(layer["expert_usage"].values()) == usage
        ratio = layer["compression_ratios"][names[favourite]]
        assert ratio == pytest.approx(1 - len(kept) / LENGTH)
        assert sum(map(math.isnan, layer["compression_ratios"].values())) == 3


def test_dominant_ties_go_to_the_lower_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.full((LENGTH, 3), 1 / 3)
    router = Routed(probs, *probs.topk(2))
    monkeypatch.setattr(rating, "make_router", lambda *_, **__: router)
    cache = compress(make_press(num_experts=3, policy="dominant"), tiny_model(), tokens(1, LENGTH))
    assert cache.layers[0].keys.shape[2] == 24 and cache.get_seq_length() == LENGTH


def test_dominant_layers_of_different_lengths_generate() -> None:
    model = tiny_model()
    experts = [Fixed("long", torch.arange(99.0)), "aggressive"]
    experts[0].kept = lambda length, ratio: 70
    press = make_press(experts=experts, policy="dominant", cache_aware=False)
    input_ids = tokens(1, 99)
    with press(model):
        prefill(model, input_ids)
        press._rater.routers[1].prior.copy_(torch.tensor([0.0, 5.0]))
        press._rater.routers[0].prior.copy_(torch.tensor([5.0, 0.0]))
        out = model.generate(
            input_ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
    lengths = [layer.to_dense()[2].tolist() for layer in out.past_key_values.layers]
    assert lengths == [[[70 + 4] * 2], [[19 + 9 + 4] * 2]]
    assert out.past_key_values.get_seq_length() == 99 + 4
    assert out.sequences.shape == (1, 99 + 5)


def test_decoding_compresses_nothing() -> None:
    model, press = tiny_model(), make_press(budget="uniform")
    with press(model):
        out = model.generate(
            tokens(1, LENGTH), max_new_tokens=11, do_sample=False, return_dict_in_generate=True
        )
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert lengths == [LENGTH // 2 + 10] * 2
    assert press.get_stats()["forward_count"] == 1


def test_ratio_zero_measures_and_removes_nothing() -> None:
    model, press, input_ids = tiny_model(), make_press(0.0, experts=ALL), tokens(1, LENGTH)
    cache, full = compress(press, model, input_ids), prefill(model, input_ids)
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        assert torch.equal(layer.keys, whole.keys)
    stats = press.get_stats()
    assert stats["forward_count"] == 1
    assert stats["compression"]["bytes_freed"] == 0 and stats["compression"]["ratio"] == 0
    rates = stats["layer_stats"][0]["expert_compression_stats"]["cache_hit_rates"]
    assert list(rates.values()) == pytest.approx([1.0] * 6)


def test_memory_is_free_when_the_prefill_ends() -> None:
    model, spy = tiny_model(), Spy()
    with make_press(experts=[spy, "semantic"])(model):
        cache = prefill(model, tokens(1, LENGTH))
        gc.collect()
        assert [ref() for ref in spy.keys] == [None, None]
    for layer in cache.layers:
        bytes_held = layer.keys.untyped_storage().nbytes()
        assert bytes_held == 2 * (LENGTH // 2) * 16 * 4


@pytest.mark.parametrize("router_type", list(ROUTERS))
@pytest.mark.parametrize("policy", ["mixture", "dominant"])
def test_every_router_gives_the_same_bits_again(router_type: str, policy: str) -> None:
    model, input_ids = tiny_model(), tokens(2, LENGTH)

    def run() -> tuple[DynamicCache, dict[str, Any]]:
        press = make_press(experts=ALL, router_type=router_type, policy=policy)
        return compress(press, model, input_ids), press.get_stats()

    (cache, stats), (again, stats_again) = run(), run()
    for layer, other in zip(cache.layers, again.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
    assert repr(stats) == repr(stats_again)
    decisions = stats["layer_stats"][0]["router_stats"]
    assert decisions["total_tokens"] == 2 * LENGTH
    assert sum(decisions["expert_usage_count"].values()) == decisions["routing_decisions"] > 0


# --- Statistics -----------------------------------------------------------------------------------


def test_hit_rate_is_the_attention_on_what_the_expert_alone_keeps() -> None:
    model, input_ids = tiny_model(), tokens(2, LENGTH)
    full = prefill(model, input_ids)
    press = make_press(0.7, experts=ALL, window=10)
    compress(press, model, input_ids)
    stats = press.get_stats()["layer_stats"]
    for name in ALL:
        spy = Spy()
        # The spy takes part in no score: it comes after the one that each token consults.
        spy.prior = -50.0
        alone = make_press(0.7, experts=[name, spy], top_k=1, window=10)
        cache = compress(alone, model, input_ids)
        for index, mass in enumerate(spy.mass):
            kept = kept_positions(cache, full, index)
            expected = mass.gather(2, kept).sum(-1).mean()
            rate = stats[index]["expert_compression_stats"]["cache_hit_rates"][name]
            assert rate == pytest.approx(float(expected), abs=1e-6)
            assert 0 < rate < 1


def test_hit_rates_without_an_expert_of_attention_are_of_eight_queries() -> None:
    model, input_ids = tiny_model(), tokens(2, LENGTH)

    def rate(*experts: Any, window: int) -> float:
        press = make_press(0.7, experts=["semantic", *experts], top_k=1, window=window)
        compress(press, model, input_ids)
        layer: dict[str, Any] = press.get_stats()["layer_stats"][1]
        return layer["expert_compression_stats"]["cache_hit_rates"]["semantic"]

    assert rate("temporal", window=20) == rate("temporal", window=8) == rate(Spy(), window=8)
    assert rate("temporal", window=20) != rate(Spy(), window=20)
    assert rate("temporal", window=5) == rate(Spy(), window=5)


def test_hit_rate_of_a_dominant_policy_is_for_what_each_would_keep() -> None:
    model, input_ids, spy = tiny_model(), tokens(1, LENGTH), Spy()
    press = make_press(0.7, experts=["aggressive", "conservative", spy], policy="dominant")
    compress(press, model, input_ids)
    stats = press.get_stats()["layer_stats"]
    for index, mass in enumerate(spy.mass):
        rates = stats[index]["expert_compression_stats"]["cache_hit_rates"]
        few, many = mass.mean((0, 1)), mass.mean((0, 1))
        assert rates["aggressive"] == pytest.approx(float(few[:16].sum() + few[72:].sum()))
        assert rates["conservative"] == pytest.approx(float(many[:40].sum() + many[56:].sum()))
        assert rates["spy"] == pytest.approx(float(mass.topk(24).values.sum(-1).mean()))


def test_stats_of_two_prefills_and_a_reset() -> None:
    model, press = tiny_model(), make_press()
    with press(model):
        prefill(model, tokens(1, LENGTH))
        prefill(model, tokens(1, 40, seed=1))
    stats = press.get_stats()
    assert list(stats) == [
        "total_aux_loss",
        "avg_aux_loss",
        "forward_count",
        "router",
        "compression",
        "layer_stats",
    ]
    assert stats["forward_count"] == 2
    assert stats["avg_aux_loss"] == stats["total_aux_loss"] / 2 > 0
    assert list(stats["layer_stats"]) == [0, 1]
    for layer in stats["layer_stats"].values():
        assert layer["router_stats"]["total_tokens"] == LENGTH + 40
        usage = layer["expert_compression_stats"]["expert_usage"]
        assert list(usage) == [SHARED_EXPERT, *ROUTED_EXPERTS]
        assert sum(usage.values()) == pytest.approx(1)
    press.reset_stats()
    empty = press.get_stats()
    assert empty["forward_count"] == empty["total_aux_loss"] == empty["avg_aux_loss"] == 0
    assert empty["compression"] == dict.fromkeys(stats["compression"], 0)
    assert empty["layer_stats"] == {}


def test_history_follows_the_hit_rates_every_few_calls() -> None:
    model = tiny_model()
    prior = [expert.prior for expert in build_experts(ALL)]
    press, ignorant = (
        make_press(
            experts=ALL,
            router_type=PiKVMoERouter(
                64, len(ALL), 2, prior=prior, cache_aware=aware, cache_update_interval=3
            ),
        )
        for aware in (True, False)
    )
    for call in range(1, 8):
        for each in (press, ignorant):
            compress(each, model, tokens(1, LENGTH, seed=call))
        router = press._rater.routers[0]
        assert bool(router.history_bias.any()) == (call >= 3)
        if call == 3:
            rates = press._statistics.layers[0].hit_rates
            torch.testing.assert_close(router.history_bias, rates - rates.mean())
    assert not ignorant._rater.routers[0].history_bias.any()
    press.reset_stats()
    compress(press, model, tokens(1, LENGTH))
    assert not press._rater.routers[0].history_bias.any()


class NoSync(TorchDispatchMode):
    """Fails where a result on the device is waited for."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not str(func).startswith(self.WAITING), f"{func} waits for the device"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("router_type", list(ROUTERS))
def test_nothing_waits_for_the_device(router_type: str) -> None:
    model = tiny_model()
    with make_press()(model):
        prefill(model, tokens(1, LENGTH))  # in which layers show how they form their queries
    press = make_press(experts=ALL, router_type=router_type)
    with press(model), NoSync():
        prefill(model, tokens(1, LENGTH))
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        press.get_stats()


# --- Padding --------------------------------------------------------------------------------------


def left_padded(lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    width = max(lengths)
    input_ids, mask = (
        torch.zeros(len(lengths), width, dtype=torch.long),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        input_ids[row, width - length :] = tokens(1, length, seed=row)
        mask[row, width - length :] = 1
    return input_ids, {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def scores_of(
    press: MoERouterPress, model: PreTrainedModel, input_ids: Tensor, **inputs: Any
) -> list[Tensor]:
    """What the press's `score` gives for every layer of a prefill."""
    scores = []

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        hidden_states = kwargs["hidden_states"]
        scores.append(press.score(module, hidden_states, layer.keys, layer.values, None, kwargs))

    _, layers = find_layers(model)
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    prefill(model, input_ids, **inputs)
    for handle in handles:
        handle.remove()
    return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("router_type", list(ROUTERS))
def test_padded_rows_score_as_they_do_alone(attention: str, router_type: str) -> None:
    model = tiny_model(attention=attention)
    lengths = [60, 33, 12]
    input_ids, inputs = left_padded(lengths)
    options = {"experts": ALL, "router_type": router_type}
    press = make_press(**options)
    together = scores_of(press, model, input_ids, **inputs)
    rates = []
    for row, length in enumerate(lengths):
        single = make_press(**options)
        alone = scores_of(single, model, tokens(1, length, seed=row))
        for layer, other in zip(together, alone, strict=True):
            real = layer[row : row + 1, :, 60 - length :]
            torch.testing.assert_close(real, other, atol=1e-4, rtol=1e-4)
            padding = layer[row, :, : 60 - length]
            assert (padding < real.amin()).all()
        rates.append(single._statistics.layers[0].hit_rates)
    stats = press.get_stats()["layer_stats"][0]
    assert stats["router_stats"]["total_tokens"] == sum(lengths)
    measured = list(stats["expert_compression_stats"]["cache_hit_rates"].values())
    assert measured == pytest.approx(torch.stack(rates).mean(0).tolist(), abs=1e-5)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_layers_rated_together_are_rated_as_alone(
    calibrated: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    input_ids, inputs = left_padded([50, 31]) if padded else (tokens(2, 50), {})
    results = []
    for together in (1, 2, prefill_module.TOGETHER):
        monkeypatch.setattr(prefill_module, "TOGETHER", together)
        options = {"router": random_router(model)} if calibrated else {"router": None}
        press = MoERouterPress(0.5, **options)
        with press(model):
            cache = prefill(model, input_ids, **inputs)
        pairs = [x for layer in cache.layers for x in layer.to_dense()]
        results.append((pairs, press.get_stats()))
    for pairs, stats in results[1:]:
        torch.testing.assert_close(pairs, results[0][0], atol=0, rtol=0)
        assert _flat(stats) == pytest.approx(_flat(results[0][1]), rel=1e-5)


def _flat(stats: Any) -> list[float]:
    if isinstance(stats, dict):
        return [number for value in stats.values() for number in _flat(value)]
    return [] if isinstance(stats, str) else [float(stats)]


def test_what_waits_for_further_layers_is_not_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer's hidden states and queries nothing is held when the next one runs."""
    model = tiny_model()
    look_at = rating.Rater.look
    seen: list[weakref.ref[Tensor]] = []

    def spy(self: MoERouterPress, view: LayerView) -> Any:
        gc.collect()
        assert not [ref for ref in seen if ref() is not None]
        assert view.projected is not None
        large = [view.hidden_states, view.projected, view.projected._base]
        seen.extend(weakref.ref(x) for x in large if x is not None)
        return look_at(self, view)

    monkeypatch.setattr(rating.Rater, "look", spy)
    with MoERouterPress(0.5)(model):
        prefill(model, tokens(2, 40))
    assert len(seen) >= 2 * len(find_layers(model)[1])


def test_padded_batches_are_measured_where_nothing_leaves() -> None:
    model, press = tiny_model(), make_press(0.0)
    input_ids, inputs = left_padded([50, 20])
    cache = compress(press, model, input_ids, **inputs)
    assert cache.get_seq_length() == 50
    assert press.get_stats()["layer_stats"][1]["router_stats"]["total_tokens"] == 70


# --- Options --------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_readme() -> None:
    press = MoERouterPress(num_experts=4, top_k=2, router_type="pikv", cache_aware=True)
    assert isinstance(press, ScorerPress)
    assert (press.compression_ratio, press.policy, press.budget) == (0.5, "mixture", "auto")
    compress(press, tiny_model(), tokens(1, 9))
    names = press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"]
    assert list(names) == ["aggressive", "moderate", "conservative", "selective"]


@pytest.mark.parametrize(
    ("model", "top_k", "number"),
    [("llama", 1, 2), ("llama", 4, 4), ("llama_mha", 2, 3), ("gemma3", 2, 2)],
)
def test_automatic_number_of_experts(model: str, top_k: int, number: int) -> None:
    # 2 layers of 2, 2 layers of 4 and 3 layers of 2 KV heads.
    press = make_press(num_experts="auto", top_k=top_k)
    compress(press, tiny_model(model), tokens(1, 20))
    layer = max(press.get_stats()["layer_stats"].items())[1]
    assert list(layer["router_stats"]["expert_usage_count"]) == list(ALL[:number])


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"experts": ["semantic", "selective"]}])
def test_replace_makes_a_press_of_the_same_options(options: dict[str, Any]) -> None:
    press = MoERouterPress(0.5, **options)
    other = dataclasses.replace(press, compression_ratio=0.25)
    assert other == MoERouterPress(0.25, **options)
    model, input_ids = tiny_model(), tokens(1, LENGTH)
    compress(other, model, input_ids)
    alike = MoERouterPress(0.25, **options)
    compress(alike, model, input_ids)
    assert str(other.get_stats()) == str(alike.get_stats())  # some are NaN


def test_experts_of_every_kind_at_once() -> None:
    model = tiny_model()
    press = make_press(
        experts=[
            "selective",
            KnormPress(),
            ExpectedAttentionPress(n_sink=0),
            Fixed("mine", torch.arange(LENGTH)[:, None].expand(-1, 1).T.float()),
        ],
        router_type="eplb",
        top_k=1,
    )
    compress(press, model, tokens(1, LENGTH))
    count = press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"]
    assert count == dict.fromkeys(
        ["selective", "KnormPress", "ExpectedAttentionPress", "mine"], LENGTH // 4
    )


def test_model_is_left_as_it_was() -> None:
    model = tiny_model()
    _, layers = find_layers(model)
    names = [name for name, _ in model.named_modules()]
    with make_press()(model):
        assert all(layer._forward_hooks for layer in layers)
        prefill(model, tokens(1, 20))
    assert [name for name, _ in model.named_modules()] == names
    assert not any(layer._forward_hooks for layer in layers)
    assert not model.model._forward_pre_hooks


def test_routers_live_where_their_layers_do() -> None:
    model, press = tiny_model().bfloat16(), make_press()
    compress(press, model, tokens(1, 20))
    for index in press._statistics.layers:
        router = press._rater.routers[index]
        assert router.gate.weight.dtype == torch.bfloat16
        assert not router.training
        assert not any(p.requires_grad for p in router.parameters())


def test_prefill_that_records_gradients() -> None:
    model = tiny_model()
    cache = DynamicCache()
    with make_press(budget="uniform")(model):
        logits = model(tokens(1, LENGTH), past_key_values=cache).logits
    assert cache.get_seq_length() == LENGTH
    logits.sum().backward()  # what backward saved is whole
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None


def test_priors_reach_the_routers() -> None:
    press = make_press(experts=["aggressive", "selective"], router_type="base", top_k=2)
    compress(press, tiny_model(), tokens(1, 20))
    usage = press.get_stats()["layer_stats"][0]["expert_compression_stats"]["expert_usage"]
    first, second = build_experts(["aggressive", "selective"])
    share = 1 / (1 + math.exp(second.prior - first.prior))
    assert usage["aggressive"] == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("make", [lambda m: m, lambda m: m.model])
def test_with_or_without_a_head(make: Callable[[Any], Any]) -> None:
    model = make(tiny_model())
    cache = DynamicCache()
    with make_press(budget="uniform")(model), torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 10 and cache.get_seq_length() == 20


def test_model_with_attention_of_its_own_keeps_dense_layers() -> None:
    model, input_ids = tiny_model("nemotron"), tokens(1, LENGTH)
    cache = compress(MoERouterPress(0.5), model, input_ids)
    assert [layer.keys.shape[2] for layer in cache.layers] == [LENGTH // 2] * 2
    with torch.no_grad():
        model(input_ids[:, :1], past_key_values=cache)
    for options in ({"budget": "model"}, {"budget": "head"}):
        with pytest.raises(ValueError, match="NemotronSdpaAttention, which reads dense caches"):
            compress(MoERouterPress(0.5, **options), model, input_ids)

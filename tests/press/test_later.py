import copy
import math

import pytest
import torch
from growth_cases import decode
from press_probes import compress, kept_positions, make_press
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from moekv import DecodingConfig, MoERouterPress
from moekv.budget import Kept
from moekv.cache.growing import GrowingLayer
from moekv.cache.ragged import RaggedLayer
from moekv.experts import base, view
from moekv.models.watching import Asked
from moekv.press.later import EVERY, Later, packed

NAMES = ("selective", "semantic", "temporal")


def later_of(press: MoERouterPress, index: int = 0) -> dict[str, float]:
    return press.get_stats()["layer_stats"][index]["expert_compression_stats"]["later_hit_rates"]


@pytest.mark.parametrize("count", [1, 8, 9, 15, 16, 31, 32, 63])
def test_packing_is_undone(count: int) -> None:
    wanted = torch.rand(count, 2, 3, 5, generator=torch.Generator().manual_seed(count)) < 0.5
    bits = packed(wanted)
    assert bits is not None
    for e in range(count):
        assert torch.equal((bits >> e & 1).bool(), wanted[e])


def test_more_experts_than_bits() -> None:
    assert packed(torch.ones(64, 1, 1, 1, dtype=torch.bool)) is None


def test_rates_are_those_of_the_attention_weights() -> None:
    """The model's own weights, and what presses of one expert each keep, say the same."""
    model, prompt = tiny_model(attention="eager"), tokens(2, 40)
    options = {"budget": "uniform", "sinks": 1, "recent": 3}
    full = prefill(model, prompt)
    alone = [compress(make_press(experts=[name], **options), model, prompt) for name in NAMES]
    press = make_press(experts=NAMES, **options)
    with press(model), torch.no_grad():
        cache = prefill(model, prompt)
        held = [kept_positions(cache, full, i) for i in range(len(cache.layers))]
        assert all(map(math.isnan, later_of(press).values()))
        seen = model(tokens(2, 2, seed=5)[:, :1], past_key_values=cache, output_attentions=True)
    for i, stored in enumerate(held):
        mass = seen.attentions[i][:, :, -1, :-1]  # without the token's own
        mass = mass.unflatten(1, (stored.shape[1], -1)).mean(2)
        for name, one in zip(NAMES, alone, strict=True):
            own = kept_positions(one, full, i)
            wanted = (stored[..., None] == own[:, :, None]).any(-1)
            expected = float((mass * wanted).sum(-1).mean())
            assert later_of(press, i)[name] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("ragged", [True, False])
def test_rates_of_a_layer_by_hand(ragged: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 2, 2, 30, 16, generator=generator)
    query = torch.randn(2, 4, 3, 16, generator=generator)
    order = torch.rand(2, 2, 30, generator=generator).argsort(-1)
    mask = torch.zeros(2, 2, 30, dtype=torch.bool).scatter_(-1, order[..., :12], True)
    if ragged:
        mask &= torch.rand(2, 2, 30, generator=generator) < 0.7
    kept = Kept.from_mask(mask)
    wanted = torch.rand(3, 2, 2, 30, generator=generator) < 0.4
    if ragged:
        layer = RaggedLayer.compress(keys, values, kept)
    else:
        kept = Kept(kept.indices, kept.offsets, kept.shape, 12)
        layer = GrowingLayer.compress(keys, values, kept)
    later = Later()
    later.remember(layer, packed(wanted), kept, NAMES)
    more = torch.randn(2, 2, 2, 5, 16, generator=generator)
    layer.update(*more)
    module, states = tiny_model().model.layers[0].self_attn, torch.randn(2, 3, 64)
    asked = Asked(query, None, None, 0.25)
    rates = later.measure(layer, module, asked, states, NAMES, backend="auto", rotary=None)
    assert rates is not None
    every = torch.cat([keys, more[0]], 2).double().repeat_interleave(2, 1)
    there = torch.cat([mask, torch.ones(2, 2, 5, dtype=torch.bool)], 2).repeat_interleave(2, 1)
    logits = torch.einsum("bhd,bhtd->bht", query[:, :, -1].double(), every) / 4
    weights = logits.masked_fill(~there, -math.inf).softmax(-1)[..., :30]
    both = wanted.repeat_interleave(2, 2)
    expected = torch.stack([(weights * one).sum(-1).mean() for one in both])
    torch.testing.assert_close(rates.double(), expected, atol=1e-5, rtol=1e-5)


def test_every_so_many_steps_and_only_for_routers_with_a_history() -> None:
    model = tiny_model()
    for router_type, measured in [("pikv", True), ("adaptive", False)]:
        press = make_press(experts=NAMES, router_type=router_type, sinks=1, recent=3)
        before, seen = math.nan, []
        with press(model):
            cache = prefill(model, tokens(1, 40))
            for step in range(2 * EVERY + 2):
                decode(model, cache, 40 + step)
                now = later_of(press)["semantic"]
                seen.append(not math.isnan(now) and now != before)
                before = now
        due = [measured and step % EVERY == 0 for step in range(len(seen))]
        assert seen == due
        history = press.get_stats()["layer_stats"][0]["router_stats"]["history_bias"]
        assert set(history) == (set(NAMES) if measured else set())


def steps(model: object, press: MoERouterPress, cache: DynamicCache, first: int) -> bool:
    """Feed tokens; say whether any of them was measured."""
    before = dict(later_of(press))
    for step in range(EVERY):
        decode(model, cache, first + step, cache.layers[0].batch_size)
    return later_of(press) != before


@pytest.mark.parametrize("budget", ["uniform", "model"])
def test_what_is_no_more_as_it_was_is_not_measured(budget: str) -> None:
    model = tiny_model()
    press = make_press(experts=NAMES, budget=budget, sinks=1, recent=3)
    with press(model):
        cache = prefill(model, tokens(2, 40))
        assert steps(model, press, cache, 40)
        copied = copy.deepcopy(cache)
        cache.crop(50)
        assert steps(model, press, cache, 50)  # what was compressed is all there
        assert not steps(model, press, copied, 56)  # another cache, of which nothing is known
        cache.crop(38)  # into what no head lacks
        assert not steps(model, press, cache, 38)
        other = prefill(model, tokens(2, 40, seed=1))
        assert steps(model, press, other, 40)
        other.reorder_cache(torch.tensor([1, 0]))
        assert not steps(model, press, other, 56)


@pytest.mark.parametrize("budget", ["uniform", "model"])
def test_while_decoding_compresses_again(budget: str) -> None:
    """Each compression says anew what experts want."""
    model = tiny_model()
    press = make_press(
        experts=NAMES, budget=budget, sinks=1, recent=3, decoding=DecodingConfig(24, 4)
    )
    rates = []
    with press(model):
        cache = prefill(model, tokens(1, 40))
        for step in range(30):
            decode(model, cache, 40 + step)
            rates.append(later_of(press)["temporal"])
    assert len(set(rates[:1])) == 1 and not math.isnan(rates[0])
    assert len(set(rates)) > 30 // EVERY + 1  # it begins anew at each


class Channel(base.Expert):
    """Wants pairs by one channel of their keys."""

    def __init__(self, channel: int) -> None:
        self.name, self.channel = f"channel {channel}", channel

    def scores(self, view: view.LayerView) -> Tensor:
        return view.keys[..., self.channel].float()


def two_kinds() -> LlamaForCausalLM:
    """A model of one layer whose tokens look at those of their own kind: even ones, odd ones."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=100,
        rope_theta=1e9,  # the channels used here do not turn
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        embeddings = 0.1 * torch.randn(100, 32)
        embeddings[0::2, 0] += 1
        embeddings[1::2, 1] += 1
        model.model.embed_tokens.weight.data = embeddings
        attention = model.model.layers[0].self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.data.zero_()
            for head in range(2):
                projection.weight.data[16 * head + 6, 0] = 1
                projection.weight.data[16 * head + 7, 1] = 1
    return model


def test_gates_follow_where_the_right_expert_changes() -> None:
    """Questions about one half of a text, then about the other."""
    model, experts = two_kinds(), [Channel(6), Channel(7)]
    press = MoERouterPress(0.3, experts=experts, top_k=1, sinks=0, recent=0, window=4)
    prompt = torch.randint(0, 100, (1, 64), generator=torch.Generator().manual_seed(0))

    def ask(kind: int, num_times: int) -> dict[str, float]:
        for n in range(num_times):
            with press(model), torch.no_grad():
                cache = prefill(model, prompt)
                model(torch.tensor([[2 * n + kind]]), past_key_values=cache)
        return press.get_stats()["layer_stats"][0]["router_stats"]["history_bias"]

    even = ask(0, 4)
    assert even["channel 6"] > 0.3 and even["channel 7"] < -0.3
    odd = ask(1, 24)
    assert odd["channel 6"] < -0.1 and odd["channel 7"] > 0.1
    press.summary()

    chosen = []
    for _ in range(2):
        before = usage(press)
        ask(1, 1)
        chosen.append({name: n - before[name] for name, n in usage(press).items()})
    assert all(n["channel 7"] > n["channel 6"] for n in chosen)


def usage(press: MoERouterPress) -> dict[str, int]:
    return press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"]

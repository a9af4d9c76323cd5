"""Calibration: does it see what later tokens attend to, and find what there is to find?"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from random_router import random_router
from tiny_models import prefill, tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache

from moekv import CalibratedRouter, CalibrationConfig, MoERouterPress, calibrate
from moekv.cache.ragged import RaggedLayer
from moekv.cache.static import CompactStaticLayer
from moekv.calibration import gates
from moekv.calibration import oracle as oracle_module
from moekv.calibration import router as router_module
from moekv.calibration.calibrate import find_domains
from moekv.calibration.gates import SAY, Mixture, choice_loss, estimate, ranking_loss, train_gates
from moekv.calibration.oracle import Oracle, Reading
from moekv.calibration.ridge import Sums, fit_of, fit_ridge, solve_ridge
from moekv.calibration.router import model_fingerprint
from moekv.experts.learned import places
from moekv.ops import ScoreKind
from moekv.press.rating import Rater
from moekv.routing.shared import SharedExpertRouter

WORDS = [f"w{i}" for i in range(100)]
SMALL = CalibrationConfig(length=96, samples=256, epochs=2, batch=32, sinks=2, recent=4, window=16)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i + 3 for i, word in enumerate(WORDS)} | {"<unk>": 0}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def text(length: int, seed: int = 0) -> str:
    return " ".join(f"w{i % 100}" for i in tokens(1, length, seed)[0].tolist())


def texts(count: int) -> list[str]:
    return [text(70 + 5 * (i % 6), seed=i) for i in range(count)]


# --- What the oracle sees -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("exponent", [1.0, 2.0, math.inf])
def test_the_oracle_sees_the_attention_of_the_second_reading(
    name: str, exponent: float, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle_module, "_TILE", 24)  # a tile, and part of one
    config = dataclasses.replace(SMALL, exponent=exponent)
    model = tiny_model(name, attention="eager")
    oracle = Oracle(model, tokenizer, config)
    words = text(70)
    reading = oracle.read(words, as_turn=False)
    body = oracle.encode(words)
    cache = DynamicCache()
    ids = torch.tensor([[*body, *oracle.repeat, *body]])
    with torch.no_grad():
        model(ids[:, : len(body)], past_key_values=cache)
        out = model(ids[:, len(body) :], past_key_values=cache, output_attentions=True)
    assert reading.target.shape == (len(oracle.layers), model.config.num_key_value_heads, len(body))
    for row, layer in enumerate(oracle.layers):
        attention = out.attentions[layer.layer_idx][0, :, :, : len(body)].double()
        attention = attention.unflatten(0, (model.config.num_key_value_heads, -1)).flatten(1, 2)
        if math.isinf(exponent):
            wanted = attention.amax(1)
        else:
            wanted = attention.pow(exponent).mean(1).pow(1 / exponent)
        torch.testing.assert_close(
            reading.target[row].double(), wanted.clamp(min=1e-6).log(), atol=2e-3, rtol=1e-3
        )


def test_a_turn_of_a_chat_is_read_between_its_marks(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "w1 w2 {{ messages[0]['content'] }} w3"
    oracle = Oracle(tiny_model(), tokenizer, SMALL)
    assert oracle.before == oracle.encode("w1 w2")
    assert oracle.repeat[-1:] == oracle.encode("w3")
    assert oracle.read(text(70), as_turn=True).hidden.shape[1] == 72
    assert oracle.read(text(200), as_turn=False).hidden.shape[1] == SMALL.length


# --- The regression and the gates -----------------------------------------------------------------


def planted(router: CalibratedRouter, count: int, length: int = 120) -> list[Reading]:
    """Make readings whose targets are what `router` would say."""
    generator = torch.Generator().manual_seed(3)
    layers, hidden = len(router.layers), router.hidden_size
    shape = (layers, len(router.experts) - 1, router.num_kv_heads, length)
    where = places((length,), length, torch.device("cpu"))[0].t()
    readings = []
    for _ in range(count):
        states = torch.randn(layers, length, hidden, generator=generator)
        reading = Reading(
            states,
            where,
            torch.randn(layers, router.num_kv_heads, length, generator=generator),
            torch.randn(shape, generator=generator),
            torch.zeros(layers, router.num_kv_heads, length),
        )
        reading.target = mixed_by(router, reading)
        readings.append(reading)
    return readings


def mixed_by(router: CalibratedRouter, reading: Reading) -> Tensor:
    with torch.no_grad():
        mixed, _ = Mixture(router, torch.ones(1, router.hidden_size))(estimate(router, reading))
    return mixed


def gather(
    router: CalibratedRouter, readings: list[Reading], held_out: int = 0, domains: int = 2
) -> Sums:
    sums = Sums.empty(router, domains)
    for number, reading in enumerate(readings[held_out:]):
        sums.add(reading, number % domains)
        sums.domains.append(number % domains)
    sums.sample, sums.held_out = readings[held_out:], readings[:held_out]
    return sums


def test_ridge_finds_a_planted_linear_rule() -> None:
    model = tiny_model()
    planter = random_router(model, experts=(), top_k=1)
    planter.gain.fill_(1)
    planter.offset.zero_()
    found = random_router(model, seed=1, experts=(), top_k=1)
    fit_ridge(gather(planter, planted(planter, 12)), found, 1e-8)
    for name in ("surrogate_weight", "surrogate_place", "surrogate_novelty", "surrogate_bias"):
        torch.testing.assert_close(
            getattr(found, name), getattr(planter, name), atol=5e-3, rtol=5e-3
        )


def test_experts_are_brought_to_the_scale_of_the_targets() -> None:
    """What is comparable by one number for all heads, others by their heads' lines."""
    model = tiny_model()
    router = random_router(model)
    readings = planted(router, 6)
    for reading in readings:
        slope, level = torch.tensor([[2.0, -3.0], [0.5, 4.0]]), torch.tensor([[1.0, 2], [3, -6]])
        reading.target = slope[..., None] * reading.scores[:, 1] + level[..., None]
        reading.scores[:, 0] += 7
    fit_ridge(gather(router, readings), router, 1e-3)
    torch.testing.assert_close(router.gain[:, 2], slope, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(router.offset[:, 2], level, atol=1e-3, rtol=1e-3)
    assert (router.gain[:, 1] == 1).all()
    targets, scores = (
        torch.cat([x.flatten() for x in parts]).mean()
        for parts in ([r.target for r in readings], [r.scores[:, 0] for r in readings])
    )
    torch.testing.assert_close(
        router.offset[:, 1], (targets - scores).expand(2, 2), atol=1e-3, rtol=1e-3
    )


def test_gates_follow_the_oracle_and_what_needs_no_fit() -> None:
    router = random_router(tiny_model(), experts=["semantic", "expected"])
    (reading,) = planted(router, 1)
    given = estimate(router, reading)
    expected = router.gain[:, 2, :, None] * reading.scores[:, 1] + router.offset[:, 2, :, None]
    torch.testing.assert_close(given.scores[:, 2], expected)
    torch.testing.assert_close(given.target, reading.target + SAY * expected)
    weight, place, novelty, bias = other = [torch.randn_like(x) for x in fit_of(router)]
    given = estimate(router, reading, tuple(other))
    learned = weight @ reading.hidden.mT + place @ reading.where.t() + bias[..., None]
    learned = learned + novelty[..., None] * reading.novelty
    wanted = router.gain[:, 0, :, None] * learned + router.offset[:, 0, :, None]
    torch.testing.assert_close(given.scores[:, 0], wanted)


def test_gates_learn_to_route_where_no_even_mix_fits() -> None:
    model = tiny_model()
    planter = random_router(model, experts=("semantic", "temporal"))
    planter.gate_weight.mul_(2)
    planter.gain[:, 1:].mul_(3)
    found = random_router(model, experts=("semantic", "temporal"))
    sums = gather(planter, planted(planter, 24), held_out=4)
    found.gain.copy_(planter.gain)
    found.gate_weight.zero_()
    found.gate_bias.zero_()
    config = dataclasses.replace(SMALL, epochs=20, learning_rate=0.02, aux_loss_weight=0.001)
    fit = fit_of(found)
    with pytest.MonkeyPatch.context() as patch:  # the experts are those that were planted
        patch.setattr(gates, "solve_ridge", lambda *args: fit)
        curve = train_gates(sums, found, config)
    losses = [row["ranking_loss"] for row in curve]
    assert min(losses) < 0.7 * losses[0]
    # The best epoch's numbers were kept, whatever came after.
    judged = sums.held_out[0]
    assert ranking_loss(mixed_by(found, judged), judged.target) < 0.75 * losses[0]


def test_training_stops_early_and_keeps_the_best_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    router = random_router(tiny_model())
    sums = gather(router, planted(router, 6), held_out=1)
    losses = iter((0.5, 0.4, 0.45, 0.39, 0.41, 0.4, 0.39, 0.5, 0.1))
    weights = []

    def ranking_loss(*_: Tensor) -> float:
        weights.append(router.gate_weight.clone())  # as the epochs before have left them
        return next(losses)

    monkeypatch.setattr(gates, "ranking_loss", ranking_loss)
    curve = train_gates(sums, router, dataclasses.replace(SMALL, epochs=20))
    assert [row["ranking_loss"] for row in curve] == [0.5, 0.4, 0.45, 0.39, 0.41, 0.4, 0.39, 0.5]
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise([*weights, router.gate_weight])]
    assert changed == [False, True, False, True, False, False, False, False]


def test_gates_are_trained_on_what_the_fit_is_out_of_its_domain() -> None:
    """In each of two domains a rule of its own holds, so that a fit knows only where it was."""
    model = tiny_model()
    rules = [random_router(model, seed=seed, experts=("expected",)) for seed in (0, 1)]
    readings = [planted(rules[i % 2], 1)[0] for i in range(12)]
    for reading in readings:
        reading.scores[:, 0] = reading.target  # who needs no fit is right everywhere
    sums = gather(rules[0], readings)
    found = random_router(model, seed=2, experts=("expected",))
    found.gate_weight.zero_()
    found.gate_bias.zero_()
    fit_ridge(sums, found, 1e-3)
    gram, moment = sums.total(without=0)
    torch.testing.assert_close(gram, sums.gram[1].double())
    torch.testing.assert_close(moment, sums.moment[1].double())
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "estimate", lambda *args: seen.append(args[2:]) or estimate(*args))
        curve = train_gates(sums, found, dataclasses.replace(SMALL, epochs=8, learning_rate=0.02))
    for number in range(12):
        own = solve_ridge(*sums.total(without=number % 2), 64, SMALL.ridge)
        for part, wanted in zip(seen[number][0], own, strict=True):
            torch.testing.assert_close(part, wanted)
    assert min(row["ranking_loss"] for row in curve) < curve[0]["ranking_loss"]
    trust = [
        found.gate(layer, torch.empty(0))(readings[0].hidden[layer][None]).shares.mean((0, 1))
        for layer in range(2)
    ]
    assert all(share[1] > 0.6 for share in trust)


def test_a_domain_alone_is_fitted_with_itself() -> None:
    router = random_router(tiny_model())
    sums = gather(router, planted(router, 3), domains=1)
    torch.testing.assert_close(sums.total(without=0), sums.total())


def test_texts_that_are_alike_are_one_domain() -> None:
    centres = torch.eye(3, 16)
    noise = 0.1 * torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    kinds = [i % 3 for i in range(30)]
    found = find_domains(5 + centres[kinds] + noise, 3)
    assert len(set(zip(kinds, found, strict=True))) == 3
    assert set(find_domains(torch.ones(2, 4), 3)) == {0}


def test_choice_loss_is_least_where_the_choices_are_the_targets() -> None:
    target = torch.randn(400, generator=torch.Generator().manual_seed(1))
    losses = [float(choice_loss(x, target)) for x in (3 * target, target, 0 * target, -target)]
    assert losses == sorted(losses)
    # By hand: thresholds at the 200th, 300th and 360th of 400, one unit apart from their next.
    target = torch.arange(400.0)
    margins = [(target - rank) / gates._SOFT for rank in (199, 299, 359)]
    wanted = sum(torch.nn.functional.softplus(torch.where(m > 0, -m, m)).mean() for m in margins)
    torch.testing.assert_close(choice_loss(target, target), wanted / 3)


def test_ranking_loss_by_hand() -> None:
    target = torch.arange(20.0)
    assert ranking_loss(target * 3 - 1, target) == 0
    # Of the best 10, 5 and 2, the reverse order has none.
    assert ranking_loss(-target, target) == 1
    swapped = target.clone()
    swapped[[9, 10]] = swapped[[10, 9]]  # across the boundary of the best 10 alone
    assert ranking_loss(swapped, target) == pytest.approx(0.1 / 3)


# --- All of it ------------------------------------------------------------------------------------


def test_calibration_ranks_better_than_chance_and_is_repeatable(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model()
    first = calibrate(model, tokenizer, texts(24), config=SMALL, progress=False)
    again = calibrate(model, tokenizer, texts(24), config=SMALL, progress=False)
    for (name, one), (_, other) in zip(
        first.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    curve = first.recipe["curve"]
    assert len(curve) == SMALL.epochs + 1
    # Chance misses (0.5 + 0.75 + 0.9) / 3 = 0.717; a model of random weights has little to find.
    assert min(row["ranking_loss"] for row in curve) < 0.7
    assert first.recipe["num_texts"] == 24


def test_an_interrupted_calibration_goes_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = tiny_model(), tmp_path / "checkpoint.pt"
    whole = calibrate(model, tokenizer, texts(12), config=SMALL, progress=False)
    read, calls = Oracle.read, []

    def fail_at_the_tenth(self: Oracle, words: str, *, as_turn: bool) -> Reading:
        calls.append(words)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return read(self, words, as_turn=as_turn)

    monkeypatch.setattr(Oracle, "read", fail_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, texts(12), config=SMALL, checkpoint=file, progress=False)
    with pytest.raises(ValueError, match="of another model, other texts or other settings"):
        calibrate(model, tokenizer, texts(11), config=SMALL, checkpoint=file, progress=False)
    resumed = calibrate(model, tokenizer, texts(12), config=SMALL, checkpoint=file, progress=False)
    assert len(calls) == 10 + 4  # texts 9 to 12
    for name, one in whole.state_dict().items():
        assert torch.equal(one, resumed.state_dict()[name]), name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"length": 3}, "length an integer >= 64, got 3"),
        ({"exponent": 0.5}, "exponent between 1 and inf, got 0.5"),
        ({"held_out": 0.9}, "held_out between 0 and 0.5, got 0.9"),
        ({"top_k": True, "epochs": -1}, "epochs an integer >= 0, got -1"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CalibrationConfig(**options)


def test_too_few_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="two or more texts of 64 tokens or more, got 1"):
        calibrate(tiny_model(), tokenizer, ["w1 w2", text(80)], config=SMALL, progress=False)


# --- What a press does with it --------------------------------------------------------------------


def test_the_shared_expert_has_half_of_the_weight() -> None:
    router = SharedExpertRouter(16, 3, 2)
    torch.nn.init.normal_(router.gate.weight)
    hidden = torch.randn(2, 7, 16)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    out = router(hidden, mask)
    assert out.probs.shape == (2, 7, 4)
    assert out.experts.shape == (2, 7, 3)
    torch.testing.assert_close(out.weights.sum(-1), mask.float())
    torch.testing.assert_close(out.probs.sum(-1), mask.float())
    assert (out.weights[..., 0] == 0.5 * mask).all()
    assert (out.experts[..., 0] == 0).all()
    assert (out.experts[..., 1:] >= 1).all()
    assert out.load.tolist()[0] == 11
    assert out.load[1:].sum() == 22
    torch.testing.assert_close(out.probs[..., 0], 0.5 * mask)
    torch.testing.assert_close(out.entropy, torch.special.entr(out.probs).sum())


@pytest.mark.parametrize("padded", [False, True])
def test_a_press_scores_what_calibration_fitted(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    router = random_router(model)
    ids = tokens(2, 60)
    padding = [0, 9 * padded]
    mask = (torch.arange(60) >= torch.tensor(padding)[:, None]).long()
    got: dict[int, Tensor] = {}
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    unlike: dict[int, Tensor] = {}
    look, mix = Rater.look, Rater._mix
    states_of: dict[int, Tensor] = {}

    def spy_look(self: Any, view: Any) -> Any:
        states_of[view.module.layer_idx] = view.hidden_states
        return look(self, view)

    def spy_mix(self: Any, looks: Any, scores: Tensor, routed: Any) -> Any:
        mixed = mix(self, looks, scores, routed)
        for i, each in enumerate(looks):
            index = each.view.module.layer_idx
            got[index] = mixed[0][i]
            seen[index] = states_of[index], scores[1:, 2 * i : 2 * i + 2]
            unlike[index] = each.view.scores_of(ScoreKind.DIVERSITY)
        return mixed

    monkeypatch.setattr(Rater, "look", spy_look)
    monkeypatch.setattr(Rater, "_mix", spy_mix)
    press = MoERouterPress(0.5, router=router)
    with press(model):
        prefill(model, ids, attention_mask=mask)
    for index in range(2):
        hidden, scores = seen[index]
        for row in range(2):
            length = 60 - padding[row]
            real = slice(padding[row], None)
            where = places((length,), length, torch.device("cpu"))[0].t()
            states, pieces = hidden[row, real], scores[:, row, :, real]
            reading = Reading(
                states.expand(2, *states.shape),
                where,
                unlike[index][row, :, real].expand(2, -1, -1),
                pieces.expand(2, *pieces.shape),
                torch.zeros(2, 2, length),
            )
            torch.testing.assert_close(
                got[index][row][:, real],
                mixed_by(router, reading)[index],
                atol=1e-3,
                rtol=1e-4,
                msg=f"layer {index}",
            )


def test_hidden_states_are_read_once_for_the_gate_and_for_learned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, counted = tiny_model(), []
    router = random_router(model)
    linear = torch.nn.functional.linear

    def count(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        counted.append(tuple(weight.shape))
        return linear(hidden, weight, *bias)

    monkeypatch.setattr(router_module.functional, "linear", count)
    with MoERouterPress(0.5, router=router)(model), torch.no_grad():
        model(torch.randint(0, 100, (2, 40)))
    assert counted.count((2 + 3, 64)) == len(router.layers)
    hidden = torch.randn(2, 9, 64)
    wanted = linear(hidden, torch.cat([router.surrogate_weight[1], router.gate_weight[1]]))
    projected = router.project(1, hidden)
    decided = router.gate(1, hidden).decide(projected, None).logits
    torch.testing.assert_close(decided, wanted[..., 2:] + router.gate_bias[1])
    torch.testing.assert_close(router.gate(1, hidden)(hidden).logits, decided)
    read = (wanted[..., :2] + router.surrogate_bias[1]).transpose(1, 2)
    torch.testing.assert_close(router.read(1, projected), read)


def test_one_threshold_over_the_model_by_default() -> None:
    model = tiny_model()
    press = MoERouterPress(0.5, router=random_router(model))
    with press(model):
        cache = prefill(model, tokens(1, 60))
    assert all(isinstance(layer, RaggedLayer) for layer in cache.layers)
    assert sum(layer.stored_keys.shape[0] for layer in cache.layers) == 2 * 2 * 30
    stats = press.get_stats()
    assert stats["router"] == "calibrated for a tiny model"
    usage = stats["layer_stats"][0]["expert_compression_stats"]["expert_usage"]
    assert list(usage) == ["learned", "expected", "semantic"]
    assert sum(usage.values()) == pytest.approx(1)
    choices = stats["layer_stats"][0]["router_stats"]["expert_usage_count"]
    assert sum(choices.values()) == 2 * 60 and max(choices.values()) <= 60
    static = StaticCache(config=model.config, max_cache_len=64)
    with press(model), torch.no_grad():
        model(tokens(1, 60), past_key_values=static)
    assert all(isinstance(layer, CompactStaticLayer) for layer in static.layers)
    eager = tiny_model(attention="eager")
    with press_for_eager(eager) as press:
        cache = prefill(eager, tokens(1, 60))
    assert [layer.keys.shape[2] for layer in cache.layers] == [30, 30]


class press_for_eager:  # noqa: N801
    def __init__(self, model: Any) -> None:
        self.press = MoERouterPress(0.5, router=random_router(model))
        self.block = self.press(model)

    def __enter__(self) -> MoERouterPress:
        self.block.__enter__()
        return self.press

    def __exit__(self, *error: Any) -> None:
        self.block.__exit__(*error)


@pytest.mark.parametrize("budget", ["uniform", "head", "model"])
def test_padded_rows_equal_single_ones(budget: str) -> None:
    model = tiny_model()
    rows = [tokens(1, n, seed=n) for n in (60, 41)]
    padded = torch.zeros(2, 60, dtype=torch.long)
    mask = torch.zeros(2, 60, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 60 - row.shape[1] :], mask[i, 60 - row.shape[1] :] = row[0], 1
    router = random_router(model)
    with MoERouterPress(0.5, router=router, budget=budget)(model):
        batch = prefill(model, padded, attention_mask=mask)
    for i, row in enumerate(rows):
        with MoERouterPress(0.5, router=router, budget=budget)(model):
            single = prefill(model, row)
        for one, both in zip(single.layers, batch.layers, strict=True):
            if isinstance(one, RaggedLayer):
                lengths = (one.end - one.begin)[0]
            else:
                lengths = torch.full((2,), one.keys.shape[2])
            assert torch.equal((both.end - both.begin)[i], lengths)


def test_a_router_finds_its_model_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = tiny_model(), tiny_model("llama_mha")
    random_router(model).save_pretrained(tmp_path / model_fingerprint(model))
    monkeypatch.setattr(router_module, "SHIPPED", tmp_path)
    names = {}
    for each in (model, other):
        press = MoERouterPress(0.5)
        with press(each):
            prefill(each, tokens(1, 60))
        names[each] = press.get_stats()["router"]
    assert capsys.readouterr().out == ""
    assert names[model] == "calibrated for a tiny model"
    assert names[other] == "shared expert, not calibrated"
    for options in ({"num_experts": 4}, {"router_type": "base"}, {"policy": "dominant"}):
        press = MoERouterPress(0.5, **options)
        with press(model):
            prefill(model, tokens(1, 60))
        assert "not calibrated" in press.get_stats()["router"]
    press = MoERouterPress(0.5, router=None)
    with press(model):
        prefill(model, tokens(1, 60))
    assert press.get_stats()["router"] == "shared expert, not calibrated"


def test_saving_and_loading(tmp_path: Path) -> None:
    model = tiny_model()
    router = random_router(model)
    router.save_pretrained(tmp_path)
    loaded = CalibratedRouter.from_pretrained(tmp_path)
    assert loaded.model == router.model
    assert loaded.recipe == router.recipe
    for name, tensor in router.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    caches = []
    for given in (router, str(tmp_path)):
        with MoERouterPress(0.5, router=given)(model):
            caches.append(prefill(model, tokens(1, 60)))
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.stored_keys, other.stored_keys)

"""Calibration: does it see what later tokens attend to, and find what there is to find?"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import prefill, tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache

import moekv.calibrated as calibrated_module
import moekv.calibration as calibration
from moekv import CalibratedRouter, CalibrationConfig, MoERouterPress, calibrate
from moekv.calibrated import model_fingerprint, places
from moekv.calibration import (
    Mixture,
    Oracle,
    Reading,
    Sums,
    fit_ridge,
    ranking_loss,
    train_gates,
)
from moekv.layers import RaggedLayer
from moekv.routers import SharedExpertRouter
from moekv.static import CompactStaticLayer

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


def random_router(model: Any, seed: int = 0, **options: Any) -> CalibratedRouter:
    """Build a router for a tiny model whose every number matters."""
    options = {"experts": ["selective", "semantic", "temporal"], "top_k": 2} | options
    router = CalibratedRouter(
        model=model_fingerprint(model),
        layers=list(range(model.config.num_hidden_layers)),
        hidden_size=model.config.hidden_size,
        num_kv_heads=model.config.num_key_value_heads,
        recipe={"model_name": "a tiny model"},
        **options,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return router


# --- What the oracle sees -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("exponent", [1.0, 2.0, math.inf])
def test_the_oracle_sees_the_attention_of_the_second_reading(
    name: str, exponent: float, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_TILE", 24)  # a tile, and part of one
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
    shape = (layers, len(router.routed), router.num_kv_heads, length)
    where = places((length,), length, torch.device("cpu"))[0].t()
    readings = []
    for _ in range(count):
        states = torch.randn(layers, length, hidden, generator=generator)
        reading = Reading(states, where, torch.randn(shape, generator=generator), torch.empty(0))
        with torch.no_grad():
            reading.target, _ = Mixture(router, reading)(reading)
        readings.append(reading)
    return readings


def gather(router: CalibratedRouter, readings: list[Reading], held_out: int = 0) -> Sums:
    width = router.hidden_size + 3 + len(router.routed) * router.num_kv_heads + 1
    sums = Sums(
        torch.zeros(len(router.layers), width, width, dtype=torch.float64),
        torch.zeros(len(router.layers), width, router.num_kv_heads, dtype=torch.float64),
    )
    for reading in readings[held_out:]:
        calibration._add(sums, reading)
    sums.sample, sums.held_out = readings[held_out:], readings[:held_out]
    return sums


def test_ridge_finds_a_planted_linear_rule() -> None:
    model = tiny_model()
    planter = random_router(model, top_k=3)
    planter.gate_weight.zero_()
    planter.gate_bias.zero_()  # even gates: all is linear
    planter.offset.zero_()
    found = random_router(model, seed=1, top_k=3)
    found.gate_weight.zero_()
    found.gate_bias.zero_()
    found.offset.zero_()
    fit_ridge(gather(planter, planted(planter, 12)), found, 1e-8)
    for name in ("surrogate_weight", "surrogate_place", "gain"):
        torch.testing.assert_close(
            getattr(found, name), getattr(planter, name), atol=5e-3, rtol=5e-3
        )


def test_gates_learn_to_route_where_no_even_mix_fits() -> None:
    model = tiny_model()
    planter = random_router(model)
    planter.surrogate_weight.zero_()
    planter.gate_weight.mul_(2)
    readings = planted(planter, 24)
    sums = gather(planter, readings, held_out=4)
    found = random_router(model, seed=1)
    found.gate_weight.zero_()
    found.gate_bias.zero_()
    found.offset.zero_()
    fit_ridge(sums, found, 1e-4)
    config = dataclasses.replace(SMALL, epochs=20, learning_rate=0.02, aux_loss_weight=0.001)
    curve = train_gates(sums, found, config)
    losses = [row["ranking_loss"] for row in curve]
    assert min(losses) < 0.7 * losses[0]
    # The best epoch's numbers were kept, whatever came after.
    judged = sums.held_out[0]
    with torch.no_grad():
        mixed, _ = Mixture(found, judged)(judged)
    assert ranking_loss(mixed, judged.target) < 0.75 * losses[0]


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


def test_a_press_scores_what_calibration_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    router = random_router(model)
    ids = tokens(2, 60)
    got: dict[int, Tensor] = {}
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    mix = MoERouterPress._mix

    def spy(self: Any, experts: Any, scores: Tensor, routed: Any, view: Any) -> Any:
        mixed = mix(self, experts, scores, routed, view)
        index = view.module.layer_idx
        got[index] = mixed[0] - scores[1]  # `expected`, which is not fitted
        seen[index] = (view.hidden_states, scores[2:])
        return mixed

    monkeypatch.setattr(MoERouterPress, "_mix", spy)
    press = MoERouterPress(0.5, router=router)
    with press(model):
        prefill(model, ids)
    where = places((60,), 60, torch.device("cpu"))[0].t()
    for index in range(2):
        hidden, scores = seen[index]
        for row in range(2):
            states, pieces = (x.expand(2, *x.shape) for x in (hidden[row], scores[:, row]))
            reading = Reading(states, where, pieces, torch.empty(0))
            with torch.no_grad():
                wanted, _ = Mixture(router, reading)(reading)
            torch.testing.assert_close(
                got[index][row], wanted[index], atol=1e-3, rtol=1e-4, msg=f"layer {index}"
            )


@pytest.mark.parametrize("shared", [(), ("expected",)])
def test_what_is_shared_has_as_much_say_as_what_was_fitted(shared: tuple[str, ...]) -> None:
    router = random_router(tiny_model(), experts=("semantic", "temporal"), top_k=2, shared=shared)
    assert [expert.name for expert in router.experts] == [
        "learned",
        *shared,
        "semantic",
        "temporal",
    ]
    gain, offset = router.scale(1, torch.device("cpu"))
    routed = router.gate(1, torch.zeros(1, 1, 64))(torch.randn(1, 5, 64))
    say = routed.shares[0, :, :, None] * gain  # [T, E, H]
    torch.testing.assert_close(say[:, : 1 + len(shared)], torch.ones(5, 1 + len(shared), 2))
    # The weights of the routed ones, which sum to 1, times what was fitted.
    weights = routed.shares[0, :, -2:, None] * (2 + len(shared))
    torch.testing.assert_close(weights.sum(1), torch.ones(5, 1))
    torch.testing.assert_close(say[:, -2:], weights * router.gain[1])
    assert not offset[: 1 + len(shared)].any()


def test_shared_experts_have_comparable_scores() -> None:
    with pytest.raises(ValueError, match=r"comparable scores, got \['semantic'\]"):
        random_router(tiny_model(), shared=["expected", "semantic"])


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
    assert list(usage) == ["learned", "expected", "selective", "semantic", "temporal"]
    assert usage["learned"] == usage["expected"] == pytest.approx(1 / 3)
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
    monkeypatch.setattr(calibrated_module, "SHIPPED", tmp_path)
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

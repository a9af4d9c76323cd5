"""Calibrated routers: what a press does with one, and how it comes by it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_cases import mixed_by
from random_router import random_router
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from transformers import StaticCache

from moekv import CalibratedRouter, MoERouterPress
from moekv.cache.ragged import RaggedLayer
from moekv.cache.static import CompactStaticLayer
from moekv.calibration import router as router_module
from moekv.calibration.oracle import Reading
from moekv.experts.learned import places
from moekv.ops import ScoreKind
from moekv.press.rater import Rater


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
    prepare, mix = Rater.prepare, Rater._mix
    states_of: dict[int, Tensor] = {}

    def spy_prepare(self: Any, view: Any) -> Any:
        states_of[view.module.layer_idx] = view.hidden_states
        return prepare(self, view)

    def spy_mix(self: Any, layers: Any, scores: Tensor, *args: Any, **options: Any) -> Any:
        mixed = mix(self, layers, scores, *args, **options)
        for i, each in enumerate(layers):
            index = each.view.module.layer_idx
            got[index] = mixed[0].scores[0, 2 * i : 2 * i + 2]
            seen[index] = states_of[index], scores[1:, 2 * i : 2 * i + 2]
            unlike[index] = each.view.scores_of(ScoreKind.DIVERSITY)
        return mixed

    monkeypatch.setattr(Rater, "prepare", spy_prepare)
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
    decided = router.gate(1, hidden).logits(projected)
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
    random_router(model).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(router_module, "SHIPPED", tmp_path)
    names = {}
    for each in (model, other):
        press = MoERouterPress(0.5)
        with press(each):
            prefill(each, tokens(1, 60))
        names[each] = press.get_stats()["router"]
    assert capsys.readouterr().out == ""
    assert names[model] == "calibrated for a tiny model"
    assert names[other] == "none, not calibrated"
    for options in ({"num_experts": 4}, {"router_type": "base"}, {"policy": "dominant"}):
        press = MoERouterPress(0.5, **options)
        with press(model):
            prefill(model, tokens(1, 60))
        assert "not calibrated" in press.get_stats()["router"]
    press = MoERouterPress(0.5, router=None)
    with press(model):
        prefill(model, tokens(1, 60))
    assert press.get_stats()["router"] == "none, not calibrated"


def test_saving_and_loading(tmp_path: Path) -> None:
    model = tiny_model()
    router = random_router(model)
    router.save_pretrained(tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "the tensors' file is as readable as the others"
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


def test_stdout_is_left_alone_while_a_router_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the whole process's: what other threads print meanwhile is seen."""
    random_router(tiny_model()).save_pretrained(tmp_path)
    load, seen = CalibratedRouter._load_as_safetensor, []

    def watch(*args: Any) -> Any:
        seen.append(sys.stdout)
        return load(*args)

    monkeypatch.setattr(CalibratedRouter, "_load_as_safetensor", watch)
    before = sys.stdout
    CalibratedRouter.from_pretrained(tmp_path)
    assert seen == [before] and capsys.readouterr().out == ""


def test_pickles_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got a pickle of torch"):
        CalibratedRouter._load_as_pickle(None, str(tmp_path / "pytorch_model.bin"), "cpu", True)

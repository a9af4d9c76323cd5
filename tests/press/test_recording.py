"""The record of a prefill is what the cache holds, and names the experts that picked the pairs."""

import copy
from typing import Any

import pytest
import torch
from random_router import random_router
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

from moekv import DecodingConfig, Expert, LayerView, MoERouterPress
from moekv.cache.ragged import RaggedLayer

LENGTH = 40
EXPERTS = ["aggressive", "selective", "semantic", "temporal"]


def padded_mask() -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    return mask


def pairs_of(layer: Any) -> list[Tensor]:
    """The keys [n, D] that each head of each row holds."""
    if not isinstance(layer, RaggedLayer):
        return list(layer.keys.flatten(0, 1))
    keys, _, lengths = layer.to_dense()
    rows = zip(keys.flatten(0, 1), lengths.flatten().tolist(), strict=True)
    return [own[len(own) - length :] for own, length in rows]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": "uniform"},
        {"budget": "head"},
        {"budget": "layer", "experts": EXPERTS},
        {"budget": "model", "experts": EXPERTS},
        {"budget": "model", "experts": EXPERTS, "streaming": True},
        {"budget": "uniform", "streaming": True},
        {"policy": "dominant", "num_experts": 3},
        {"decoding": DecodingConfig(target=12, interval=4)},
        {"compression_ratio": 0.0},
        {"num_experts": 4, "shared": "expected", "router": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", ["one", "padded"])
def test_the_record_is_what_the_cache_holds(options: dict[str, Any], rows: str) -> None:
    model, press = tiny_model(), MoERouterPress(**options)
    input_ids = tokens(2 if rows == "padded" else 1, LENGTH)
    more = {"attention_mask": padded_mask()} if rows == "padded" else {}
    whole = prefill(model, input_ids, **more)
    with press(model, record=True):
        cache = prefill(model, input_ids, **more)
    recording = press.recording()
    assert recording.num_tokens == LENGTH
    assert recording.starts == ([0, 7] if rows == "padded" else [0])
    compression = press.get_stats()["compression"]
    assert recording.bytes_before == compression["bytes_before"]
    assert recording.bytes_after == compression["bytes_after"]
    names = list(press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"])
    assert list(recording.experts) == names
    assert [layer.index for layer in recording.layers] == [0, 1]
    everything = options.get("compression_ratio") == 0.0
    for layer, held, full in zip(recording.layers, cache.layers, whole.layers, strict=True):
        assert layer.kept.shape == layer.speakers.shape == full.keys.shape[:3]
        assert int(layer.speakers.max()) < len(names)
        torch.testing.assert_close(layer.weights.sum(-1), torch.ones(len(input_ids)))
        if everything and rows == "padded":  # all that is real; the cache holds padding as well
            assert layer.kept.sum() == 2 * (LENGTH + LENGTH - 7)
            continue
        kept = zip(full.keys.flatten(0, 1), layer.kept.flatten(0, 1), strict=True)
        for own, (keys, mask) in zip(pairs_of(held), kept, strict=True):
            assert torch.equal(own, keys[mask])


def test_a_static_cache_is_recorded() -> None:
    model, press = tiny_model(), MoERouterPress()
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
    with press(model, record=True), torch.no_grad():
        model(tokens(1, LENGTH), past_key_values=cache)
    assert [layer.kept.sum(-1).tolist() for layer in press.recording().layers] == [[[20, 20]]] * 2


class Fond(Expert):
    """Wants one position above all others, which it tells apart by nothing."""

    def __init__(self, name: str, position: int) -> None:
        self.name, self.position = name, position

    def scores(self, view: LayerView) -> Tensor:
        scores = torch.linspace(1, 0, view.keys.shape[2]).expand(view.keys.shape[:3]).clone()
        scores[..., self.position] = 9.0
        return scores


@pytest.mark.parametrize("shared", [None, "expected"])
@pytest.mark.parametrize("budget", ["uniform", "head", "model"])
def test_experts_speak_for_what_they_want_most(shared: str | None, budget: str) -> None:
    experts = [Fond("early", 11), Fond("late", 19)]
    options = {"shared": shared, "router": None, "budget": budget, "sinks": 0, "recent": 0}
    press = MoERouterPress(experts=experts, **options)
    model = tiny_model()
    with press(model, record=True):
        prefill(model, tokens(1, LENGTH))
    recording = press.recording()
    names = [x for x in ("expected", "early", "late") if x != "expected" or shared]
    assert list(recording.experts) == names
    spoken = torch.stack(
        [x.speakers[x.kept].bincount(minlength=len(names)) for x in recording.layers]
    ).sum(0)
    if shared is not None:  # which has nine tenths of the budget
        assert spoken[0] > spoken[1:].sum() > 0
        return
    for layer in recording.layers:
        for position, name in ((11, "early"), (19, "late")):
            assert layer.kept[..., position].all()
            assert (layer.speakers[..., position] == names.index(name)).all()


def test_experts_of_a_calibrated_router_speak_by_their_weights() -> None:
    model = tiny_model()
    router = random_router(model)
    press = MoERouterPress(router=router)
    with press(model, record=True):
        prefill(model, tokens(1, LENGTH))
    recording = press.recording()
    assert list(recording.experts) == [expert.name for expert in router.experts]
    used = torch.cat([layer.speakers.flatten() for layer in recording.layers]).unique()
    assert len(used) > 1
    for layer in recording.layers:  # a token's expert is the same in every head
        assert (layer.speakers == layer.speakers[:, :1]).all()


def test_the_last_prefill_is_recorded_and_the_next_block_forgets_it() -> None:
    model, press = tiny_model(), MoERouterPress()
    with press(model, record=True):
        prefill(model, tokens(1, 30))
        model.generate(tokens(1, LENGTH), max_new_tokens=3, do_sample=False)
    assert press.recording().num_tokens == LENGTH
    assert press.recording().press == repr(press)
    with pytest.raises(RuntimeError, match="record=True"):
        copy.deepcopy(press).recording()  # too large to be copied about
    with press(model):
        prefill(model, tokens(1, 30))
    with pytest.raises(RuntimeError, match="record=True"):
        press.recording()


def test_recording_changes_nothing() -> None:
    model, input_ids = tiny_model(), tokens(1, LENGTH)
    caches: list[DynamicCache] = []
    for record in (False, True):
        with MoERouterPress(experts=EXPERTS, budget="model")(model, record=record):
            caches.append(prefill(model, input_ids))
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(one.to_dense()[0], other.to_dense()[0])

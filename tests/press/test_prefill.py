"""A prefill: what stays of it, what is freed when, and that nothing waits."""

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from press_probes import ALL, LENGTH, Spy, compress, make_press
from tiny_models import prefill, tiny_model, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekv import LayerView, MoERouterPress
from moekv.models.hooks import find_layers
from moekv.press import rater
from moekv.routing.registry import ROUTERS


@settings(max_examples=25)
@given(length=st.integers(1, 70), ratio=st.floats(0, 0.999))
def test_every_head_keeps_exactly_the_budget(length: int, ratio: float) -> None:
    model = tiny_model()
    press = make_press(ratio, experts=ALL, window=9, budget="uniform")
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
    with make_press(experts=[spy, "semantic"], budget="uniform")(model):
        cache = prefill(model, tokens(1, LENGTH))
        gc.collect()
        assert [ref() for ref in spy.keys] == [None, None]
    for layer in cache.layers:
        bytes_held = layer.keys.untyped_storage().nbytes()
        assert bytes_held == 2 * (LENGTH // 2) * 16 * 4


def test_what_waits_for_further_layers_is_not_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer's hidden states and queries nothing is held when the next one runs."""
    model = tiny_model()
    with MoERouterPress(0.5)(model):
        prefill(model, tokens(1, 40))  # learns how its layers rotate
    prepare = rater.Rater.prepare
    seen: list[weakref.ref[Tensor]] = []

    def spy(self: MoERouterPress, view: LayerView) -> Any:
        gc.collect()
        assert not [ref for ref in seen if ref() is not None]
        assert view.asked is not None
        large = [view.hidden_states, view.asked, view.asked._base]
        seen.extend(weakref.ref(x) for x in large if x is not None)
        return prepare(self, view)

    monkeypatch.setattr(rater.Rater, "prepare", spy)
    with MoERouterPress(0.5)(model):
        prefill(model, tokens(2, 40))
    assert len(seen) >= 2 * len(find_layers(model)[1])


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

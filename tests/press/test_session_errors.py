"""Blocks that cannot begin, and forwards in a block that nothing would be made of."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import peer
from refusals import LENGTH, assert_untouched, lengths, refuse_block
from tiny_models import prefill, tiny_model, tokens
from transformers import DynamicCache

from moekv import DecodingConfig, MoERouterPress
from moekv.press.session import Session


def test_one_press_in_two_blocks() -> None:
    model, other, press = tiny_model(), tiny_model("qwen2"), MoERouterPress(budget="uniform")
    for second in (model, other):
        with press(model):
            refuse_block(RuntimeError, "one block at a time", second, press)
            cache = prefill(model, tokens(1, LENGTH))  # the outer block goes on
        assert lengths(cache) == [LENGTH // 2] * 2 and cache.get_seq_length() == LENGTH
    press.reset_stats()
    assert_untouched(model, press)


@pytest.mark.parametrize("outer", [MoERouterPress, peer("KnormPress")])
def test_nested_presses(outer: Callable[..., Any]) -> None:
    model, press = tiny_model(), MoERouterPress()
    options = {"budget": "uniform"} if outer is MoERouterPress else {}
    with outer(compression_ratio=0.5, **options)(model):
        refuse_block(RuntimeError, "without an open press", model, press)
        cache = prefill(model, tokens(1, LENGTH))
    assert lengths(cache) == [LENGTH // 2] * 2
    assert_untouched(model, press)


def by_hand(model: Any, input_ids: torch.Tensor, cache: DynamicCache) -> None:
    position = torch.arange(input_ids.shape[1])[None] + cache.get_seq_length()
    states = model.model.embed_tokens(input_ids)
    turns = model.model.rotary_emb(states, position)
    for layer in model.model.layers:
        states = layer(
            states,
            position_embeddings=turns,
            position_ids=position,
            past_key_values=cache,
            cache_position=position[0],
        )


@torch.no_grad()
@pytest.mark.parametrize("way", ["decoder", "layers"])
def test_forwards_past_the_hooks(way: str) -> None:
    model, ids, cache = tiny_model(), tokens(1, LENGTH), DynamicCache()

    def run(input_ids: torch.Tensor) -> None:
        if way == "layers":
            by_hand(model, input_ids, cache)
        else:
            model.model.forward(input_ids, past_key_values=cache)

    press = MoERouterPress(budget="uniform")
    with press(model), pytest.raises(RuntimeError, match="model or its decoder to be called"):
        run(ids)
    cache = DynamicCache()
    with MoERouterPress(0.0)(model):  # nothing to do
        run(ids)
    with MoERouterPress(decoding=DecodingConfig(8, 1))(model):
        with pytest.raises(RuntimeError, match="model or its decoder to be called"):
            run(ids[:, :1])
        model.model(tokens(1, LENGTH), past_key_values=DynamicCache())  # which goes on as usual
    assert_untouched(model, press)


def test_cache_changed_by_another_press() -> None:
    model, press, cache = tiny_model(), MoERouterPress(), DynamicCache()
    message = "another hook has changed"
    other = peer("KnormPress")(0.25)
    with pytest.raises(RuntimeError, match=message), press(model), other(model):
        model(tokens(1, LENGTH), past_key_values=cache)
    # The other press has done its work, but in the last layer; this one none.
    assert lengths(cache) == [LENGTH * 3 // 4, LENGTH]
    assert_untouched(model, press)


def test_another_model() -> None:
    model, press = tiny_model(), MoERouterPress()
    with press(model):
        prefill(model, tokens(1, LENGTH))
    other = tiny_model("qwen2")
    refuse_block(RuntimeError, r"got another: call reset_stats\(\)", other, press)
    press.reset_stats()
    assert_untouched(other, press)


def test_no_cache() -> None:
    model, press = tiny_model(), MoERouterPress()
    with pytest.raises(RuntimeError, match="use_cache=True"), press(model):
        model(tokens(1, LENGTH), use_cache=False)
    assert_untouched(model, press)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(RuntimeError, match="gradient checkpointing.*makes none"), press(model):
        model(tokens(1, LENGTH), use_cache=True)


def test_prefill_outside_of_the_block() -> None:
    model, press = tiny_model(), MoERouterPress()
    cache = prefill(model, tokens(1, LENGTH))
    message = r"compressed nothing: .* got 1 token\(s\) for a cache that holds 40, fed outside"
    with press(model), torch.no_grad():
        for step in range(2):
            with pytest.raises(RuntimeError, match=message):
                model(tokens(1, 1, seed=step), past_key_values=cache)
            assert cache.get_seq_length() == LENGTH  # nothing has run
    assert_untouched(model, press, cache)
    with press(model):
        pass  # nothing fed, nothing to complain about


@pytest.mark.parametrize("length", [LENGTH, 3])  # 3: nothing has to leave
def test_prefill_outside_of_the_block_beside_one_inside(length: int) -> None:
    model, press = tiny_model(), MoERouterPress()
    outside = prefill(model, tokens(1, LENGTH))
    with press(model), torch.no_grad():
        inside = prefill(model, tokens(1, length))
        with pytest.raises(RuntimeError, match="holds 40, fed outside"):
            model(tokens(1, 1), past_key_values=outside)
        for cache in (inside, copy.deepcopy(inside)):
            model(tokens(1, 1), past_key_values=cache)
            assert cache.get_seq_length() == length + 1
    assert outside.get_seq_length() == LENGTH


@torch.no_grad()
@pytest.mark.parametrize("before", ["", "a prefill"])
def test_hooks_that_somebody_removes(before: str) -> None:
    model, ids, press = tiny_model(), tokens(1, LENGTH), MoERouterPress(budget="uniform")
    with press(model):
        if before:
            model(ids, past_key_values=DynamicCache())
        for module in model.modules():  # as functions that remove all hooks do
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        with pytest.raises(RuntimeError, match="block's hooks where it has put them"):
            model(ids, past_key_values=DynamicCache())
    assert press.get_stats()["forward_count"] == bool(before)
    with press(model):  # another block
        cache = prefill(model, ids)
    assert lengths(cache) == [LENGTH // 2] * 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())]
)
def test_a_model_that_is_copied_in_a_block(copied: Callable[[Any], Any]) -> None:
    model, press = tiny_model(), MoERouterPress(budget="uniform")
    with press(model):
        with pytest.raises(TypeError, match="copied or pickled outside of a press's block"):
            copied(model)
        cache = prefill(model, tokens(1, LENGTH))  # which goes on
    assert lengths(cache) == [LENGTH // 2] * 2
    copied(model)


@pytest.mark.parametrize("way", ["vmap", "grad", "export", "trace"])
def test_forwards_without_numbers(way: str) -> None:
    model, press, ids = tiny_model(), MoERouterPress(budget="uniform"), tokens(1, LENGTH)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids, use_cache=True).logits

    def loss(embeddings: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=embeddings, use_cache=True).logits.sum()

    ways: dict[str, Callable[[], Any]] = {
        "vmap": lambda: torch.vmap(lambda row: Logits()(row[None]))(ids),
        "grad": lambda: torch.func.grad(loss)(model.get_input_embeddings()(ids).detach()),
        "export": lambda: torch.export.export(Logits(), (ids,), strict=False),
        "trace": lambda: torch.jit.trace(Logits(), (ids,), check_trace=False),
    }
    named = {"vmap": "torch.func", "grad": "torch.func", "trace": "torch.jit.trace"}
    with press(model), pytest.raises(RuntimeError, match=named.get(way, "torch.export")):
        ways[way]()
    assert_untouched(model, press)


@torch.no_grad()
@pytest.mark.parametrize(
    "change", ["fewer layers", "fewer in the config", "more layers", "another decoder"]
)
def test_models_that_change_in_a_block(change: str) -> None:
    model, press, cache = tiny_model(), MoERouterPress(budget="uniform"), DynamicCache()
    with press(model):
        if change == "fewer layers":
            del model.model.layers[1]
            model.config.num_hidden_layers = 1
        elif change == "fewer in the config":
            model.config.num_hidden_layers = 1
        elif change == "more layers":
            model.model.layers.append(model.model.layers[1])
            model.config.num_hidden_layers = 3
        else:
            model.model = tiny_model().model
        with pytest.raises(RuntimeError, match="as when the block began, got .* compress nothing"):
            model(tokens(1, LENGTH), past_key_values=cache)
    assert not cache.layers or not cache.get_seq_length()


def test_presses_that_begin_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have found the model free before either has put up its hooks."""
    model, both = tiny_model(), threading.Barrier(2, timeout=20)
    opened, refused = [], []
    begin = Session.__init__

    def together(self: Session, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        both.wait()

    monkeypatch.setattr(Session, "__init__", together)
    done = threading.Event()

    def run() -> None:
        try:
            with MoERouterPress(budget="uniform")(model):
                opened.append(1)
                done.wait(20)
        except RuntimeError as error:
            refused.append(str(error))
            done.set()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1 and "without an open press" in refused[0]
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())

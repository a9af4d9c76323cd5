"""A forward's state is the forward's own: threads, failures, nesting, and what is left behind."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from growth_cases import EXPERTS
from peers import peer
from random_router import random_router
from tiny_models import prefill, tiny_model, tokens
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from moekv import DecodingConfig, MoERouterPress, PiKVMoERouter
from moekv.press.forward import Forward
from moekv.press.prefill import Rated

PRESSES: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"budget": "uniform"},
    "routed": {"num_experts": 6, "router_type": "adaptive"},
    "streaming": {"streaming": True, "budget": "model"},
    "decoding": {"experts": EXPERTS, "decoding": DecodingConfig(20, 4)},
    "dominant": {"num_experts": 4, "policy": "dominant"},
}


def answer(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    return model.generate(input_ids, max_new_tokens=8, do_sample=False, pad_token_id=0)


def test_a_forward_that_fails_in_another_thread_leaves_nothing() -> None:
    """Its hook is gone with the block, so that the model can be copied."""
    model, press, raised = tiny_model(), MoERouterPress(0.5), []

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("halfway")

    def work() -> None:
        try:
            prefill(model, tokens(1, 30))
        except RuntimeError as error:
            raised.append(str(error))

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with press(model):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    hook.remove()
    assert raised == ["halfway"]
    assert not any(module._forward_hooks for module in model.modules())
    copy.deepcopy(model)
    gone = weakref.ref(press)
    del press, thread
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", PRESSES)
def test_threads_share_a_block(name: str, one_thread: None) -> None:
    """Each gets what it gets alone, whatever runs beside it, and all are counted."""
    model = tiny_model()
    prompts = [tokens(1, length, seed=length) for length in (30, 47, 64)]
    press = MoERouterPress(0.5, **PRESSES[name])
    expected = []
    for prompt in prompts:
        with MoERouterPress(0.5, **PRESSES[name])(model):
            expected.append(answer(model, prompt))
    rounds, wrong = 6, []

    def work(index: int) -> None:
        for _ in range(rounds):
            try:
                got = answer(model, prompts[index])
                if not torch.equal(got, expected[index]):
                    wrong.append((index, got))
            except BaseException as error:
                wrong.append((index, error))

    with press(model):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    if name != "decoding":
        layer = press.get_stats()["layer_stats"][0]["router_stats"]
        assert layer["total_tokens"] == rounds * sum(prompt.shape[1] for prompt in prompts)


@pytest.mark.parametrize("name", ["default", "uniform", "streaming"])
def test_a_block_that_ends_before_the_forward_of_a_thread(name: str) -> None:
    """The forward raises, as its prompt is not compressed, and no hook stays."""
    model, begun, over, raised = tiny_model(), threading.Event(), threading.Event(), []
    cache = DynamicCache()

    def wait(*_: Any) -> None:
        begun.set()
        over.wait(60)

    def work() -> None:
        try:
            with torch.no_grad():
                model(tokens(1, 30), past_key_values=cache)
        except RuntimeError as error:
            raised.append(str(error))

    handle = model.model.layers[0].mlp.register_forward_pre_hook(wait)
    with MoERouterPress(0.5, **PRESSES[name])(model):
        thread = threading.Thread(target=work)
        thread.start()
        begun.wait(60)
    over.set()
    thread.join()
    handle.remove()
    assert len(raised) == 1 and "the block has ended before this forward" in raised[0]
    assert not any(module._forward_hooks for module in model.modules()) and not states()
    assert answer(model, tokens(1, 30)).shape == (1, 38)


def test_threads_have_histories_of_their_own() -> None:
    """Each begins as the block did; the press goes on with that of the thread that opened it."""
    model, (one, other) = tiny_model(), (tokens(1, 64, seed=s) for s in (1, 2))

    def make() -> MoERouterPress:
        router = PiKVMoERouter(64, 4, 2, history_weight=30.0, cache_update_interval=1)
        return MoERouterPress(0.5, num_experts=4, shared=None, router_type=router)

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    with make()(model):
        alone = held(prefill(model, other))
    with make()(model):
        prefill(model, one)
        behind = held(prefill(model, other))
    assert not same(alone, behind)  # else there is nothing to see
    press, got = make(), {}

    def run(name: str, prompts: list[torch.Tensor]) -> None:
        def work() -> None:
            got[name] = [held(prefill(model, prompt)) for prompt in prompts][-1]

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with press(model):
        run("first", [one])
        run("second", [other])
        run("third", [one, other])
        assert same(got["second"], alone) and same(got["third"], behind)
        assert same(held(prefill(model, one)), got["first"])
    with press(model):  # which begins with the history of that prompt
        run("later", [other])
        prefill(model, other)
        run("after another", [other])
    assert same(got["later"], behind) and same(got["after another"], behind)


@pytest.mark.parametrize("name", ["default", "streaming"])
def test_a_failing_forward_beside_one_that_begins_and_ends(name: str) -> None:
    """While torch calls the hooks of the first, which has to raise what it has raised."""
    model, press = tiny_model(), MoERouterPress(0.5, **PRESSES[name])
    prompt, raised, cache, inside = tokens(1, 40), [], DynamicCache(), threading.local()
    expected = answer(model, prompt)

    def fail(*_: Any) -> None:
        if getattr(inside, "fails", False):
            raise ArithmeticError("mine")

    def other_runs(*_: Any) -> None:
        if getattr(inside, "fails", False):
            beside = threading.Thread(target=answer, args=(model, prompt))
            beside.start()
            beside.join()

    def run() -> None:
        inside.fails = True
        try:
            with torch.no_grad():
                model(prompt, past_key_values=cache)
        except Exception as error:
            raised.append(error)

    handles = [
        model.model.layers[0].mlp.register_forward_pre_hook(fail),
        model.model.register_forward_hook(other_runs, always_call=True),
    ]
    with press(model):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    for handle in handles:
        handle.remove()
    assert [str(error) for error in raised] == ["mine"] and not states()
    assert not model.model._forward_hooks
    lengths = {layer.get_seq_length() for layer in cache.layers if layer.is_initialized}
    assert lengths <= {40} and (name != "streaming" or not lengths)
    assert torch.equal(answer(model, prompt), expected)


class Nested(nn.Module):
    """Runs the model on another text in the middle of a forward."""

    def __init__(self, inner: nn.Module, run: Any) -> None:
        super().__init__()
        self.inner, self.run, self.depth = inner, run, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.depth:
            self.depth = 1
            self.run()
            self.depth = 0
        return self.inner(*args, **kwargs)


def held(cache: DynamicCache) -> list[torch.Tensor]:
    return [x for layer in cache.layers for x in layer.to_dense()]


def test_a_forward_inside_another() -> None:
    model, (outer, inner) = tiny_model(), (tokens(1, 40, seed=s) for s in (1, 2))
    expected = []
    for ids in (outer, inner):
        with MoERouterPress(0.5)(model):
            expected.append(prefill(model, ids))
    caches = [DynamicCache(), DynamicCache()]

    def run() -> None:
        model(inner, past_key_values=caches[1])

    model.model.layers[1].mlp = Nested(model.model.layers[1].mlp, run)
    with MoERouterPress(0.5)(model), torch.no_grad():
        model(outer, past_key_values=caches[0])
    for cache, other in zip(caches, expected, strict=True):
        for a, b in zip(held(cache), held(other), strict=True):
            assert torch.equal(a, b)


def break_down(*_: Any) -> None:
    raise ArithmeticError("broken")


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Have the collector look at what a test makes, not at all that there is."""
    gc.freeze()
    yield
    gc.unfreeze()


def states() -> list[Any]:
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, Forward | Rated)]


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_nothing_is_held_behind_a_forward(name: str, kind: str) -> None:
    """Inside the block, too: neither of one that ended, nor of one that failed halfway."""
    if kind == "static" and name != "uniform":
        pytest.skip("static caches are compressed uniformly")
    model, options = tiny_model(), PRESSES[name]
    last = model.model.layers[-1].self_attn

    def make() -> Any:
        return DynamicCache() if kind == "dynamic" else StaticCache(model.config, 60)

    with MoERouterPress(0.5, **options)(model), torch.no_grad():
        cache = make()
        model(tokens(1, 40), past_key_values=cache)
        assert not states()
        handle = last.register_forward_pre_hook(break_down)
        failed = make()
        with pytest.raises(ArithmeticError):
            model(tokens(1, 40), past_key_values=failed)
        refs = [weakref.ref(layer) for layer in failed.layers]
        del failed
        assert not states() and not any(ref() for ref in refs)
        handle.remove()
        other = make()
        model(tokens(1, 40), past_key_values=other)
        for layer, first in zip(other.layers, cache.layers, strict=True):
            assert layer.get_seq_length() == first.get_seq_length()
    assert not model.model._forward_hooks and not model.model._forward_hooks_always_called


def test_an_interrupt_leaves_nothing_behind_the_block() -> None:
    model = tiny_model()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[-1].self_attn.register_forward_pre_hook(interrupt)
    cache = DynamicCache()
    with pytest.raises(KeyboardInterrupt), MoERouterPress(0.5, streaming=True)(model):
        prefill(model, tokens(1, 40), cache=cache)
    assert not states() and cache.get_seq_length() == 0
    handle.remove()
    with MoERouterPress(0.5)(model):
        prefill(model, tokens(1, 40))
    assert not model.model._forward_hooks


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_no_number_is_drawn_from_the_global_generator(ratio: float) -> None:
    model, ids = tiny_model(), tokens(1, 40)
    press = MoERouterPress(ratio, num_experts=6, router_type="adaptive")
    for _ in range(2):
        before = torch.get_rng_state()
        with press(model):
            prefill(model, ids)
        assert torch.equal(torch.get_rng_state(), before)


def stats_of(press: MoERouterPress) -> str:
    return repr(press.get_stats())  # in which NaN is NaN


COPIES = {
    "pickle": lambda press: pickle.loads(pickle.dumps(press)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_used_press_can_be_copied(how: str, calibrated: bool) -> None:
    """With its statistics and history, which go their own way from then on."""
    model = tiny_model()
    options: dict[str, Any] = {"num_experts": 6, "router_type": "pikv", "cache_aware": True}
    if calibrated:
        options = {"router": random_router(model)}
    press = MoERouterPress(0.5, **options)
    for seed in range(4):
        with press(model):
            prefill(model, tokens(1, 40, seed=seed))
    before = stats_of(press)
    other = COPIES[how](press)
    assert stats_of(other) == before
    with press(model):
        prefill(model, tokens(1, 40, seed=9))
    assert stats_of(other) == before != stats_of(press)
    with other(model):
        prefill(model, tokens(1, 40, seed=9))
    assert stats_of(other) == stats_of(press)


def test_a_press_is_copied_in_its_block_without_the_block() -> None:
    model, press = tiny_model(), MoERouterPress(0.5)
    with press(model):
        prefill(model, tokens(1, 40))
        other = copy.deepcopy(press)
    with other(model):
        prefill(model, tokens(1, 40))


LATER: dict[str, Any] = {
    "compression_ratio": 0.9,
    "num_experts": 2,
    "top_k": 1,
    "router_type": "eplb",
    "cache_aware": False,
    "policy": "dominant",
    "budget": "head",
    "backend": "torch",
    "experts": ["temporal", "selective"],
    "shared": "semantic",
    "sinks": 0,
    "recent": 0,
    "window": 8,
    "decoding": DecodingConfig(8, 2),
    "streaming": True,
    "router": None,
    "pairs": "k8v4",
    "fold": True,
}


def outcome(press: MoERouterPress, model: Any) -> Any:
    with press(model):
        cache = prefill(model, tokens(1, 60))
    layers = [layer for layer in cache.layers]
    pairs = [
        layer.to_dense()[0] if hasattr(layer, "to_dense") else torch.as_tensor(layer.keys)
        for layer in layers
    ]
    return [type(layer) for layer in layers], [x.tolist() for x in pairs], stats_of(press)


@pytest.mark.parametrize("name", LATER)
def test_options_set_later_act(name: str) -> None:
    model = tiny_model()
    base: dict[str, Any] = {} if name in ("experts", "router") else {"num_experts": 6}
    base |= {"pairs": "k8v8"} if name == "fold" else {}
    ratio = 0.9 if name == "fold" else 0.5
    late = MoERouterPress(ratio, **base)
    setattr(late, name, LATER[name])
    at_once = MoERouterPress(**({"compression_ratio": ratio} | base | {name: LATER[name]}))
    assert late == at_once
    found = outcome(late, model)
    assert found == outcome(at_once, model)
    if name not in ("backend", "streaming", "router"):  # which give the same by another way
        assert found != outcome(MoERouterPress(ratio, **base), model)


def test_every_option_is_set_later() -> None:
    assert set(LATER) == {field.name for field in fields(MoERouterPress)}


def test_numbers_act_from_the_next_forward_on() -> None:
    model, press = tiny_model(), MoERouterPress(0.5, budget="uniform")
    with press(model):
        assert prefill(model, tokens(1, 60)).layers[0].keys.shape[2] == 30
        press.compression_ratio = 0.75
        assert prefill(model, tokens(1, 60)).layers[0].keys.shape[2] == 15
        press.compression_ratio = 2.0
        with pytest.raises(ValueError, match=r"compression_ratio in \[0, 1\)"):
            prefill(model, tokens(1, 60))


def test_experts_are_those_that_statistics_are_of() -> None:
    model, press = tiny_model(), MoERouterPress(0.5)
    with press(model):
        prefill(model, tokens(1, 40))
        press.experts = ["selective"]
        press.top_k = 1
        with pytest.raises(RuntimeError, match=r"reset_stats\(\) first"):
            prefill(model, tokens(1, 40))
        press.reset_stats()
        prefill(model, tokens(1, 40))
    assert list(press.get_stats()["layer_stats"][0]["router_stats"]["expert_usage_count"]) == [
        "selective"
    ]


def test_auto_is_asked_again_for_another_model() -> None:
    """What a first model made of "auto" is not the second one's."""
    press = MoERouterPress(0.5, num_experts="auto", budget="uniform")
    for name in ("llama", "gemma3"):
        model = tiny_model(name)
        with press(model):
            prefill(model, tokens(1, 40))
        alone = MoERouterPress(0.5, num_experts="auto", budget="uniform")
        with alone(model):
            prefill(model, tokens(1, 40))
        assert stats_of(press) == stats_of(alone)
        press.reset_stats()


def test_a_copied_press_knows_its_model() -> None:
    """By what the router was calibrated for, or by its size; not by the module, which is gone."""
    model = tiny_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.roll(1, 0))
    press = MoERouterPress(0.5, router=random_router(model))
    with press(model):
        prefill(model, tokens(1, 40))
    for how in COPIES.values():
        copied = how(press)
        message = "expected the model that the router was calibrated"
        with pytest.raises(ValueError, match=message), copied(other):
            pass
    press = MoERouterPress(0.5, num_experts=3)
    with press(model):
        prefill(model, tokens(1, 40))
    wider = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"hidden_size": 96}))
    with pytest.raises(RuntimeError, match=r"reset_stats\(\) first"), copy.deepcopy(press)(wider):
        pass


def test_an_interrupted_stream_leaves_alone_what_is_in_use_again() -> None:
    model, cache = tiny_model(), DynamicCache()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with MoERouterPress(0.5, budget="model", streaming=True)(model), torch.no_grad():
        handle = model.model.layers[-1].self_attn.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(tokens(1, 40), past_key_values=cache)
        handle.remove()
        cache.layers = []
        model(tokens(1, 40), past_key_values=cache)
    assert cache.get_seq_length() == 40


def test_an_option_of_another_kind_is_checked_though_it_is_equal() -> None:
    press = MoERouterPress()
    press.cache_aware = 0
    with (
        pytest.raises(TypeError, match="expected cache_aware True or False, got 0"),
        press(tiny_model()),
    ):
        pass
    with pytest.raises(AttributeError, match="expected an option among .*, got 'get_stats'"):
        press.get_stats = 3


def test_a_wrapper_that_names_no_model_refuses_a_calibrated_router() -> None:
    model = tiny_model()
    press = peer("CriticalAdaKVPress")(MoERouterPress(0.5, router=random_router(model)))
    with pytest.raises(ValueError, match="does not say which model"), press(model):
        prefill(model, tokens(1, 40))

"""The cases of ``golden.py``: presses at work on a model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import kvpress
import torch
from golden_bench import (
    BF16,
    FP16,
    FP32,
    NEW,
    Bench,
    Case,
    Subject,
    digest_of,
    random_router,
    shown_error,
)
from kvpress import KVPressTextGenerationPipeline
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import moekv
from moekv import Expert, LayerView, MoERouterPress, load_cache, prefill_in_chunks, save_cache
from moekv.ops import ScoreKind

PADDING = (0, 45, 110)
"""Of the rows of a padded batch."""

# --- Cases: a press by itself ---------------------------------------------------------------------


def padded(bench: Bench) -> tuple[Tensor, Tensor]:
    """Give three rows with padding at their left, and the mask."""
    input_ids = bench.prompts(len(PADDING))
    mask = torch.ones_like(input_ids)
    for row, count in enumerate(PADDING):
        mask[row, :count] = 0
        input_ids[row, :count] = 0
    return input_ids, mask


def pressed(
    ratio: float = 0.6,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = FP32,
    batch: int = 1,
    padding: bool = False,
    new: int = NEW,
    generate: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    """Make a case of one press, of which these are the options, in one ``generate``."""

    def run(bench: Bench) -> None:
        bench.set_up(attention, dtype)
        press = bench.make(ratio, **options)
        input_ids, mask = padded(bench) if padding else (bench.prompts(batch), None)
        with press(bench.model):
            bench.generate(input_ids, mask=mask, new=new, **generate or {})

    return run


class Given(Expert):
    """Scores that a hash of layer, head and place decides, on one scale over all of them."""

    name = "given"
    comparable = True

    def scores(self, view: LayerView) -> Tensor:
        """Give them."""
        head = torch.arange(view.keys.shape[1])[:, None]
        chaos = (view.positions[:, None] + 1) * 12.9898 + head * 78.233
        chaos = torch.sin(chaos + view.module.layer_idx * 37.719) * 43758.5453
        return chaos - chaos.floor() + 0.15 * head + 0.2 * view.module.layer_idx


class Loudest(Expert):
    """What a user would write."""

    name = "loudest"
    kinds = (ScoreKind.ATTENTION,)

    def scores(self, view: LayerView) -> Tensor:
        """Rate by the size of what attention gives."""
        return view.scores_of(ScoreKind.ATTENTION) + view.values.float().norm(dim=-1).log()


class Failing(Expert):
    """Fails in the third layer, or the first pressed one behind it."""

    name = "failing"

    def scores(self, view: LayerView) -> Tensor:
        """Rate, or fail."""
        if view.module.layer_idx >= 2:
            raise ArithmeticError("meant to fail")
        return view.keys.float().norm(dim=-1)


def simple_cases() -> dict[str, Case]:
    """Presses of all options."""
    names = ["aggressive", "moderate", "conservative", "selective", "semantic", "temporal"]
    names += ["expected"]
    routers = ("base", "topk_balanced", "adaptive", "pikv", "eplb", "hierarchical")
    pikv = {"num_experts": 4, "top_k": 2, "router_type": "pikv"}
    scorers = [
        kvpress.SnapKVPress,
        kvpress.KnormPress,
        kvpress.TOVAPress,
        kvpress.KeyDiffPress,
        kvpress.ExpectedAttentionPress,
        kvpress.LagKVPress,
        kvpress.PyramidKVPress,
    ]
    table: dict[str, Case] = {}
    for ratio in (0.0, 0.3, 0.5, 0.75, 0.9):
        table[f"ratio-{ratio}"] = pressed(ratio)
        table[f"ratio-{ratio}-pikv"] = pressed(ratio, **pikv)
    for budget in ("auto", "uniform", "head", "model"):
        table[f"budget-{budget}"] = pressed(0.7, budget=budget)
        table[f"budget-{budget}-pikv"] = pressed(0.7, budget=budget, **pikv)
        table[f"budget-{budget}-calibrated"] = pressed(0.7, budget=budget, router="random")
        table[f"padded-{budget}"] = pressed(padding=True, budget=budget)
        table[f"streaming-{budget}"] = pressed(0.7, budget=budget, streaming=True)
        table[f"decoding-{budget}"] = pressed(
            0.3, budget=budget, decoding=(48, 6), new=20, num_experts=4
        )
    for name in routers:
        table[f"router-{name}"] = pressed(router_type=name)
        table[f"router-{name}-6-3"] = pressed(router_type=name, num_experts=6, top_k=3)
        table[f"router-{name}-padded"] = pressed(router_type=name, padding=True, num_experts=5)
    for name in names:
        table[f"expert-{name}"] = pressed(experts=[name], top_k=1)
        table[f"dominant-{name}"] = pressed(experts=[name], top_k=1, policy="dominant")
    for scorer in scorers:
        table[f"scorer-{scorer.__name__}"] = pressed(experts=[scorer], top_k=1)
    table |= {
        "experts-three": pressed(experts=["selective", "semantic", "temporal"]),
        "experts-expected-conservative": pressed(experts=["expected", "conservative"], top_k=1),
        "experts-all": pressed(experts=names, top_k=3),
        "experts-scorers": pressed(
            experts=["selective", kvpress.KnormPress, kvpress.KeyDiffPress, "temporal"], top_k=3
        ),
        "experts-own-comparable": pressed(experts=[Given], top_k=1),
        "experts-own-padded": pressed(experts=[Given], top_k=1, padding=True),
        "experts-own-mixed": pressed(experts=[Loudest, "semantic"], cache_aware=True),
        "experts-1": pressed(num_experts=1, top_k=1),
        "experts-4": pressed(num_experts=4),
        "experts-7-top-1": pressed(num_experts=7, top_k=1),
        "experts-auto": pressed(num_experts="auto"),
        "experts-auto-top-4": pressed(num_experts="auto", top_k=4),
        "training-free": pressed(router=None),
        "training-free-batch": pressed(router=None, batch=2),
        "top-k-alone": pressed(top_k=3),
        "dominant": pressed(policy="dominant"),
        "dominant-all": pressed(0.4, policy="dominant", num_experts=7, top_k=3),
        "dominant-hierarchical": pressed(policy="dominant", router_type="hierarchical"),
        "dominant-padded": pressed(policy="dominant", experts=["conservative"], top_k=1, batch=2),
        "streaming-padded": pressed(0.75, streaming=True, padding=True),
        "streaming-below-protected": pressed(0.9, streaming=True),
        "streaming-pikv": pressed(0.7, streaming=True, **pikv),
        "streaming-calibrated": pressed(0.7, streaming=True, router="random"),
        "streaming-decoding": pressed(
            0.5, streaming=True, decoding=(40, 5), budget="model", num_experts=4, new=14
        ),
        "decoding-24-4": pressed(decoding=(24, 4), num_experts=6, cache_aware=True, new=16),
        "decoding-100-1": pressed(0.0, decoding=(100, 1), num_experts=4, new=5),
        "decoding-default": pressed(decoding=(40, 8), new=20),
        "decoding-calibrated": pressed(decoding=(40, 8), router="random", new=20),
        "decoding-calibrated-uniform": pressed(
            decoding=(40, 8), router="random", budget="uniform", new=20
        ),
        "decoding-padded": pressed(
            decoding=(40, 8), num_experts=4, budget="head", padding=True, new=20
        ),
        "decoding-batch": pressed(decoding=(40, 8), num_experts=4, batch=2, new=20),
        "decoding-beams": pressed(
            decoding=(40, 4), num_experts=4, new=10, generate={"num_beams": 2}
        ),
        "calibrated": pressed(router="random"),
        "calibrated-0.9": pressed(0.9, router="random"),
        "calibrated-padded": pressed(router="random", padding=True),
        "calibrated-batch": pressed(router="random", batch=2),
        "calibrated-eager": pressed(router="random", attention="eager"),
        "eager": pressed(attention="eager"),
        "eager-pikv": pressed(attention="eager", **pikv),
        "eager-padded": pressed(attention="eager", padding=True),
        "eager-model": pressed(attention="eager", budget="model"),
        "eager-dominant": pressed(attention="eager", policy="dominant"),
        "eager-decoding": pressed(
            attention="eager", decoding=(40, 8), num_experts=4, budget="uniform", new=14
        ),
        "eager-SnapKVPress": pressed(
            attention="eager", experts=[kvpress.SnapKVPress, "semantic"], top_k=2
        ),
        "padded-pikv": pressed(padding=True, cache_aware=True, **pikv),
        "batch": pressed(batch=3),
        "batch-pikv": pressed(batch=3, **pikv),
        "beams": pressed(generate={"num_beams": 3}),
        "beams-uniform": pressed(budget="uniform", generate={"num_beams": 3}),
        "no-sinks-no-recent": pressed(sinks=0, recent=0),
        "sinks-16-recent-2": pressed(sinks=16, recent=2, **pikv),
        "window-1": pressed(window=1, **pikv),
        "window-8": pressed(window=8, sinks=1, recent=30),
        "window-1000": pressed(window=1000, **pikv),
        "reference-ops": pressed(backend="torch"),
        "reference-ops-pikv": pressed(backend="torch", budget="model", **pikv),
        "native-ops": pressed(backend="cpu", **pikv),
        "no-such-backend": pressed(backend="cuda"),
        "bf16": pressed(dtype=BF16),
        "bf16-pikv": pressed(dtype=BF16, cache_aware=True, **pikv),
        "bf16-padded": pressed(dtype=BF16, padding=True),
        "bf16-calibrated": pressed(dtype=BF16, router="random"),
        "bf16-streaming": pressed(0.8, dtype=BF16, streaming=True),
        "bf16-decoding": pressed(
            dtype=BF16, decoding=(40, 8), budget="model", num_experts=6, new=14
        ),
        "bf16-dominant": pressed(dtype=BF16, policy="dominant", num_experts=7),
        "fp16": pressed(dtype=FP16),
        "static": pressed(generate={"cache_implementation": "static"}),
        "static-pikv": pressed(generate={"cache_implementation": "static"}, **pikv),
        "static-calibrated": pressed(
            0.8, router="random", generate={"cache_implementation": "static"}
        ),
        "static-0": pressed(0.0, generate={"cache_implementation": "static"}),
        "static-bf16": pressed(0.8, dtype=BF16, generate={"cache_implementation": "static"}),
        "static-model-budget": pressed(budget="model", generate={"cache_implementation": "static"}),
        "static-padded": pressed(padding=True, generate={"cache_implementation": "static"}),
        "static-decoding": pressed(
            decoding=(40, 8), generate={"cache_implementation": "static"}, num_experts=4
        ),
    }
    return table


# --- Cases: a press in use ------------------------------------------------------------------------


def in_chunks(
    ratio: float = 0.6, *, size: int = 40, padding: bool = False, new: int = NEW, **options: Any
) -> Case:
    """Make a case of a prompt that is fed in chunks."""

    def run(bench: Bench) -> None:
        press = bench.make(ratio, **options)
        input_ids, mask = padded(bench) if padding else (bench.prompts(), None)
        size_ = size if bench.subject.is_tiny else 100
        filled = prefill_in_chunks(
            press,
            bench.model,
            input_ids[:, :-1],
            chunk_size=size_,
            attention_mask=None if mask is None else mask[:, :-1],
        )
        cache = filled.past_key_values
        bench.note(logits=digest_of(filled.logits), layers=bench.describe(cache, None))
        goes_on = press.decoding is not None
        with press(bench.model) if goes_on else nullcontext():
            bench.generate(input_ids, cache, mask=mask, new=new)

    return run


def several_prefills(**options: Any) -> Case:
    """Make a case of three prompts in one block, one in another, and one after a reset."""

    def run(bench: Bench) -> None:
        press = bench.make(**options)
        with press(bench.model):
            for seed in (0, 5, 9):
                bench.generate(bench.prompts(seed=seed), new=2)
        bench.note(stats=press.get_stats())
        with press(bench.model):
            bench.generate(bench.prompts(batch=2, seed=3), new=2)
        bench.note(stats=press.get_stats())
        press.reset_stats()
        bench.note(stats=press.get_stats())
        with press(bench.model):
            bench.generate(bench.prompts(), new=2)

    return run


def static_twice(bench: Bench) -> None:
    """Fill one ``StaticCache`` with two prompts, with a reset between them."""
    press, input_ids = bench.make(0.75), bench.prompts()
    length = input_ids.shape[1] + NEW
    cache = StaticCache(config=bench.model.config, max_cache_len=length)
    with press(bench.model):
        bench.generate(input_ids, cache)
        cache.reset()
        bench.generate(bench.prompts(seed=4), cache)


def more_room_in_a_static_cache(bench: Bench) -> None:
    """Generate more tokens than the slots could take without compression."""
    press, input_ids = bench.make(0.5), bench.prompts()
    length = input_ids.shape[1] + 2
    cache = StaticCache(config=bench.model.config, max_cache_len=length)
    with press(bench.model):
        bench.generate(input_ids, cache, new=12)


def second_prompt(bench: Bench) -> None:
    """Go on with a conversation, outside of the block and in it."""
    press, input_ids = bench.make(0.7, budget="model"), bench.prompts()
    for inside in (False, True):
        with press(bench.model):
            out = bench.generate(input_ids)
        cache = out.past_key_values
        more = torch.cat([out.sequences, bench.prompts(seed=2)[:, :20]], dim=1)
        if inside:
            with press(bench.model):
                bench.generate(more, cache, among=False)
        else:
            bench.generate(more, cache, among=False)


def prompt_lookup(bench: Bench) -> None:
    """Guess tokens ahead, of which those that were wrong are cut off again."""
    press, input_ids = bench.make(0.7, budget="model"), bench.prompts()
    input_ids[:, -40:] = input_ids[:, 20:60]
    with press(bench.model):
        out = bench.silently(bench.model, input_ids)
    options = {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}
    bench.generate(out.sequences, out.past_key_values, among=False, new=12, **options)


def without_ids(bench: Bench) -> None:
    """Feed embeddings, and a decoder without its head."""
    press, input_ids = bench.make(0.7), bench.prompts()
    embeddings = bench.model.get_input_embeddings()(input_ids)
    for forward in (bench.model, bench.model.model):
        cache = DynamicCache(config=bench.model.config)
        with press(bench.model):
            out = forward(inputs_embeds=embeddings, past_key_values=cache)
        bench.note(out=digest_of(out[0]), layers=bench.describe(cache, None))


def stored_and_loaded(budget: str, **options: Any) -> Case:
    """Make a case of a cache that goes to a file and comes back."""

    def run(bench: Bench) -> None:
        press, input_ids = bench.make(0.7, budget=budget, **options), bench.prompts()
        with press(bench.model):
            out = bench.silently(bench.model, input_ids)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            try:
                save_cache(out.past_key_values, path, bench.model)
            except TypeError as error:  # layers with sliding windows
                return bench.note(error=shown_error(error))
            cache = load_cache(path, bench.model)
        bench.note(layers=bench.describe(cache, None))
        if budget != "uniform":  # true length, so that generate feeds true positions
            bench.generate(out.sequences, cache, among=False)

    return run


def operations_on_a_cache(bench: Bench) -> None:
    """Do to a cache what transformers does beside feeding it."""
    press, input_ids = bench.make(0.7, budget="model"), bench.prompts(batch=2)
    with press(bench.model):
        cache = bench.generate(input_ids).past_key_values
    if bench.subject.name != "gemma3":  # sliding windows cannot be cropped
        cache.crop(-3)
        bench.note(layers=bench.describe(cache, None))
    cache.batch_repeat_interleave(2)
    bench.note(layers=bench.describe(cache, None))
    cache.batch_select_indices(torch.tensor([3, 0]))
    bench.note(layers=bench.describe(cache, None))
    cache.reorder_cache(torch.tensor([1, 1]))
    bench.note(layers=bench.describe(cache, None))


def failure(**options: Any) -> Case:
    """Make a case of an expert that fails halfway."""

    def run(bench: Bench) -> None:
        press = bench.make(experts=[Failing, "semantic"], **options)
        cache = DynamicCache(config=bench.model.config)
        try:
            with press(bench.model):
                bench.generate(bench.prompts(), cache)
        except ArithmeticError as error:
            bench.note(error=shown_error(error), layers=bench.describe(cache, None))
        bench.generate(bench.prompts(), new=2)  # without a press, whose hooks are gone

    return run


def copied(bench: Bench) -> None:
    """Make a press of the same options as another."""
    first = bench.make(0.5, num_experts=5, budget="head", sinks=2)
    press = bench.press = replace(first, compression_ratio=0.8)
    with press(bench.model):
        bench.generate(bench.prompts())


def changed_ratio(bench: Bench) -> None:
    """Set another ratio between two blocks."""
    press = bench.make(0.5)
    for ratio in (0.3, 0.8):
        press.compression_ratio = ratio
        with press(bench.model):
            bench.generate(bench.prompts())


def refusals(bench: Bench) -> None:
    """Try options and uses that are not taken."""
    options: list[dict[str, Any]] = [
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"num_experts": 0},
        {"num_experts": 99},
        {"num_experts": "many"},
        {"num_experts": 2, "top_k": 3},
        {"top_k": 0},
        {"router_type": "unknown"},
        {"policy": "unknown"},
        {"budget": "unknown"},
        {"budget": "model", "policy": "dominant"},
        {"streaming": True, "policy": "dominant"},
        {"backend": "unknown"},
        {"experts": ["unknown"]},
        {"experts": []},
        {"experts": ["semantic", "semantic"]},
        {"experts": [3]},
        {"decoding": 3},
        {"decoding": (0, 1)},
        {"decoding": (8, 8), "policy": "dominant"},
        {"decoding": (8, 8), "experts": ["expected"], "top_k": 1},
        {"sinks": -1},
        {"recent": 1.5},
        {"window": 0},
        {"cache_aware": 1},
        {"streaming": "yes"},
        {"router": "no/such-folder"},
        {"router": 3},
        {"router": "random", "num_experts": 4},
    ]
    for given in options:
        try:
            bench.make(**given)
            said = "taken"
        except Exception as error:
            said = shown_error(error)
        bench.note(options={key: str(value) for key, value in given.items()}, said=said)
    bench.press = None
    other = Subject.tiny("llama").prototype
    uses: dict[str, Callable[[], Any]] = {
        "a block in a block": lambda: _in_two_blocks(bench.make(), bench.make(), bench.model),
        "one press in two blocks": lambda: _in_two_blocks(*[bench.make()] * 2, bench.model),
        "a router of another model": lambda: _block(
            bench.make(router=random_router(other)), bench.model
        ),
        "nothing compressed": lambda: _block(
            bench.make(), bench.model, lambda: bench.model(bench.prompts(), use_cache=False)
        ),
    }
    for name, use in uses.items():
        try:
            use()
            said = "taken"
        except Exception as error:
            said = shown_error(error)
        bench.note(use=name, said=said)
    bench.press = None


def _block(press: Any, model: PreTrainedModel, use: Callable[[], Any] = lambda: None) -> None:
    with torch.no_grad(), press(model):
        use()


def _in_two_blocks(first: Any, second: Any, model: PreTrainedModel) -> None:
    _block(first, model, lambda: _block(second, model))


# --- Cases: inside of kvpress ---------------------------------------------------------------------


def wrapped(wrap: Callable[[Any, Bench], Any], ratio: float = 0.5, **options: Any) -> Case:
    """Make a case of a press in one of kvpress's wrappers; its windows are smaller."""

    def run(bench: Bench) -> None:
        given = {"experts": ["conservative", "selective", "semantic", "temporal"]}
        given |= {"recent": 5, "window": 12} | options
        press = bench.make(ratio, **{k: v for k, v in given.items() if v is not None})
        with wrap(press, bench)(bench.model):
            bench.generate(bench.prompts(), new=12)

    return run


def _per_layer(press: Any, bench: Bench) -> Any:
    count = bench.model.config.num_hidden_layers
    return kvpress.PerLayerCompressionPress(press, [0.2 + 0.6 * i / count for i in range(count)])


def _decoding(press: Any, bench: Bench) -> Any:
    return kvpress.DecodingPress(press, compression_interval=4, target_size=60)


def _prefill_decoding(press: Any, bench: Bench) -> Any:
    own = MoERouterPress(0.5, experts=["selective", "semantic"], recent=5, window=12)
    return kvpress.PrefillDecodingPress(own, _decoding(press, bench))


def ragged_press(wrap: Callable[[], Any]) -> Case:
    """Make a case of a press of kvpress that is stored ragged."""

    def run(bench: Bench) -> None:
        with moekv.ragged(wrap())(bench.model):
            bench.generate(bench.prompts())

    return run


def ragged_own(bench: Bench) -> None:
    """Store ragged what the press keeps in a wrapper."""
    press = bench.make(0.7, experts=["selective", "semantic"], recent=5)
    with moekv.ragged(kvpress.AdaKVPress(press))(bench.model):
        bench.generate(bench.prompts())


def pipeline(ratio: float = 0.7, **options: Any) -> Case:
    """Make a case of two questions about a text that is compressed once."""

    def run(bench: Bench) -> None:
        press = bench.make(ratio, **options)
        pipe = KVPressTextGenerationPipeline(model=bench.model, tokenizer=bench.subject.tokenizer)
        context, questions = bench.subject.context()
        cache = DynamicCache(config=bench.model.config)
        answers = pipe(context, questions=questions, press=press, cache=cache, max_new_tokens=NEW)[
            "answers"
        ]
        bench.note(answers=answers, layers=bench.describe(cache, None))

    return run


def other_cases() -> dict[str, Case]:
    """Presses in use, and inside of kvpress."""
    ada, snap = kvpress.AdaKVPress, kvpress.SnapKVPress
    return {
        "chunks": in_chunks(),
        "chunks-uniform": in_chunks(budget="uniform", num_experts=4, size=64),
        "chunks-head": in_chunks(budget="head", num_experts=6, cache_aware=True),
        "chunks-model-padded": in_chunks(budget="model", num_experts=4, padding=True),
        "chunks-calibrated": in_chunks(router="random"),
        "chunks-decoding": in_chunks(num_experts=4, decoding=(30, 6), budget="model", new=14),
        "chunks-calibrated-decoding": in_chunks(router="random", decoding=(30, 6), new=14),
        "chunks-0": in_chunks(0.0, num_experts=4),
        "chunks-one": in_chunks(num_experts=4, size=1000),
        "chunks-streaming": in_chunks(streaming=True),
        "several-prefills": several_prefills(),
        "several-prefills-cache-aware": several_prefills(num_experts=5, cache_aware=True),
        "several-prefills-adaptive": several_prefills(router_type="adaptive"),
        "several-prefills-eplb": several_prefills(router_type="eplb", num_experts=6),
        "several-prefills-calibrated": several_prefills(router="random"),
        "static-twice": static_twice,
        "static-room": more_room_in_a_static_cache,
        "second-prompt": second_prompt,
        "prompt-lookup": prompt_lookup,
        "without-ids": without_ids,
        "stored-model": stored_and_loaded("model"),
        "stored-uniform": stored_and_loaded("uniform"),
        "stored-calibrated": stored_and_loaded("model", router="random", decoding=(60, 20)),
        "cache-operations": operations_on_a_cache,
        "failure": failure(),
        "failure-streaming": failure(streaming=True),
        "copied": copied,
        "changed-ratio": changed_ratio,
        "refusals": refusals,
        "wrapped-ada": wrapped(lambda press, _: ada(press)),
        "wrapped-ada-default": wrapped(lambda press, _: ada(press), experts=None),
        "wrapped-chunk": wrapped(lambda press, _: kvpress.ChunkPress(press, chunk_length=32)),
        "wrapped-rerotation": wrapped(lambda press, _: kvpress.KeyRerotationPress(press)),
        "wrapped-per-layer": wrapped(_per_layer),
        "wrapped-decoding": wrapped(_decoding, 0.0, experts=["selective", "semantic"]),
        "wrapped-decoding-default": wrapped(_decoding, 0.0, experts=None),
        "wrapped-prefill-decoding": wrapped(_prefill_decoding, 0.0),
        "wrapped-composed": wrapped(
            lambda press, _: kvpress.ComposedPress([press, kvpress.KnormPress(0.5)]), 0.4
        ),
        "wrapped-composed-after": wrapped(
            lambda press, _: kvpress.ComposedPress([kvpress.KnormPress(0.5), press])
        ),
        "wrapped-critical": wrapped(lambda press, _: kvpress.CriticalKVPress(press)),
        "wrapped-model-budget": wrapped(
            lambda press, _: kvpress.ChunkPress(press, chunk_length=32), budget="model"
        ),
        "ragged-ada-snap": ragged_press(lambda: ada(snap(0.7, window_size=16))),
        "ragged-ada-knorm": ragged_press(lambda: ada(kvpress.KnormPress(0.5))),
        "ragged-critical": ragged_press(
            lambda: kvpress.CriticalAdaKVPress(kvpress.KnormPress(0.3))
        ),
        "ragged-knorm": ragged_press(lambda: kvpress.KnormPress(0.5)),
        "ragged-own": ragged_own,
        "pipeline": pipeline(),
        "pipeline-uniform": pipeline(budget="uniform"),
        "pipeline-pikv": pipeline(num_experts=4, budget="head"),
        "pipeline-streaming": pipeline(streaming=True),
        "pipeline-calibrated": pipeline(router="random"),
    }


def real_cases() -> dict[str, Case]:
    """Presses on SmolLM2, to which a calibrated router comes with the package."""
    pikv = {"num_experts": 4, "top_k": 2, "router_type": "pikv"}
    return {
        "default": pressed(0.5),
        "default-bf16": pressed(0.75, dtype=BF16, new=4),
        "uniform": pressed(0.75, budget="uniform"),
        "pikv": pressed(0.5, cache_aware=True, **pikv),
        "training-free": pressed(0.75, router=None),
        "streaming": pressed(0.9, streaming=True),
        "decoding": pressed(0.5, decoding=(96, 8), new=20),
        "chunks": in_chunks(0.7),
        "static": pressed(0.75, generate={"cache_implementation": "static"}),
        "padded": pressed(0.75, padding=True, new=4),
        "pipeline": pipeline(),
        "pipeline-uniform": pipeline(budget="uniform"),
    }


def tiny_cases() -> dict[str, Case]:
    """All cases for models of random weights."""
    return simple_cases() | other_cases()

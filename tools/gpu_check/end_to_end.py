"""Step c: a model of Llama-3.1-8B's shape with random weights, with and without the press.

As many layers as memory and time allow: the press's share of a prefill is that of every layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from moekv import DecodingConfig, MoERouterPress, ops

if TYPE_CHECKING:
    from gpu_check.gpu import Gpu, Prefill
    from gpu_check.worker import Items

REPLAYS = 3
PAIRS = "k8v8"
MOST_WAITS = {
    "prefill": 3,
    "step": 0,
    "first step that grows": 1,
    "step that compresses": 2,
    f"prefill to {PAIRS}": 4,
    f"step over {PAIRS}": 0,
    "padded prefill": 8,  # 7 before transformers 5.24
    "padded step": 0,
    f"padded prefill to {PAIRS}": 9,  # as above
    f"padded step over {PAIRS}": 0,
    "padded first step that grows": 4,
    "padded step that compresses": 7,
}
"""How often the host may wait for the device: on a pretended one it does, with any layers."""
SHARE_OF_MEMORY = 0.8  # that weights, both caches and activations may take


def items(gpu: Gpu) -> Items:
    """Return prefill and decoding for each length, and what must hold of a step."""
    ops.check_backend("cuda")
    prefills = {f"{x.tokens} tokens": partial(_prefill, gpu, x) for x in gpu.sizes.prefills}
    return prefills | {
        "graph of a step, static cache": partial(_graph, gpu, _static_cache),
        "graph of a step, ragged cache": partial(_graph, gpu, _ragged_cache),
        "two streams": partial(_two_streams, gpu),
        "waits of the host": partial(_waits, gpu),
    }


# --- The model ------------------------------------------------------------------------------------


_models: dict[int, LlamaForCausalLM] = {}


def _model(gpu: Gpu, layers: int) -> LlamaForCausalLM:
    """Return a model of so many layers; only the last is kept."""
    if layers not in _models:
        _models.clear()
        sizes = gpu.sizes
        config = LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=sizes.num_query_heads,
            num_key_value_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            max_position_embeddings=2**17,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            dtype=torch.bfloat16,
        )
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # in fp32 first, it would not fit
        try:
            with gpu.device:
                _models[layers] = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    return _models[layers].eval()


def _layers_that_fit(gpu: Gpu, prefill: Prefill) -> int:
    _models.clear()
    sizes = gpu.sizes
    width = sizes.hidden_size
    pairs = 2 * sizes.num_kv_heads * sizes.head_dim * prefill.tokens
    weights = 3 * width * sizes.intermediate_size
    weights += 2 * width * sizes.head_dim * (sizes.num_query_heads + sizes.num_kv_heads)
    activations = prefill.tokens * (6 * width + 3 * sizes.intermediate_size)
    fixed = 2 * width * sizes.vocabulary + activations
    free = SHARE_OF_MEMORY * gpu.free_bytes() / 2 - fixed  # numbers of two bytes
    fitting = int(free // (weights + 2 * pairs))  # a cache, and what is kept of it
    if fitting < 1:
        raise MemoryError(f"expected room for a layer of {prefill.tokens} tokens, got {free:.3g}")
    return min(prefill.layers, fitting)


def _prompt(gpu: Gpu, num_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, gpu.sizes.vocabulary, (1, num_tokens), generator=generator)
    return ids.to(gpu.device)


def _press(**options: Any) -> MoERouterPress:
    return MoERouterPress(0.5, backend="cuda", **options)


def _fill(model: LlamaForCausalLM, ids: Tensor, cache: Cache, press: MoERouterPress | None) -> Any:
    """Feed a prompt; return the logits behind it."""
    if press is None:
        return model(ids, past_key_values=cache, logits_to_keep=1).logits
    with press(model):
        return model(ids, past_key_values=cache, logits_to_keep=1).logits


# --- Times ----------------------------------------------------------------------------------------


@torch.no_grad()
def _prefill(gpu: Gpu, prefill: Prefill) -> dict[str, Any]:
    layers = _layers_that_fit(gpu, prefill)
    model = _model(gpu, layers)
    short = _prompt(gpu, min(512, prefill.tokens))
    presses: dict[str, Callable[[], MoERouterPress | None]] = {
        "full": lambda: None,
        "press": _press,
        "uniform": lambda: _press(budget="uniform"),
    }
    told: dict[str, Any] = {"layers": layers}
    for name, make in presses.items():
        _fill(model, short, DynamicCache(), make())  # what is slow once
        times, caches = [], []

        def fill(make: Any = make, caches: list[Cache] = caches) -> None:
            caches[:] = [DynamicCache()]
            _fill(model, _prompt(gpu, prefill.tokens), caches[0], make())

        for _ in range(prefill.rounds - 1):
            times.append(gpu.wall_seconds(fill))
        caches.clear()
        peak = gpu.peak_bytes(lambda fill=fill, times=times: times.append(gpu.wall_seconds(fill)))
        told[f"{name} s"] = min(times)
        told[f"{name} peak GB"] = peak * 1e-9
        told[f"{name} tokens/s"] = _tokens_per_second(gpu, model, caches[0])
    for name in ("press", "uniform"):
        told[f"{name}'s share"] = f"{1 - told['full s'] / told[f'{name} s']:.1%}"
    return told


def _tokens_per_second(gpu: Gpu, model: LlamaForCausalLM, cache: Cache) -> float:
    token = _prompt(gpu, 1, seed=1)

    def decode() -> None:
        for _ in range(gpu.sizes.decoded):
            model(token, past_key_values=cache)

    model(token, past_key_values=cache)
    return gpu.sizes.decoded / gpu.wall_seconds(decode)


# --- What must hold -------------------------------------------------------------------------------


def _static_cache(gpu: Gpu, model: LlamaForCausalLM) -> Cache:
    tokens = gpu.sizes.graph.tokens
    cache = StaticCache(config=model.config, max_cache_len=tokens + 64)
    _fill(model, _prompt(gpu, tokens), cache, _press(budget="uniform"))
    return cache


def _ragged_cache(gpu: Gpu, model: LlamaForCausalLM) -> Cache:
    cache = DynamicCache()
    _fill(model, _prompt(gpu, gpu.sizes.graph.tokens), cache, _press(budget="model"))
    return cache


@torch.no_grad()
def _graph(gpu: Gpu, make: Callable[[Gpu, LlamaForCausalLM], Cache]) -> dict[str, Any]:
    """Capture a step and replay it with other tokens; what comes out is what comes without."""
    model = _model(gpu, gpu.sizes.graph.layers)
    cache = make(gpu, model)
    tokens = [_prompt(gpu, 1, seed) for seed in range(REPLAYS)]
    # Static caches take the position from here, before anything is captured.
    position = torch.full((1, 1), gpu.sizes.graph.tokens, device=gpu.device)

    def step(token: Tensor, cache: Cache) -> Tensor:
        logits: Tensor = model(token, past_key_values=cache, position_ids=position).logits
        return logits

    expected = [step(token, copy.deepcopy(cache)).clone() for token in tokens]
    states = [copy.deepcopy(cache) for _ in range(REPLAYS)]
    eager = min(gpu.wall_seconds(partial(step, tokens[0], state)) for state in states)
    graphed, before = copy.deepcopy(cache), copy.deepcopy(cache)
    token, got = tokens[0].clone(), []
    replay = gpu.capture(lambda: got.append(step(token, graphed)))
    times = []
    for other, want in zip(tokens, expected, strict=True):
        _restore(graphed, before)
        token.copy_(other)
        times.append(gpu.wall_seconds(replay))
        # A captured product may take another path, whose sums are ordered differently.
        torch.testing.assert_close(got[-1].float(), want.float(), atol=2e-2, rtol=2e-2)
    return {"eager ms": eager * 1e3, "graph ms": min(times) * 1e3}


def _restore(cache: Cache, before: Cache) -> None:
    """Set what a static cache holds to what it held; other steps leave it as it is."""
    if not isinstance(cache, StaticCache):
        return
    for layer, old in zip(cache.layers, before.layers, strict=True):
        for name, value in vars(old).items():
            if isinstance(value, Tensor):
                getattr(layer, name).copy_(value)


@torch.no_grad()
def _two_streams(gpu: Gpu) -> None:
    """Two prefills and steps at once give what they give one after the other."""
    model, tokens = _model(gpu, gpu.sizes.graph.layers), gpu.sizes.graph.tokens
    prompts = [_prompt(gpu, tokens, seed) for seed in range(2)]

    def run(ids: Tensor, into: list[Tensor]) -> None:
        cache = DynamicCache()
        _fill(model, ids, cache, _press(budget="model"))
        into.append(model(ids[:, :1], past_key_values=cache).logits)

    expected: list[Tensor] = []
    for ids in prompts:
        run(ids, expected)
    gpu.synchronize()
    got: list[list[Tensor]] = [[], []]
    for ids, into in zip(prompts, got, strict=True):
        gpu.on_a_stream(partial(run, ids, into))
    gpu.synchronize()
    for (x,), want in zip(got, expected, strict=True):
        torch.testing.assert_close(x.float(), want.float(), atol=2e-2, rtol=2e-2)


@torch.no_grad()
def _waits(gpu: Gpu) -> dict[str, Any]:
    """Count how often the host waits for the device, in prefills and steps."""
    model, tokens = _model(gpu, gpu.sizes.graph.layers), gpu.sizes.graph.tokens
    ids = _prompt(gpu, tokens).repeat(2, 1)
    padded = torch.ones_like(ids)
    padded[0, : tokens // 3] = 0
    told: dict[str, int] = {}
    for name, mask in (("", None), ("padded ", padded)):
        press, quantising = _press(budget="model"), _press(budget="model", pairs=PAIRS)
        growing = _press(budget="model", decoding=DecodingConfig(target=tokens // 2, interval=2))
        for _ in range(2):  # what is learned of a model is learned once
            told |= _waits_once(gpu, model, ids, mask, press, f"{name}prefill", f"{name}step")
            stored = [f"{name}prefill to {PAIRS}", f"{name}step over {PAIRS}"]
            told |= _waits_once(gpu, model, ids, mask, quantising, *stored)
            steps = [f"{name}first step that grows", f"{name}step that compresses"]
            told |= _waits_while_growing(gpu, model, ids, mask, growing, steps)
    more = {name: count for name, count in told.items() if count > MOST_WAITS[name]}
    assert not more, f"expected at most {MOST_WAITS}, got {more}"
    return {f"{name}, waits": count for name, count in told.items()}


def _waits_once(
    gpu: Gpu,
    model: LlamaForCausalLM,
    ids: Tensor,
    mask: Tensor | None,
    press: MoERouterPress,
    *names: str,
) -> dict[str, int]:
    """Count in a prefill, and in a step behind the block."""
    cache = DynamicCache()

    def fill() -> None:
        with press(model):
            model(ids, past_key_values=cache, logits_to_keep=1, attention_mask=mask)

    counts = (
        gpu.count_waits(fill),
        gpu.count_waits(lambda: model(ids[:, :1], past_key_values=cache)),
    )
    return dict(zip(names, counts, strict=True))


def _waits_while_growing(
    gpu: Gpu,
    model: LlamaForCausalLM,
    ids: Tensor,
    mask: Tensor | None,
    press: MoERouterPress,
    names: list[str],
) -> dict[str, int]:
    """Count in the steps of a block, of which the last compresses."""
    cache, told = DynamicCache(), {}
    with press(model):
        model(ids, past_key_values=cache, logits_to_keep=1, attention_mask=mask)
        for name in names:
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            told[name] = gpu.count_waits(
                lambda mask=mask: model(ids[:, :1], past_key_values=cache, attention_mask=mask)
            )
    return told

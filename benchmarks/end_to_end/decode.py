"""Decode speed and cache bytes behind a long context, with three quarters of the cache removed.

    python -m benchmarks.end_to_end.decode --model smollm2 --lengths 2048 8192 32768
    python -m benchmarks.end_to_end.decode --model llama-shape --lengths 8192 32768

Everything of one length is measured in one process, in turns: whole tokens of the model, then the
attention of all its layers alone. A context is prefilled once and recalled for every method, or
with `--random-context` its keys, values and hidden states are random numbers. The attention is
checked before it is timed. transformers' quantised caches run where they are asked for, as each
needs a library: `pip install --no-deps optimum-quanto hqq einops`.
`python -m benchmarks.end_to_end.report` makes tables of the results.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from kvpress import AdaKVPress, KeyDiffPress
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.measure import interleave
from benchmarks.quality.presses import PEERS
from benchmarks.quality.replay import LayerTape, Recording, record, replay
from moekv import MoERouterPress, ragged
from moekv.cache.attention import attend
from moekv.cache.buffers import storage_bytes
from moekv.cache.growing import GrowingLayer
from moekv.cache.ragged import RaggedLayer
from moekv.models.watching import Asked

from .runs import Run, random_ids

RATIO = 0.75
FULL, UNIFORM, RAGGED = "full cache", "moekv, uniform", "moekv, budget=model"
PEER_UNIFORM = "kvpress KeyDiff, uniform"
FLOOR = "16 tokens of context"  # the model alone, which no cache makes faster
QUANTISED = ("k8v8", "k8v4", "k4v4")  # the same pairs
READ = "adding up a quarter of it"  # reading alone, which no attention makes faster

METHODS: dict[str, Callable[[], Any]] = {
    FULL: lambda: None,
    PEER_UNIFORM: lambda: KeyDiffPress(RATIO),
    # They keep other pairs, and as many: what differs is the prefill.
    **{
        f"kvpress {name}, uniform": lambda make=PEERS[f"{name}Press"]: make(RATIO)
        for name in (
            *("SnapKV", "StreamingLLM", "TOVA", "Knorm"),
            *("ExpectedAttention", "Compactor"),
        )
    },
    "kvpress AdaKV(KeyDiff), masked": lambda: AdaKVPress(KeyDiffPress(RATIO)),
    "moekv.ragged(AdaKV(KeyDiff))": lambda: ragged(AdaKVPress(KeyDiffPress(RATIO))),
    UNIFORM: lambda: MoERouterPress(RATIO, budget="uniform", router=None),
    RAGGED: lambda: MoERouterPress(RATIO, budget="model", router=None),
}

#: Whole caches in fewer bits: moekv's, and transformers', by library, at settings that these take.
MORE: dict[str, Any] = {
    **{
        f"moekv, all pairs in {pairs}": lambda pairs=pairs: MoERouterPress(0, pairs=pairs)
        for pairs in QUANTISED
    },
    "QuantizedCache, 8 bits (HQQ)": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
    "QuantizedCache, 4 bits (quanto)": {"backend": "quanto", "nbits": 4},
}


def random_context(model: PreTrainedModel, length: int) -> Recording:
    """Make up what a prefill would have computed."""
    config, module = model.config, model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(model.dtype)

    hidden = random(length, config.hidden_size)
    heads = config.num_key_value_heads, length, module.head_dim
    query = random(config.num_attention_heads, length, module.head_dim)
    asked = Asked(query, None, None, module.scaling)
    layers = [
        LayerTape(random(*heads), random(*heads), hidden, hidden, asked)
        for _ in range(config.num_hidden_layers)
    ]
    return Recording(random_ids(model, length), layers)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all storages under a cache."""
    if isinstance(cache, QuantizedCache):
        return sum(storage_bytes(*_tensors_in(vars(layer))) for layer in cache.layers)
    return sum(
        layer.nbytes
        if isinstance(layer, RaggedLayer | GrowingLayer)
        else storage_bytes(layer.keys, layer.values)
        for layer in cache.layers
    )


def _tensors_in(held: Any) -> Iterator[Tensor]:
    """Plain tensors within what a quantisation library has made."""
    if isinstance(held, Tensor) and hasattr(held, "__tensor_flatten__"):
        held = [getattr(held, name) for name in held.__tensor_flatten__()[0]]
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for part in held.values() if isinstance(held, dict) else held:
            yield from _tensors_in(part)


def quantised_cache(model: PreTrainedModel, cache: DynamicCache, name: str) -> QuantizedCache:
    """Copy a full cache into one that transformers quantises."""
    quantised = QuantizedCache(config=model.config, **MORE[name])
    for layer, full in zip(quantised.layers, cache.layers, strict=True):
        layer.update(full.keys, full.values)
    return quantised


def quantised(cache: DynamicCache, pairs: str) -> DynamicCache:
    """Copy a cache of ragged layers, with its pairs in another format."""
    quantised = copy.deepcopy(cache)
    for layer in quantised.layers:
        layer.rows = layer.rows.in_format(pairs)
    return quantised


class Decoder:
    """Feeds one token after the other to a cache of its own, by the model's forward or another."""

    def __init__(
        self, model: PreTrainedModel, cache: Cache, length: int, forward: Any = None
    ) -> None:
        self.model, self.cache, self.position = model, cache, length
        self.forward = model if forward is None else forward
        # kvpress's masked positions are on the modules: caches must not share them.
        self.masks = [_swap_mask(layer, None) for layer in model.model.layers]

    @torch.no_grad()
    def __call__(self) -> None:
        """Decode one token."""
        layers = self.model.model.layers
        for layer, mask in zip(layers, self.masks, strict=True):
            _swap_mask(layer, mask)
        logits = self.forward(
            torch.full((1, 1), 7),
            past_key_values=self.cache,
            position_ids=torch.tensor([[self.position]]),
        ).logits
        for layer in layers:
            _swap_mask(layer, None)
        self.position += 1
        if not logits.isfinite().all():
            raise RuntimeError(f"the logits at position {self.position} are not finite")


def _swap_mask(layer: Any, mask: Any) -> Any:
    old = getattr(layer.self_attn, "masked_key_indices", None)
    layer.self_attn.masked_key_indices = mask
    return old


def attentions(model: PreTrainedModel, caches: dict[str, DynamicCache]) -> dict[str, Any]:
    """The attention of one query in every layer, by what computes it over which cache."""
    modules = [layer.self_attn for layer in model.model.layers]
    config, module = model.config, modules[0]
    shape = (1, config.num_attention_heads, 1, module.head_dim)
    queries = [torch.randn(shape, dtype=model.dtype) for _ in modules]
    # What a step over a dense compressed layer reads, marks included.
    last = [torch.zeros(1, config.num_key_value_heads, 1, module.head_dim, dtype=model.dtype)] * 2
    steps = [GrowingLayer(*_pairs(layer)).update(*last) for layer in caches[UNIFORM].layers]

    def dense(name: str, masked: bool = False) -> list[Tensor]:
        outputs = []
        for module, query, layer in zip(modules, queries, caches[name].layers, strict=True):
            keys, values = _pairs(layer)
            mask = torch.ones(1, 1, 1, keys.shape[2], dtype=torch.bool) if masked else None
            outputs.append(sdpa_attention_forward(module, query, keys, values, mask)[0])
        return outputs

    def served() -> list[Tensor]:
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return [
            attention(module, query, *pairs, None, dropout=0.0, scaling=module.scaling)[0]
            for module, query, pairs in zip(modules, queries, steps, strict=True)
        ]

    def compressed(name: str) -> list[Tensor]:
        return [
            attend(module, query, layer.keys, None, scaling=module.scaling)
            for module, query, layer in zip(modules, queries, caches[name].layers, strict=True)
        ]

    def read() -> list[Tensor]:
        layers = caches[RAGGED].layers
        stored = [pairs for x in layers for pairs in (x.stored_keys, x.stored_values)]
        return [pairs.view(torch.float32).sum() for pairs in stored]

    for query, layer, output in zip(
        queries, caches[RAGGED].layers, compressed(RAGGED), strict=True
    ):
        _check_ragged(query, layer, output, module.scaling)
    for pairs, query, output in zip(steps, queries, served(), strict=True):
        expected = sdpa_attention_forward(module, query, *pairs, None)[0]
        torch.testing.assert_close(output, expected, atol=0.02, rtol=0.02)
    return {
        "SDPA, full cache": partial(dense, FULL),
        "SDPA with a mask, full cache": partial(dense, FULL, masked=True),
        "SDPA, a quarter of it": partial(dense, PEER_UNIFORM),
        "ragged_attention, a quarter, dense": served,
        "ragged_attention, a quarter, ragged": partial(compressed, RAGGED),
        **{
            f"ragged_attention, a quarter, ragged, {pairs}": partial(
                compressed, f"{RAGGED}, {pairs}"
            )
            for pairs in QUANTISED
        },
        READ: read,
    }


def _pairs(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _check_ragged(query: Tensor, layer: RaggedLayer, output: Tensor, scaling: float) -> None:
    """Raise unless a ragged layer's attention is that of its heads, one by one."""
    keys, values, lengths = layer.to_dense()
    group = query.shape[1] // keys.shape[1]
    for head in range(query.shape[1]):
        count = int(lengths[0, head // group])
        k, v = (x[0, head // group, -count:].float() for x in (keys, values))
        expected = (k @ query[0, head, 0].float() * scaling).softmax(0) @ v
        torch.testing.assert_close(output[0, 0, head].float(), expected, atol=0.02, rtol=0.02)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    recording: Recording,
    methods: Sequence[str],
    *,
    seconds: float,
    steps: int,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """One row per method for a whole token behind a context, and per way to attend to it."""
    length = recording.input_ids.shape[1]
    decoders, sizes = {}, {}
    for name in methods:
        made = (METHODS | MORE)[name]
        cache: Any = replay(model, recording, made() if callable(made) else None)
        if not callable(made):
            cache = quantised_cache(model, cache, name)
        sizes[name] = cache_bytes(cache)
        decoders[name] = Decoder(model, cache, length)
        if name == RAGGED:
            for pairs in QUANTISED:
                other = quantised(cache, pairs)
                sizes[f"{name}, {pairs}"] = cache_bytes(other)
                decoders[f"{name}, {pairs}"] = Decoder(model, other, length)
    if compiled:
        forward = torch.compile(model.forward, fullgraph=True, dynamic=True)
        for name in {FULL, RAGGED} & set(decoders):
            cache = copy.deepcopy(decoders[name].cache)
            decoder = Decoder(model, cache, length, forward)
            sizes[f"{name}, compiled"], decoders[f"{name}, compiled"] = sizes[name], decoder
            for _ in range(3):  # the first step has a graph of its own
                decoder()
    short = replay(model, random_context(model, 16), None)
    sizes[FLOOR], decoders[FLOOR] = cache_bytes(short), Decoder(model, short, length)
    gc.collect()
    times = interleave(decoders, seconds=seconds, least=steps, most=10 * steps)
    rows = [
        {"length": length, "step": "token", "method": name, "cache_bytes": sizes[name]}
        | times[name].summary()
        for name in decoders
    ]
    caches = {name: decoder.cache for name, decoder in decoders.items()}
    if {FULL, PEER_UNIFORM, UNIFORM, RAGGED} <= set(methods):
        contenders = attentions(model, caches)
        for name, seen in interleave(contenders, seconds=seconds / 4, least=steps).items():
            rows.append({"length": length, "step": "attention", "method": name} | seen.summary())
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    summary = __doc__.split("\n")[0]
    run = Run("decode", summary, methods=METHODS, more=MORE, lengths=[2048, 8192], ratio=RATIO)
    add = run.parser.add_argument
    add("--random-context", action="store_true", help="do not prefill")
    add("--seconds", type=float, default=5.0, help="of timing for each method")
    add("--steps", type=int, default=12, help="timed steps at least")
    add("--compiled", action="store_true", help="as well, with the model's forward compiled")
    args, model = run.begin(arguments), run.model
    for length in args.lengths:
        if args.random_context:
            recording = random_context(model, length)
        else:
            recording = record(model, random_ids(model, length))
        measured = measure(
            model,
            recording,
            args.methods,
            seconds=args.seconds,
            steps=args.steps,
            compiled=args.compiled,
        )
        run.add(measured)
        for row in measured:
            first, median, third = (1e3 * x for x in row["wall_s"])
            size = f"{row['cache_bytes'] / 2**20:9.1f} MiB" if "cache_bytes" in row else " " * 13
            print(
                f"{length:6,} {row['step']:9} {row['method']:36} {size} {median:8.2f} ms "
                f"({first:.2f} to {third:.2f}), processor {1e3 * row['cpu_s'][1]:8.2f} ms",
                flush=True,
            )
    run.end()


if __name__ == "__main__":
    main()

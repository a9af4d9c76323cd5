"""Decode speed and memory behind a long context, full and with three quarters of the cache removed.

    python -m benchmarks.end_to_end.decode --model smollm2 --lengths 2048 8192
    python -m benchmarks.end_to_end.decode --model llama-shape --lengths 8192 32768

Everything of one length is measured in one process, interleaved, on the same prefilled cache; the
result is checked before it is timed. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from kvpress import AdaKVPress, KeyDiffPress
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moekv import MoERouterPress, ragged
from moekv.layers import GrowingLayer, RaggedLayer, storage_bytes
from moekv.models import load_model

RATIO = 0.75


def llama_shape() -> PreTrainedModel:
    """Two layers with the attention of Llama-3.1-8B, randomly initialised."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )
    with torch.device("cpu"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all storages under a cache."""
    return sum(
        layer.nbytes
        if isinstance(layer, RaggedLayer | GrowingLayer)
        else storage_bytes(layer.keys, layer.values)
        for layer in cache.layers
    )


def methods() -> dict[str, Callable[[], Any] | None]:
    """Presses by the name that the table has for them."""
    return {
        "full cache": None,
        "kvpress KeyDiff, uniform": lambda: KeyDiffPress(RATIO),
        "kvpress AdaKV(KeyDiff), masked": lambda: AdaKVPress(KeyDiffPress(RATIO)),
        "moekv.ragged(AdaKV(KeyDiff))": lambda: ragged(AdaKVPress(KeyDiffPress(RATIO))),
        "moekv, uniform": lambda: MoERouterPress(RATIO),
        "moekv, budget=model": lambda: MoERouterPress(RATIO, budget="model"),
    }


@torch.no_grad()
def measure(model: PreTrainedModel, length: int, steps: int) -> list[tuple[str, int, float, float]]:
    """Bytes after the prefill, and milliseconds per decoded token (median, interquartile range)."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(5, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    runs: dict[str, tuple[DynamicCache, int, Any]] = {}
    for name, make in methods().items():
        cache = DynamicCache()
        masks = None
        if make is None:
            model.model(ids, past_key_values=cache)
        else:
            with make()(model):
                model.model(ids, past_key_values=cache)
            masks = _take_masks(model)
        gc.collect()
        runs[name] = (cache, cache_bytes(cache), masks)
    times: dict[str, list[float]] = {name: [] for name in runs}
    token = torch.full((1, 1), 7)
    for step in range(steps):
        position = torch.tensor([[length + step]])
        for name, (cache, _, masks) in runs.items():
            _give_masks(model, masks)
            begin = time.perf_counter()
            logits = model(token, past_key_values=cache, position_ids=position).logits
            times[name].append(1e3 * (time.perf_counter() - begin))
            _give_masks(model, None)
            if not logits.isfinite().all():
                raise RuntimeError(f"{name}: the logits of step {step} are not finite")
    table = []
    for name, (_, size, _) in runs.items():
        first, median, third = statistics.quantiles(times[name][2:], n=4)
        table.append((name, size, median, third - first))
    return table


def _take_masks(model: PreTrainedModel) -> list[tuple[Tensor, ...] | None]:
    """Take kvpress's masked positions off the layers, so that caches do not share them."""
    masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    _give_masks(model, None)
    return copy.copy(masks)


def _give_masks(model: PreTrainedModel, masks: list[Any] | None) -> None:
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.masked_key_indices = None if masks is None else masks[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["smollm2", "llama-shape"], default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    model = llama_shape() if args.model == "llama-shape" else load_model()[0]
    print(f"{args.model}, bf16, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(
        "| context | method | cache, MiB | of the full one | ms per token (IQR) | times as fast |"
    )
    print("|---|---|---|---|---|---|")
    for length in args.lengths:
        rows = measure(model, length, args.steps)
        full_bytes, full_ms = rows[0][1], rows[0][2]
        for name, size, median, spread in rows:
            print(
                f"| {length:,} | {name} | {size / 2**20:.1f} | {size / full_bytes:.1%} "
                f"| {median:.1f} ({spread:.1f}) | {full_ms / median:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

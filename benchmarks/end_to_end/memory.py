"""What a prefill leaves in memory, and what it takes at the peak, with three quarters removed.

    python -m benchmarks.end_to_end.memory --model smollm2 --lengths 2048 8192

Each method prefills once for every length, all of them in one process one after the other. The
bytes of a cache are those of all storages under it; the resident set is the kernel's, after freed
memory has been given back. Peaks are beyond what was resident before the prefill, in one without
any method the same activations included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from benchmarks.measure import peak_extra_bytes, settled_bytes
from moekv import MoERouterPress, prefill_in_chunks

from .decode import FULL, METHODS, RATIO, UNIFORM, cache_bytes
from .runs import Run, random_ids

STREAMING = "moekv, budget=model, streaming"
UNIFORM_STREAMING = f"{UNIFORM}, streaming"
CHUNK_SIZE = 512
CHUNKS = f"moekv, budget=model, chunks of {CHUNK_SIZE}"

PRESSES: dict[str, Callable[[], Any]] = METHODS | {
    UNIFORM_STREAMING: lambda: MoERouterPress(RATIO, budget="uniform", streaming=True, router=None),
    STREAMING: lambda: MoERouterPress(RATIO, budget="model", streaming=True, router=None),
    CHUNKS: lambda: MoERouterPress(RATIO, budget="model", router=None),
}


class Residence:
    """The most that a cache held while the layers of a prefill ran, and after it."""

    def __init__(self) -> None:
        self.cache = DynamicCache()
        self.peak = 0

    def look(self, *_: Any) -> None:
        """Look at the cache, as a forward hook."""
        self.peak = max(self.peak, cache_bytes(self.cache))


@torch.no_grad()
def measure(model: PreTrainedModel, length: int, name: str) -> dict[str, Any]:
    """One method's row."""
    press, seen, ids = PRESSES[name](), Residence(), random_ids(model, length)
    # Before a press looks at a layer, which is then whole.
    hooks = [
        layer.self_attn.register_forward_hook(seen.look, prepend=True)
        for layer in model.model.layers
    ]

    def prefill() -> None:
        if press is None:
            model.model(ids, past_key_values=seen.cache)
            return
        if name == CHUNKS:
            prefill_in_chunks(press, model, ids, chunk_size=CHUNK_SIZE, past_key_values=seen.cache)
            return
        with press(model):
            model.model(ids, past_key_values=seen.cache)

    before = settled_bytes()
    try:
        peak = peak_extra_bytes(prefill)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in model.model.layers:  # what kvpress's head-wise presses leave behind
        layer.self_attn.masked_key_indices = None
    after = settled_bytes()
    return {
        "length": length,
        "method": name,
        "cache_bytes": cache_bytes(seen.cache),
        "cache_peak_bytes": seen.peak,
        "rss_before": before,
        "rss_after": after,
        "rss_peak_extra": peak,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    summary = __doc__.split("\n")[0]
    run = Run("memory", summary, methods=PRESSES, lengths=[2048, 8192], ratio=RATIO)
    args, model = run.begin(arguments), run.model
    for length in args.lengths:
        measure(model, min(length, 64), FULL)  # first touches of memory, caches of kernels
        for name in args.methods:
            row = measure(model, length, name)
            run.add([row])
            sizes = "cache {cache_bytes}, its peak {cache_peak_bytes}, RSS +{grown}, peak +{peak}"
            mib = {
                key: f"{row[key] / 2**20:.1f}" for key in ("cache_bytes", "cache_peak_bytes")
            } | {
                "grown": f"{(row['rss_after'] - row['rss_before']) / 2**20:.1f}",
                "peak": f"{row['rss_peak_extra'] / 2**20:.1f} MiB",
            }
            print(f"{length:6,} {name:36} {sizes.format(**mib)}", flush=True)
    run.end()


if __name__ == "__main__":
    main()

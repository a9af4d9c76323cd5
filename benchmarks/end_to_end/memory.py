"""What a prefill leaves in memory, what it takes at the peak, and how long the first token takes.

    python -m benchmarks.end_to_end.memory --model smollm2 --lengths 2048 8192

Three quarters of the cache are removed. All methods of a length take turns in one process: their
times are medians over all rounds, their bytes those of the last. Until the first token a model
prefills, compresses and computes the logits of the last position. The
bytes of a cache are those of all storages under it; the resident set is the kernel's, after freed
memory has been given back. Peaks are beyond what was resident before the prefill, in one without
any method the same activations included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from benchmarks.measure import Times, peak_extra_bytes, settled_bytes, timed
from moekv import MoERouterPress, prefill_in_chunks

from .decode import FULL, METHODS, RATIO, UNIFORM, cache_bytes
from .runs import Run, random_ids

STREAMING = "moekv, budget=model, streaming"
UNIFORM_STREAMING = f"{UNIFORM}, streaming"
CHUNKS = {f"moekv, budget=model, chunks of {size}": size for size in (512, 4096)}


def _ours(budget: str, **options: Any) -> Callable[[], MoERouterPress]:
    return lambda: MoERouterPress(RATIO, budget=budget, router=None, **options)


PRESSES: dict[str, Callable[[], Any]] = METHODS | {
    UNIFORM_STREAMING: _ours("uniform", streaming=True),
    "moekv, budget=layer": _ours("layer"),  # its lengths are known after the last layer
    "moekv, budget=head, streaming": _ours("head", streaming=True),
    STREAMING: _ours("model", streaming=True),
    **{name: _ours("model") for name in CHUNKS},
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
def measure(model: PreTrainedModel, length: int, name: str, times: Times) -> dict[str, Any]:
    """One method's row, with the times of this prefill and those before."""
    press, seen, ids = PRESSES[name](), Residence(), random_ids(model, length)
    # Before a press looks at a layer, which is then whole.
    hooks = [
        layer.self_attn.register_forward_hook(seen.look, prepend=True)
        for layer in model.model.layers
    ]

    def prefill() -> None:
        if name in CHUNKS:
            size = CHUNKS[name]
            prefill_in_chunks(press, model, ids, chunk_size=size, past_key_values=seen.cache)
            return
        with nullcontext() if press is None else press(model):
            model(ids, past_key_values=seen.cache, logits_to_keep=1)

    before = settled_bytes()
    try:
        peak = peak_extra_bytes(partial(timed, prefill, times))
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
    } | times.summary()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    summary = __doc__.split("\n")[0]
    run = Run("memory", summary, methods=PRESSES, lengths=[2048, 8192], ratio=RATIO)
    run.parser.add_argument("--rounds", type=int, default=1, help="prefills of each method")
    args, model = run.begin(arguments), run.model
    for length in args.lengths:
        measure(model, min(length, 64), FULL, Times())  # first touches of memory
        times = {name: Times() for name in args.methods}
        rows = {}
        for _ in range(args.rounds):
            for name in args.methods:
                rows[name] = measure(model, length, name, times[name])
        run.add(rows.values())
        for name, row in rows.items():
            sizes = (
                "{seconds} s, cache {cache_bytes}, its peak {cache_peak_bytes}, RSS +{grown}, "
                "peak +{peak}"
            )
            mib = {
                key: f"{row[key] / 2**20:.1f}" for key in ("cache_bytes", "cache_peak_bytes")
            } | {
                "grown": f"{(row['rss_after'] - row['rss_before']) / 2**20:.1f}",
                "peak": f"{row['rss_peak_extra'] / 2**20:.1f} MiB",
                "seconds": f"{row['cpu_s'][1]:.2f}",
            }
            print(f"{length:6,} {name:36} {sizes.format(**mib)}", flush=True)
    run.end()


if __name__ == "__main__":
    main()

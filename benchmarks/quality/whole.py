"""Whole caches in fewer bits, nothing evicted: moekv's beside transformers' QuantizedCache.

    pip install --no-deps optimum-quanto hqq einops
    python -m benchmarks.quality.whole

KL divergence from the full cache over the answers of some tasks, and bytes on storages. How fast
tokens are decoded behind them is measured by `python -m benchmarks.end_to_end.decode`, as is where
the results go: `python -m benchmarks.end_to_end.report` makes the table of docs/memory.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.end_to_end.decode import MORE, cache_bytes, quantised_cache
from benchmarks.measure import RESULTS, write_results
from moekv import MoERouterPress
from moekv.models.loading import load_model

from .metrics import compare
from .replay import Recording, answer_logits, record, replay
from .run import Cell, from_seed
from .tasks import encode

TASKS = ("needle_prose", "many_keys", "facts", "recall", "continue_prose", "variable_tracking")
FULL = "full cache"

Make = Callable[[PreTrainedModel, Recording], Cache]


def _ours(pairs: str) -> Make:
    return lambda model, recording: replay(model, recording, MoERouterPress(0, pairs=pairs))


def _theirs(name: str) -> Make:
    def make(model: PreTrainedModel, recording: Recording) -> Cache:
        return quantised_cache(model, replay(model, recording, None), name)

    return make


CACHES: dict[str, Make] = {
    FULL: lambda model, recording: replay(model, recording, None),
    **{f"moekv, all pairs in {pairs}": _ours(pairs) for pairs in ("k8v8", "k8v4", "k4v4")},
    **{name: _theirs(name) for name in MORE if name.startswith("QuantizedCache")},
}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    caches: Sequence[str],
    length: int,
    index: int = 0,
) -> list[dict[str, Any]]:
    """One row per cache: its bytes, and the KL divergence of each task."""
    divergence: dict[str, dict[str, float]] = {name: {} for name in caches}
    sizes = dict.fromkeys(caches, 0)
    for task in tasks:
        sample = from_seed(tokenizer)(Cell(task, length, index, FULL, 0.0))
        ids = (torch.tensor([part]) for part in encode(sample, tokenizer, seen=False))
        context, question, answer = ids
        recording = record(model, context)

        def logits(cache: Cache, given: Any = (context, question, answer)) -> torch.Tensor:
            context, question, answer = given
            return answer_logits(model, cache, context.shape[1], question, answer)

        full = logits(CACHES[FULL](model, recording))
        for name in caches:
            cache = CACHES[name](model, recording)
            sizes[name] += cache_bytes(cache)
            divergence[name][task] = compare(logits(cache), full, answer[0]).kl
    return [
        {"method": name, "length": length, "cache_bytes": sizes[name] / len(tasks)}
        | {"kl": divergence[name], "mean_kl": statistics.fmean(divergence[name].values())}
        for name in caches
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "whole-smollm2.json")
    args = parser.parse_args(arguments)
    model, tokenizer = load_model()
    rows = measure(model, tokenizer, TASKS, list(CACHES), 1000)
    common = {"threads": torch.get_num_threads()}
    write_results(args.out, "python -m benchmarks.quality.whole", [common | row for row in rows])
    for row in rows:
        print(f"{row['method']:34} {row['mean_kl']:.2e} {row['cache_bytes'] / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()

"""Decode speed of batches whose rows differ in length, with three quarters of the cache removed.

    python -m benchmarks.end_to_end.batches --lengths 8 16

Here a length is a number of rows: their texts, of random tokens, are 256 to 2,048 tokens long and
padded at the left. Methods take turns, one token of every row at a time, in one process; each has
a cache of its own. Logits are checked to be finite.
`python -m benchmarks.end_to_end.report` makes a table of the results.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kvpress import KeyDiffPress, SnapKVPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.measure import interleave
from moekv import MoERouterPress

from .decode import FULL, RATIO, cache_bytes
from .runs import Run

SHORTEST, LONGEST = 256, 2048

METHODS: dict[str, Callable[[], Any]] = {
    FULL: lambda: None,
    "kvpress KeyDiff, uniform": lambda: KeyDiffPress(RATIO),
    "kvpress SnapKV, uniform": lambda: SnapKVPress(RATIO),
    "moekv, budget=model": lambda: MoERouterPress(RATIO, budget="model", router=None),
    "moekv, budget=model, k8v4": lambda: MoERouterPress(
        RATIO, budget="model", router=None, pairs="k8v4"
    ),
}


class Batch:
    """Decodes one token of every row after the other, behind texts of several lengths."""

    def __init__(self, model: PreTrainedModel, rows: int, press: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, model.config.vocab_size, (rows, LONGEST), generator=generator)
        lengths = torch.linspace(SHORTEST, LONGEST, rows).long()
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.mask = (torch.arange(LONGEST) >= LONGEST - lengths[:, None]).long()
        self.position = lengths[:, None]
        inputs = {"attention_mask": self.mask, "position_ids": (self.mask.cumsum(1) - 1).clamp(0)}
        if press is None:
            self._feed(ids, **inputs)
        else:
            with press(model):
                self._feed(ids, **inputs)

    @torch.no_grad()
    def _feed(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(
            ids, past_key_values=self.cache, logits_to_keep=1, **inputs
        ).logits
        return logits

    def __call__(self) -> Tensor:
        """Decode a token of every row; return the logits [rows, 1, vocabulary]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        token = torch.full((len(self.mask), 1), 7)
        logits = self._feed(token, attention_mask=self.mask, position_ids=self.position)
        self.position = self.position + 1
        if not logits.isfinite().all():
            raise RuntimeError(f"the logits behind {self.mask.shape[1]} tokens are not finite")
        return logits


def measure(
    model: PreTrainedModel, rows: int, methods: Sequence[str], *, seconds: float, steps: int
) -> list[dict[str, Any]]:
    """One row of results per method."""
    batches = {name: Batch(model, rows, METHODS[name]()) for name in methods}
    gc.collect()
    times = interleave(batches, seconds=seconds, least=steps, most=10 * steps)
    return [
        {"length": rows, "method": name, "cache_bytes": cache_bytes(batch.cache)}
        | times[name].summary()
        for name, batch in batches.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    description = __doc__.split("\n")[0]
    run = Run("batches", description, methods=METHODS, lengths=[8, 16], ratio=RATIO)
    run.parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each method")
    run.parser.add_argument("--steps", type=int, default=10, help="timed steps at least")
    args = run.begin(arguments)
    for rows in args.lengths:
        measured = measure(run.model, rows, args.methods, seconds=args.seconds, steps=args.steps)
        run.add(measured)
        for row in measured:
            first, median, third = (1e3 * x for x in row["wall_s"])
            print(f"{rows:3} {row['method']:30} {median:8.1f} ms ({first:.1f} to {third:.1f})")
    run.end()


if __name__ == "__main__":
    main()

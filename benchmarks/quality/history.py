"""What a router's memory of hit rates changes: `python -m benchmarks.quality.history`.

The main benchmark has a press for every answer, and a ``"pikv"`` router's history acts between
prefills only. Here one press serves all contexts in order, once with the history and once without
(`cache_aware`), so that the same contexts meet the same experts and differ in their choice alone.
The first `cache_update_interval` contexts find no history yet, and are left out of the comparison.

Writes ``history.json``, which ``moekv bench report`` makes a table of.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.measure import environment
from moekv import MoERouterPress
from moekv.models.index import DEFAULT_MODEL
from moekv.models.loading import load_model

from .metrics import compare, exponential, mean
from .replay import answer_logits, record, replay
from .tasks import TASKS, encode, make_sample


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    presses: Sequence[MoERouterPress],
    tasks: Sequence[str],
    *,
    samples: int,
    length: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Let each press serve the same contexts, a sample of every task, then the next of every task.

    Returns
    -------
    list of dict
        Of each answer the `task`, `index`, `ratio`, `cache_aware` and `kl`, and `before`, how many
        contexts the press had served.
    """
    rows = []
    for before, (index, task) in enumerate((i, task) for i in range(samples) for task in tasks):
        sample = make_sample(task, tokenizer, length=length, index=index, seed=seed)
        parts = (torch.tensor([part], device=model.device) for part in encode(sample, tokenizer))
        context, question, answer = parts
        recording = record(model, context)

        def logits(press: MoERouterPress | None) -> torch.Tensor:
            cache = replay(model, recording, press)  # noqa: B023
            return answer_logits(model, cache, context.shape[1], question, answer)  # noqa: B023

        full = logits(None)
        for press in presses:
            quality = compare(logits(press), full, answer[0])
            rows.append(
                {
                    "task": task,
                    "index": index,
                    "before": before,
                    "ratio": press.compression_ratio,
                    "cache_aware": press.cache_aware,
                    "kl": quality.kl,
                }
            )
    return rows


UPDATE_INTERVAL = 4
"""Contexts between changes of the bias: the default of ``PiKVMoERouter``."""


def table(results: dict[str, Any]) -> list[str]:
    """Write mean KL without and with the history, task by task, as markdown."""
    rows = [row for row in results["rows"] if row["before"] >= results["cache_update_interval"]]
    ratios = sorted({row["ratio"] for row in rows})
    found = {(r["task"], r["index"], r["ratio"], r["cache_aware"]): r["kl"] for r in rows}
    lines = [
        "| task | " + " | ".join(f"{ratio:.0%} removed" for ratio in ratios) + " |",
        "|---" * (1 + len(ratios)) + "|",
    ]
    logs: dict[float, list[float]] = {ratio: [] for ratio in ratios}
    for task in dict.fromkeys(row["task"] for row in rows):
        entries = []
        for ratio in ratios:
            own = [(i, k) for (t, i, r, k) in found if (t, r) == (task, ratio)]
            indices = sorted({i for i, _ in own})
            off, on = ([found[task, i, ratio, aware] for i in indices] for aware in (False, True))
            logs[ratio] += [math.log(b / a) for a, b in zip(off, on, strict=True)]
            entries.append(f"{sum(off) / len(off):.3f}, {sum(on) / len(on):.3f}")
        lines.append(f"| {task} | " + " | ".join(entries) + " |")
    ratio_of = []
    for ratio in ratios:
        found = mean(logs[ratio])
        text, interval = f"**{math.exp(found.value):.3f}**", exponential(found.interval())
        if interval is not None:
            text += f", {interval[0]:.3f} to {interval[1]:.3f}"
        ratio_of.append(text)
    return [*lines, "| with / without | " + " | ".join(ratio_of) + " |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4, help="of each task [%(default)s]")
    parser.add_argument("--length", type=int, default=1000, help="tokens [%(default)s]")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--num-experts", type=int, default=4, help="of the registry [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    args = parser.parse_args()
    model, tokenizer = load_model(DEFAULT_MODEL)
    presses = [
        MoERouterPress(
            ratio,
            num_experts=args.num_experts,
            top_k=2,
            router_type="pikv",
            cache_aware=cache_aware,
        )
        for ratio in args.ratios
        for cache_aware in (False, True)
    ]
    rows = serve(
        model,
        tokenizer,
        presses,
        list(TASKS),
        samples=args.samples,
        length=args.length,
        seed=args.seed,
    )
    results = environment() | {
        "model": DEFAULT_MODEL,
        "seed": args.seed,
        "samples": args.samples,
        "num_experts": args.num_experts,
        "cache_update_interval": UPDATE_INTERVAL,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "history.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()

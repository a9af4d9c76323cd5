"""Times every op on a GPU against a copy measured beside it.

Run by ``make gpu-check`` after the tests of the ops. The shapes are those of docs/cuda.md: one
layer of an 8B model with GQA, bf16, batch 1. Each result is compared with ``moekv.reference``
before it is timed; times are medians with cold caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekv import ops, reference

NUM_QUERY_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_QUERIES = 32, 8, 128, 64
NUM_EXPERTS, TOP_K, HIDDEN_SIZE = 4, 2, 4096
REPEATS = 30


@dataclasses.dataclass
class Timed:
    """One row of the table: what runs, and the bytes per token that must cross the memory."""

    name: str
    bytes_per_token: float
    run: Callable[[Any], Any]  # a backend's ops in
    before: Callable[[], None] = lambda: None  # restores what a run overwrites


class Clock:
    """Times a call on the device, with nothing of its inputs in the caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 2**28 if device.type == "cuda" else 2**26
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], Any], before: Callable[[], None]) -> list[float]:
        """Return the time of each of REPEATS calls, after a few that are not counted."""
        times = []
        for i in range(REPEATS + 3):
            before()
            self.flush.fill_(i % 128)
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e-3)
            else:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        return times[3:]


def make_ops(num_tokens: int, device: torch.device) -> list[Timed]:
    """Return the ops on inputs of ``num_tokens`` positions."""
    generator = torch.Generator(device).manual_seed(num_tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    kept = num_tokens // 2
    logits = random(num_tokens, NUM_EXPERTS)
    keys = random(1, NUM_KV_HEADS, num_tokens, HEAD_DIM)
    values = random(1, NUM_KV_HEADS, num_tokens, HEAD_DIM)
    queries = random(1, NUM_QUERY_HEADS, NUM_QUERIES, HEAD_DIM)
    hidden = random(1, num_tokens, HIDDEN_SIZE)
    expert_scores = random(NUM_EXPERTS, 1, NUM_KV_HEADS, num_tokens).float()
    gate = reference.gating_topk(logits, k=TOP_K)
    weights, experts = (x.view(1, num_tokens, TOP_K) for x in gate[:2])
    scores = expert_scores[0].view(NUM_KV_HEADS, 1, num_tokens)
    total = [kept] * NUM_KV_HEADS
    indices, _ = reference.select_kept(scores, total=total)
    indices = indices.view(1, NUM_KV_HEADS, kept)
    moved = [keys.clone(), values.clone()]

    def restore() -> None:
        moved[0].copy_(keys)
        moved[1].copy_(values)

    def compact(backend: Any) -> list[Tensor]:
        backend.kv_compact_(*moved, indices)
        return moved

    stored = [x.reshape(-1, HEAD_DIM)[: NUM_KV_HEADS * kept] for x in (keys, values)]
    begin = torch.arange(NUM_KV_HEADS, dtype=torch.int32, device=device).view(1, -1) * kept

    def score(kind: ops.ScoreKind) -> Callable[[Any], Any]:
        return lambda backend: backend.expert_scores(
            keys, values, queries, kinds=[int(kind)], scaling=HEAD_DIM**-0.5
        )

    plane = NUM_KV_HEADS * HEAD_DIM * 2  # keys of one position
    row = NUM_KV_HEADS * 4  # scores of one position
    return [
        Timed(
            "gating_topk",
            NUM_EXPERTS * 2 + TOP_K * 8,
            lambda backend: backend.gating_topk(logits, k=TOP_K),
        ),
        Timed("expert_scores MASS", 2 * plane + row, score(ops.ScoreKind.MASS)),
        Timed("expert_scores DIVERSITY", 2 * plane + row, score(ops.ScoreKind.DIVERSITY)),
        Timed("expert_scores LAG", 2 * plane + row, score(ops.ScoreKind.LAG)),
        Timed(
            "token_standout",
            2 * HIDDEN_SIZE * 2 + 4,
            lambda backend: backend.token_standout(hidden),
        ),
        Timed(
            "mix_scores",
            (NUM_EXPERTS + 1) * row + TOP_K * 8,
            lambda backend: backend.mix_scores(expert_scores, weights, experts),
        ),
        Timed(
            "select_kept",
            row + row / 2,
            lambda backend: backend.select_kept(scores, total=total),
        ),
        Timed("kv_compact_", 2 * plane, compact, restore),
        Timed(
            "ragged_attention",
            plane,
            lambda backend: backend.ragged_attention(
                queries[:, :, :1], *stored, begin, begin + kept, scaling=HEAD_DIM**-0.5
            ),
        ),
    ]


def check(op: Timed) -> None:
    """Compare with the reference; of the gate only what rounding does not move."""
    op.before()
    expected = op.run(reference)
    expected = [x.clone() for x in ([expected] if isinstance(expected, Tensor) else expected)]
    op.before()
    got = op.run(torch.ops.moekv)
    got = [got] if isinstance(got, Tensor) else got
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        if op.name == "gating_topk" and i in (1, 3):
            assert (x != y).double().mean() < 1e-3, f"{op.name}: other experts"
        else:
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2, msg=lambda m: f"{op.name}: {m}")


def copy_bandwidth(clock: Clock) -> float:
    """Return bytes per second of a copy, reads and writes counted."""
    source = torch.empty_like(clock.flush)
    target = torch.empty_like(clock.flush)
    times = clock.seconds(lambda: target.copy_(source), lambda: None)
    return 2 * source.nbytes / statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--device", default="cuda", help="cpu: to try this script, not the GPU")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    try:
        ops.check_backend(device.type)
    except RuntimeError as error:
        sys.exit(str(error))

    clock = Clock(device)
    copy = copy_bandwidth(clock)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, device copy {copy * 1e-9:.0f} GB/s\n")
    print("| op | tokens | µs | spread | GB/s | of the copy |")
    print("|---|---:|---:|---:|---:|---:|")
    for num_tokens in arguments.tokens:
        for op in make_ops(num_tokens, device):
            check(op)
            times = clock.seconds(lambda op=op: op.run(torch.ops.moekv), op.before)
            median = statistics.median(times)
            low, *_, high = statistics.quantiles(times, n=10)
            rate = op.bytes_per_token * num_tokens / median
            print(
                f"| `{op.name}` | {num_tokens:,} | {median * 1e6:.1f} "
                f"| {(high - low) / median:.0%} | {rate * 1e-9:.0f} | {rate / copy:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

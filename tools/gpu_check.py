"""Times every op on a GPU against a copy measured beside it.

Run by ``make gpu-check`` after the tests of the ops. The shapes are those of docs/cuda.md: one
layer of an 8B model with GQA, bf16, batch 1. Each result is compared with ``moekv.ops.reference``
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

from moekv import ops
from moekv.ops import reference

NUM_QUERY_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_QUERIES = 32, 8, 128, 64
NUM_EXPERTS, TOP_K, HIDDEN_SIZE = 4, 2, 4096
REPEATS = 30


@dataclasses.dataclass
class Timed:
    """One row of the table: what runs, and the bytes per token that must cross the memory."""

    name: str
    bytes_per_token: float
    run: Callable[[Any], Any]  # takes the module that has the ops
    before: Callable[[], None] = lambda: None  # restores what a run overwrites
    tolerance: float = 1e-3  # of floating results; all others must be equal


class Clock:
    """Times a call on the device, with nothing of its inputs in the caches."""

    def __init__(self, device: torch.device, megabytes: int = 512) -> None:
        self.device = device
        self.other = torch.zeros(megabytes * 2**18, device=device)

    def seconds(self, run: Callable[[], Any], before: Callable[[], None]) -> list[float]:
        """Return the time of each of REPEATS calls, after a few that are not counted."""
        times = []
        for _ in range(REPEATS + 3):
            before()
            # Other memory takes over the caches. It is only read, so that nothing waits to be
            # written back; and nothing waits for it, so that the launches are already queued.
            self.other.sum()
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
    torch.manual_seed(num_tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    kept = num_tokens // 2
    logits = random(num_tokens, NUM_EXPERTS)
    keys = random(1, NUM_KV_HEADS, num_tokens, HEAD_DIM)
    values = random(1, NUM_KV_HEADS, num_tokens, HEAD_DIM)
    queries = random(1, NUM_QUERY_HEADS, NUM_QUERIES, HEAD_DIM)
    hidden = random(1, num_tokens, HIDDEN_SIZE)
    all_queries = random(1, num_tokens, NUM_QUERY_HEADS, HEAD_DIM).transpose(1, 2)
    gate_weight = random(NUM_EXPERTS + 1, HIDDEN_SIZE)
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

    def score(*kinds: ops.ScoreKind) -> Callable[[Any], Any]:
        return lambda backend: backend.expert_scores(
            keys, values, queries, kinds=[int(kind) for kind in kinds], scaling=HEAD_DIM**-0.5
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
        # The keys twice, the values once.
        Timed("expert_scores, all four", 3 * plane + 4 * row, score(*ops.ScoreKind)),
        Timed(
            "expected_attention",
            plane + NUM_QUERY_HEADS * HEAD_DIM * 2 + row,
            lambda backend: backend.expected_attention(all_queries, keys, scaling=HEAD_DIM**-0.5),
        ),
        Timed(
            "project_tokens",
            2 * HIDDEN_SIZE * 2 + (NUM_EXPERTS + 2) * 4,
            lambda backend: backend.project_tokens(hidden, gate_weight),
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
            tolerance=1e-2,  # bf16
        ),
    ]


def check(op: Timed) -> None:
    """Compare the op with the reference, on the device."""
    op.before()
    expected = op.run(reference)
    expected = [x.clone() for x in ([expected] if isinstance(expected, Tensor) else expected)]
    op.before()
    got = op.run(torch.ops.moekv)
    for x, y in zip([got] if isinstance(got, Tensor) else got, expected, strict=True):
        if y.is_floating_point() and op.name != "kv_compact_":
            # Attention is a matter of 1 / num_tokens: absolute errors count by what is usual.
            usual = float(y.abs().mean())
            torch.testing.assert_close(
                x,
                y,
                rtol=op.tolerance,
                atol=op.tolerance * usual,
                msg=lambda message: f"{op.name}: {message}",
            )
        elif not torch.equal(x, y):
            raise AssertionError(f"{op.name}: {(x != y).sum()} of {y.numel()} numbers differ")


def copy_bandwidth(clock: Clock) -> float:
    """Return bytes per second of a copy, reads and writes counted."""
    source, target = (torch.zeros_like(clock.other) for _ in range(2))
    times = clock.seconds(lambda: target.copy_(source), lambda: None)
    return 2 * source.nbytes / statistics.median(times)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--device", default="cuda", help="cpu: to try this script, not the GPU")
    parser.add_argument(
        "--megabytes", type=int, default=512, help="of the copy, and to fill caches"
    )
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    try:
        ops.check_backend(device.type)
    except RuntimeError as error:
        sys.exit(str(error))

    clock = Clock(device, arguments.megabytes)
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

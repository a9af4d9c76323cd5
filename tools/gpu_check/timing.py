"""Step b: the time of every op beside a copy, a matrix product and its peers.

The shapes are those of docs/cuda.md: one layer of an 8B model with GQA, bf16, batch 1. Each result
is compared with ``moekv.ops.reference`` before it is timed; times are medians with cold caches.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpu_check.worker import Skip
from moekv import ops
from moekv.ops import reference

if TYPE_CHECKING:
    from gpu_check.gpu import Gpu
    from gpu_check.worker import Items

NUM_EXPERTS, TOP_K = 4, 2
SLOW = 0.5  # seconds: what takes longer is timed less often


@dataclasses.dataclass
class Timed:
    """What is timed, and what must cross the memory and be computed for each token."""

    name: str
    bytes_per_token: float
    run: Callable[[Any], Any]  # takes the module that has the ops; peers ignore it
    before: Callable[[], None] = lambda: None  # restores what a run overwrites
    tolerance: float = 1e-3  # of floating results; all others must be equal
    flops_per_token: float = 0.0  # of tensor cores


class Clock:
    """Times a call on the device, with nothing of its inputs in the caches."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.other = torch.zeros(gpu.sizes.cold_bytes // 4, device=gpu.device)

    def seconds(self, run: Callable[[], Any], before: Callable[[], None]) -> list[float]:
        """Return the time of each call, after a few that are not counted."""
        times: list[float] = []
        while len(times) < self.gpu.sizes.repeats + 3 and sum(times) < SLOW:
            before()
            # Other memory takes over the caches. It is only read, so that nothing waits to be
            # written back; and nothing waits for it, so that the launches are already queued.
            self.other.sum()
            times.append(self.gpu.seconds(run))
        return times[3:] or times[1:] or times


def items(gpu: Gpu) -> Items:
    """Return the roofline, and each op on each number of tokens, its peers behind it."""
    ops.check_backend("cuda")
    items: Items = {"roofline": partial(_roofline_item, gpu)}
    for tokens in gpu.sizes.layer_tokens:
        for name in OPS:
            items[f"{name} {tokens}"] = partial(_time, gpu, name, tokens)
        for name in PEERS:
            items[f"{name} {tokens}"] = partial(_time_peer, gpu, name, tokens)
    for name in COMPILED:  # last and once: compiling takes seconds
        items[f"{name} {tokens}"] = partial(_time_compiled, gpu, name, tokens)
    return items


def _time(gpu: Gpu, name: str, tokens: int) -> dict[str, Any]:
    op = make_ops(gpu, tokens)[name]
    check(op)
    return _measure(gpu, op, tokens)


def _time_peer(gpu: Gpu, name: str, tokens: int) -> dict[str, Any]:
    return _measure(gpu, make_peers(gpu, tokens)[name], tokens)


def _time_compiled(gpu: Gpu, name: str, tokens: int) -> dict[str, Any]:
    """Time what torch.compile makes of the reference."""
    if importlib.util.find_spec("triton") is None:
        raise Skip("no triton")
    op = make_ops(gpu, tokens)[name.split(":")[0]]
    compiled = torch.compile(partial(op.run, reference), dynamic=False)
    try:
        compiled()
    except Exception as error:
        raise Skip(f"torch.compile: {error}") from error
    return _measure(gpu, dataclasses.replace(op, run=lambda _: compiled()), tokens)


def _measure(gpu: Gpu, op: Timed, tokens: int) -> dict[str, Any]:
    times = _clock(gpu).seconds(lambda: op.run(torch.ops.moekv), op.before)
    median = statistics.median(times)
    copy, product = _roofline(gpu)
    floor = max(op.bytes_per_token * tokens / copy, op.flops_per_token * tokens / product)
    return {
        "µs": median * 1e6,
        "spread": f"{(max(times) - min(times)) / median:.0%}",
        "GB/s": op.bytes_per_token * tokens / median * 1e-9,
        "of the roofline": f"{floor / median:.0%}",
    }


@cache
def _clock(gpu: Gpu) -> Clock:
    return Clock(gpu)


@cache
def _roofline(gpu: Gpu) -> tuple[float, float]:
    """Return bytes per second of a copy, and flops per second of a matrix product in bf16."""
    clock, size = _clock(gpu), gpu.sizes.matrix
    target = torch.zeros_like(clock.other)
    copies = clock.seconds(lambda: target.copy_(clock.other), lambda: None)
    a, b = (torch.randn(size, size, device=gpu.device).bfloat16() for _ in range(2))
    products = clock.seconds(lambda: a @ b, lambda: None)
    return (
        2 * target.nbytes / statistics.median(copies),
        2 * size**3 / statistics.median(products),
    )


def _roofline_item(gpu: Gpu) -> dict[str, Any]:
    copy, product = _roofline(gpu)
    return {"GB/s": copy * 1e-9, "TFLOP/s": product * 1e-12}


# What make_ops and make_peers return: known before anything is allocated.
OPS = (
    "gating_topk",
    "expert_scores MASS",
    "expert_scores DIVERSITY",
    "expert_scores LAG",
    "expert_scores, all four",
    "expected_attention",
    "project_tokens",
    "mix_scores",
    "select_kept",
    "kv_compact_",
    "ragged_attention",
    "ragged_attention, a window",
    "quantize_pairs",
    *(f"ragged_attention, {x}" for x in ops.PAIRS[1:]),
)
COMPILED = ("gating_topk: Triton of torch.compile", "mix_scores: Triton of torch.compile")
PEERS = (
    "select_kept: torch.topk",
    "select_kept: torch.sort",
    "kv_compact_: torch.gather",
    "ragged_attention: SDPA",
    "ragged_attention, a window: SDPA",
)


@dataclasses.dataclass
class Layer:
    """Random inputs of ``num_tokens`` positions."""

    gpu: Gpu
    num_tokens: int

    def __post_init__(self) -> None:
        """Make them."""
        torch.manual_seed(self.num_tokens)
        sizes, num_tokens = self.gpu.sizes, self.num_tokens
        pairs = (1, sizes.num_kv_heads, num_tokens, sizes.head_dim)
        self.kept = num_tokens // 2
        self.scaling = sizes.head_dim**-0.5
        self.logits = self.random(num_tokens, NUM_EXPERTS)
        self.keys, self.values = self.random(*pairs), self.random(*pairs)
        self.queries = self.random(1, sizes.num_query_heads, sizes.num_queries, sizes.head_dim)
        self.hidden = self.random(1, num_tokens, sizes.hidden_size)
        queries = self.random(1, num_tokens, sizes.num_query_heads, sizes.head_dim)
        self.all_queries = queries.transpose(1, 2)
        self.gate_weight = self.random(NUM_EXPERTS + 1, sizes.hidden_size)
        self.expert_scores = self.random(NUM_EXPERTS, *pairs[:3]).float()
        gate = reference.gating_topk(self.logits, k=TOP_K)
        self.weights, self.experts = (x.view(1, num_tokens, TOP_K) for x in gate[:2])
        self.scores = self.expert_scores[0].view(sizes.num_kv_heads, 1, num_tokens)
        self.total = [self.kept] * sizes.num_kv_heads
        indices, _ = reference.select_kept(self.scores, total=self.total)
        self.indices = indices.view(1, sizes.num_kv_heads, self.kept)
        self.moved = [self.keys.clone(), self.values.clone()]
        heads = torch.arange(sizes.num_kv_heads, dtype=torch.int32, device=self.gpu.device)
        self.begin = heads.view(1, -1) * self.kept
        rows = sizes.num_kv_heads * self.kept
        self.coded: dict[str, Any] = {}
        self.stored = [x.reshape(-1, sizes.head_dim)[:rows] for x in (self.keys, self.values)]

    def random(self, *shape: int) -> Tensor:
        """Return normal numbers in bf16."""
        return torch.randn(shape, device=self.gpu.device).bfloat16()

    def restore(self) -> None:
        """Undo a compaction."""
        self.moved[0].copy_(self.keys)
        self.moved[1].copy_(self.values)

    def compact(self, backend: Any) -> list[Tensor]:
        """Move the kept pairs to the front."""
        backend.kv_compact_(*self.moved, self.indices)
        return self.moved

    def score(self, backend: Any, *kinds: ops.ScoreKind) -> Any:
        """Score the pairs."""
        numbers = [int(kind) for kind in kinds]
        inputs = (self.keys, self.values, self.queries)
        return backend.expert_scores(*inputs, kinds=numbers, scaling=self.scaling)

    def attend_coded(self, backend: Any, pairs: str) -> Any:
        """Decode one token over the kept pairs, quantised."""
        if pairs not in self.coded:
            self.coded[pairs] = reference.quantize_pairs(*self.stored, pairs=pairs)
        keys, values, scales = self.coded[pairs]
        ends = (self.begin, self.begin + self.kept)
        return backend.ragged_attention(
            self.queries[:, :, :1],
            *(keys, values, *ends),
            scales=scales,
            scaling=self.scaling,
            pairs=pairs,
        )

    def attend(self, backend: Any, num_queries: int = 1) -> Any:
        """Decode one token over the kept pairs, or more."""
        ends = (self.begin, self.begin + self.kept)
        query = self.queries[:, :, :num_queries]
        return backend.ragged_attention(query, *self.stored, *ends, scaling=self.scaling)


_layers: dict[int, Layer] = {}


def _layer(gpu: Gpu, num_tokens: int) -> Layer:
    """Return the inputs; those of the last number of tokens are kept."""
    if num_tokens not in _layers:
        _layers.clear()
        _layers[num_tokens] = Layer(gpu, num_tokens)
    return _layers[num_tokens]


def make_ops(gpu: Gpu, num_tokens: int) -> dict[str, Timed]:
    """Return the ops on inputs of ``num_tokens`` positions."""
    layer, sizes = _layer(gpu, num_tokens), gpu.sizes
    plane = sizes.num_kv_heads * sizes.head_dim * 2  # keys of one position
    row = sizes.num_kv_heads * 4  # scores of one position
    queries = sizes.num_query_heads * sizes.head_dim * 2
    products = 2 * 2 * sizes.num_query_heads * sizes.num_queries * sizes.head_dim  # of two passes
    kind = ops.ScoreKind
    dims = sizes.head_dim, sizes.head_dim
    coded = {  # bytes of the kept half
        pairs: sizes.num_kv_heads * ops.pair_layout(pairs, *dims).num_bytes / 2
        for pairs in ops.PAIRS[1:]
    }
    timed = [
        Timed(
            "gating_topk",
            NUM_EXPERTS * 2 + TOP_K * 8,
            lambda backend: backend.gating_topk(layer.logits, k=TOP_K),
        ),
        Timed(
            "expert_scores MASS",
            2 * plane + row,
            lambda backend: layer.score(backend, kind.MASS),
            flops_per_token=products,
        ),
        Timed(
            "expert_scores DIVERSITY",
            2 * plane + row,
            lambda backend: layer.score(backend, kind.DIVERSITY),
        ),
        Timed("expert_scores LAG", 2 * plane + row, lambda backend: layer.score(backend, kind.LAG)),
        # The keys twice, the values once.
        Timed(
            "expert_scores, all four",
            3 * plane + 4 * row,
            lambda backend: layer.score(backend, *kind),
            flops_per_token=products,
        ),
        Timed(
            "expected_attention",
            plane + queries + row,
            lambda backend: backend.expected_attention(
                layer.all_queries, layer.keys, scaling=layer.scaling
            ),
            flops_per_token=2 * 88 * sizes.num_query_heads * sizes.head_dim,
        ),
        Timed(
            "project_tokens",
            2 * sizes.hidden_size * 2 + (NUM_EXPERTS + 2) * 4,
            lambda backend: backend.project_tokens(layer.hidden, layer.gate_weight),
        ),
        Timed(
            "mix_scores",
            (NUM_EXPERTS + 1) * row + TOP_K * 8,
            lambda backend: backend.mix_scores(layer.expert_scores, layer.weights, layer.experts),
        ),
        Timed(
            "select_kept",
            row + row / 2,
            lambda backend: backend.select_kept(layer.scores, total=layer.total),
        ),
        Timed("kv_compact_", 2 * plane, layer.compact, layer.restore),
        Timed("ragged_attention", plane, layer.attend, tolerance=1e-2),  # bf16
        Timed(
            "ragged_attention, a window",
            plane,
            lambda backend: layer.attend(backend, sizes.num_queries),
            flops_per_token=products / 2,  # half of the pairs are kept
            tolerance=1e-2,
        ),
        Timed(
            "quantize_pairs",
            plane + coded["k8v4"],
            lambda backend: backend.quantize_pairs(*layer.stored, pairs="k8v4"),
        ),
        *(
            Timed(
                f"ragged_attention, {pairs}",
                size,
                lambda backend, pairs=pairs: layer.attend_coded(backend, pairs),
                tolerance=2e-2,  # numbers of a code are rounded to bf16
            )
            for pairs, size in coded.items()
        ),
    ]
    return {op.name: op for op in timed}


def make_peers(gpu: Gpu, num_tokens: int) -> dict[str, Timed]:
    """Return what else does the ops' work, or a part of it."""
    layer, sizes, own = _layer(gpu, num_tokens), gpu.sizes, make_ops(gpu, num_tokens)

    def gather(_: Any) -> list[Tensor]:
        index = layer.indices.long()[..., None].expand(-1, -1, -1, sizes.head_dim)
        return [x.gather(2, index) for x in (layer.keys, layer.values)]

    rows = layer.scores.view(sizes.num_kv_heads, num_tokens)
    keys, values = (x.view(1, sizes.num_kv_heads, layer.kept, -1) for x in layer.stored)
    attention = torch.nn.functional.scaled_dot_product_attention
    query, window = layer.queries[:, :, :1], layer.queries
    runs: dict[str, Callable[[Any], Any]] = {
        "select_kept: torch.topk": lambda _: rows.topk(layer.kept),
        "select_kept: torch.sort": lambda _: rows.sort(descending=True, stable=True),
        "kv_compact_: torch.gather": gather,
        "ragged_attention: SDPA": lambda _: attention(query, keys, values, enable_gqa=True),
        "ragged_attention, a window: SDPA": lambda _: attention(
            window, keys, values, enable_gqa=True
        ),
    }
    return {
        name: dataclasses.replace(own[name.split(":")[0]], name=name, run=run, before=lambda: None)
        for name, run in runs.items()
    }


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

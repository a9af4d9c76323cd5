"""Inputs for every op, and what must hold of the result.

Each case makes its own inputs (seeded by its fields), each checker runs an implementation of the
op with the signature of its schema and compares with ``moekv.ops.reference`` in fp64. Nothing here
needs the native library, so any implementation can be checked: native, PyTorch, or a simulated
kernel.

As a script, checks the CPU kernels of the instruction set that MOEKV_CPU_CAPABILITY names.
"""

import ctypes
import dataclasses
import mmap
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moekv.ops import reference

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP32, FP16, BF16 = FLOAT_DTYPES

Op = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """The fields of a case, which also seed its random inputs."""

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

    def __str__(self) -> str:
        fields = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        changed = (f"{f.name}={value}" for f, value in fields if value != f.default)
        return ",".join(changed).replace(" ", "").replace("torch.", "")


def with_gaps(tensor: Tensor, *dims: int) -> Tensor:
    """The same values at twice the stride in ``dims``."""
    shape = [size * 2 if i in dims else size for i, size in enumerate(tensor.shape)]
    gaps = tensor.new_zeros(shape) if not tensor.is_floating_point() else tensor.new_full(shape, 7)
    for dim in dims:
        gaps = gaps.unflatten(dim, (tensor.shape[dim], 2)).select(dim + 1, 0)
    return gaps.copy_(tensor)


def double(tensor: Tensor | None) -> Tensor | None:
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


# --- gating_topk ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GatingTopk(Case):
    num_tokens: int
    num_experts: int
    k: int
    dtype: torch.dtype = FP32
    temperature: float = 1.0
    bias: bool = False
    mask: bool = False
    importance: bool = False
    strided: bool = False

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor | None], dict[str, Any]]:
        generator = self.generator()
        logits = torch.randn(self.num_tokens, self.num_experts, generator=generator) * 3
        bias = torch.randn(self.num_experts, generator=generator) * 0.2
        mask = torch.rand(self.num_tokens, generator=generator) < 0.7
        importance = torch.rand(self.num_tokens, generator=generator) * 1.2 - 0.1
        importance[::7] = torch.nan
        logits = logits.to(device, self.dtype)
        return [
            with_gaps(logits, 0) if self.strided else logits,
            bias.to(device) if self.bias else None,
            mask.to(device) if self.mask else None,
            importance.to(device) if self.importance else None,
        ], {"k": self.k, "temperature": self.temperature}


GATING_TOPK = [
    *(GatingTopk(37, e, min(e, 2)) for e in (1, 2, 3, 7, 8, 16, 17, 32, 33, 60, 96, 128, 255, 256)),
    *(GatingTopk(9, e, e) for e in (1, 5, 8, 64, 256)),
    *(GatingTopk(n, 8, 2, mask=True) for n in (0, 1, 3, 500, 5000)),
    GatingTopk(200, 60, 6, BF16, bias=True, mask=True),
    GatingTopk(200, 7, 3, FP16, bias=True, strided=True),
    GatingTopk(100, 96, 8, FP16, temperature=0.5),
    GatingTopk(100, 4, 2, BF16, temperature=4.0, strided=True),
    GatingTopk(64, 128, 1, BF16),
    GatingTopk(300, 4, 2, importance=True),
    GatingTopk(77, 60, 17, FP16, bias=True, mask=True, importance=True),
    GatingTopk(50, 8, 1, importance=True),
    GatingTopk(33, 256, 17, bias=True, mask=True, temperature=0.1),
    # Many experts of whom few are chosen: rows of one vector and more, and what is left of them.
    *(GatingTopk(200, e, k, BF16) for e in (64, 128, 192, 256) for k in (1, 2, 3, 4)),
    GatingTopk(200, 96, 4, BF16, bias=True, mask=True, importance=True),
    GatingTopk(100, 100, 3, FP16, bias=True, strided=True, temperature=0.5),
    GatingTopk(77, 250, 1, mask=True, temperature=0.2),
    GatingTopk(5, 129, 4, bias=True),
]


def check_gating_topk(op: Op, case: GatingTopk, device: str = "cpu") -> None:
    inputs, options = case.inputs(device)
    check_gating_result(op(*inputs, **options), *inputs, **options)


def check_gating_result(
    result: Sequence[Tensor],
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    importance: Tensor | None = None,
    *,
    k: int,
    temperature: float = 1.0,
) -> None:
    weights, experts, prob_sum, load, entropy = result
    num_tokens, num_experts = logits.shape
    assert weights.dtype == prob_sum.dtype == entropy.dtype == torch.float32
    assert experts.dtype == torch.int32
    assert load.dtype == torch.int64
    assert weights.shape == experts.shape == (num_tokens, k)
    _, expected, expected_sum, _, expected_entropy = reference.gating_topk(
        logits.double(), double(bias), mask, k=k, temperature=temperature
    )
    real = torch.ones_like(logits[:, 0], dtype=torch.bool) if mask is None else mask

    # Experts: those of the reference, but for ratings that differ by no more than rounding. Equal
    # ratings are no excuse: ties go to the lower expert.
    probs = reference.gate_probs(logits.double(), temperature)
    rating = probs if bias is None else probs + bias.double().nan_to_num(nan=-torch.inf)
    assert ((experts >= 0) & (experts < num_experts)).all()
    assert (experts.long().sort(-1).values.diff(dim=-1) > 0).all(), "an expert was chosen twice"
    gap = (rating.gather(-1, experts.long()) - rating.gather(-1, expected.long())).abs()
    same = experts == expected
    assert (same | (real[:, None] & (gap > 0) & (gap < 1e-6))).all()

    counts = torch.ones_like(experts, dtype=torch.float64)
    if importance is not None:
        counts = reference.slot_counts(importance, k).double()
    chosen = probs.gather(-1, experts.long()) * counts
    total = chosen.sum(-1, keepdim=True)
    even = counts / counts.sum(-1, keepdim=True)
    expected_weights = torch.where(total > 0, chosen / total, even) * real[:, None]
    torch.testing.assert_close(weights.double(), expected_weights, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(prob_sum.double(), expected_sum, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=2e-5, atol=1e-5)
    used = real[:, None] & (counts > 0)
    count = torch.bincount(experts[used].flatten().long(), minlength=num_experts)
    assert torch.equal(load, count)


# --- expert_scores --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ExpertScores(Case):
    shape: tuple[int, int, int, int]  # B, H, T, D
    group: int = 2
    num_queries: int = 8
    value_dim: int | None = None  # D
    start: tuple[int, ...] | None = None
    kinds: tuple[int, ...] = (0, 1, 2, 3)
    softcap: float = 0.0
    pool: int = 1
    lag: int = 16
    dtype: torch.dtype = FP32
    layout: str = "dense"  # "bthd": [B, T, H, D] in memory, "gaps": also between channels

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor | None], dict[str, Any]]:
        generator = self.generator()
        batch, num_kv_heads, num_keys, head_dim = self.shape

        def random(heads: int, length: int, dim: int) -> Tensor:
            x = torch.randn(batch, heads, length, dim, generator=generator)
            # Keys share a direction, as real ones do.
            x = (x + 0.5 * torch.randn(dim, generator=generator)).to(device, self.dtype)
            if self.layout == "bthd":
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            return with_gaps(x, 1, 2, 3) if self.layout == "gaps" else x

        keys = random(num_kv_heads, num_keys, head_dim)
        values = random(num_kv_heads, num_keys, self.value_dim or head_dim)
        queries = random(num_kv_heads * self.group, self.num_queries, head_dim)
        start = None
        if self.start is not None:
            start = torch.tensor(self.start, dtype=torch.int32, device=device)
        return [keys, values, queries, start], {
            "kinds": list(self.kinds),
            "scaling": head_dim**-0.5,
            "softcap": self.softcap,
            "pool": self.pool,
            "lag": self.lag,
        }


EXPERT_SCORES = [
    *(ExpertScores((1, 2, 75, d)) for d in (1, 8, 64, 80, 96, 128, 256)),
    *(ExpertScores((1, 2, 140, d), dtype=BF16, num_queries=17) for d in (64, 80, 128)),
    ExpertScores((1, 2, 140, 96), dtype=FP16, num_queries=64, pool=5),
    *(ExpertScores((2, 1, t, 16), num_queries=1) for t in (1, 2, 3, 16, 17)),
    ExpertScores((1, 1, 5, 8), num_queries=5, lag=128),
    ExpertScores((1, 2, 0, 16), num_queries=0, kinds=(2, 3)),
    ExpertScores((0, 2, 9, 16)),
    ExpertScores((2, 2, 515, 32), num_queries=33, pool=7, lag=128),
    ExpertScores((1, 1, 1537, 16), group=1, num_queries=3, pool=3, lag=100),
    ExpertScores((3, 2, 70, 24), start=(0, 13, 69), num_queries=9, pool=5),
    ExpertScores((4, 1, 50, 16), start=(50, 49, 45, 20), num_queries=9, pool=3, dtype=BF16),
    ExpertScores((2, 1, 130, 16), start=(3, 131), num_queries=4, lag=32, dtype=FP16),
    ExpertScores((1, 3, 99, 20), group=3, value_dim=12, softcap=5.0, kinds=(3, 1, 0)),
    ExpertScores((1, 3, 99, 12), value_dim=1, lag=3, kinds=(2, 3)),
    ExpertScores((1, 1, 40, 8), lag=1, kinds=(3,)),
    ExpertScores((1, 1, 41, 8), lag=2, kinds=(3, 2), dtype=BF16),
    ExpertScores((2, 2, 90, 64), layout="bthd", pool=3, start=(0, 7)),
    ExpertScores((2, 2, 90, 40), layout="bthd", dtype=BF16),
    ExpertScores((1, 2, 33, 10), layout="gaps", dtype=FP16),
    ExpertScores((2, 1, 1100, 128), 4, 64, start=(0, 333), pool=5, lag=128, dtype=BF16),
    ExpertScores((1, 1, 200, 256), dtype=BF16),
    *(ExpertScores((1, 2, 70, 7), dtype=dtype, lag=20) for dtype in (FP16, BF16)),
    ExpertScores((1, 1, 900, 16), 7, 201, pool=1001, lag=300),
    ExpertScores((1, 1, 385, 32), 1, 385, lag=383),
    *(ExpertScores((1, 2, 60, 32), kinds=(kind,)) for kind in range(4)),
    # One real key in a tile.
    *(ExpertScores((2, 1, 150, 16), start=(127, 63), dtype=dtype) for dtype in (FP32, BF16)),
    ExpertScores((1, 1, 20, 32), kinds=()),
]


def check_expert_scores(op: Op, case: ExpertScores, device: str = "cpu") -> None:
    inputs, options = case.inputs(device)
    keys = inputs[0]
    assert keys is not None
    scores = op(*inputs, **options)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(case.kinds), *keys.shape[:3])
    exact = reference.expert_scores(*map(double, inputs), **options)
    plain = reference.expert_scores(*inputs, **options).double()
    for kind, got, want, fp32 in zip(case.kinds, scores.double(), exact, plain, strict=True):
        assert torch.equal(got.isinf(), want.isinf()), f"kind {kind}: padding"
        error = torch.where(want.isinf(), 0.0, got - want).abs().flatten()
        # As exact as PyTorch in fp32, up to a factor: the spread of LAG may lose many digits.
        slack = torch.where(want.isinf(), 0.0, fp32 - want).abs().flatten()
        scale = want.flatten() if kind == reference.MASS else 1.0
        allowed = 1e-5 * scale + 4 * slack.max() if slack.numel() else slack
        assert (error <= allowed).all(), f"kind {kind}: error {error.max()}, allowed {allowed}"


# --- expected_attention ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Case):
    shape: tuple[int, int, int, int]  # B, H, T, D
    group: int = 2
    start: tuple[int, ...] | None = None
    softcap: float = 0.0
    scaling: float | None = None  # D ** -0.5
    dtype: torch.dtype = FP32
    layout: str = "dense"  # "bthd": [B, T, H, D] in memory, "gaps": also between channels
    turned: int = 0  # channels of a rotation that comes first
    own_turns: bool = False  # each row its own

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor | None], dict[str, Any]]:
        generator = self.generator()
        batch, num_kv_heads, num_keys, head_dim = self.shape

        def random(heads: int) -> Tensor:
            x = torch.randn(batch, heads, num_keys, head_dim, generator=generator)
            x = (1.5 * x).to(device, self.dtype)
            if self.layout == "bthd":
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            return with_gaps(x, 1, 2, 3) if self.layout == "gaps" else x

        start = None
        if self.start is not None:
            start = torch.tensor(self.start, dtype=torch.int32, device=device)
        turn: list[Tensor | None] = []
        if self.turned:
            rows = batch if self.own_turns else 1
            angle = 7 * torch.rand(rows, num_keys, self.turned, generator=generator)
            turn = [angle.cos().to(device), angle.sin().to(device)]
        return [random(num_kv_heads * self.group), random(num_kv_heads), start, *turn], {
            "scaling": self.scaling or head_dim**-0.5,
            "softcap": self.softcap,
        }


EXPECTED_ATTENTION = [
    *(ExpectedAttention((1, 2, 75, d)) for d in (1, 7, 8, 33, 64, 80, 96, 128, 256)),
    *(ExpectedAttention((1, 2, 140, d), dtype=BF16) for d in (1, 31, 64, 80, 128, 256)),
    *(ExpectedAttention((1, 1, 90, d), dtype=FP16) for d in (20, 96)),
    *(ExpectedAttention((2, 1, t, 16), 1) for t in (1, 2, 4, 5, 6, 16, 47, 48, 49, 63, 64, 65, 66)),
    *(ExpectedAttention((1, 2, t, 64), 3, dtype=BF16) for t in (1, 4, 17, 64, 65, 252, 253, 257)),
    *(ExpectedAttention((1, 2, 70, 32), group, layout="bthd") for group in (1, 3, 4, 8)),
    ExpectedAttention((1, 2, 0, 16)),
    ExpectedAttention((0, 2, 9, 16)),
    ExpectedAttention((1, 2, 1100, 64), 3, dtype=BF16, layout="bthd"),
    ExpectedAttention((2, 1, 515, 128), 4, (0, 333), dtype=BF16, layout="bthd"),
    ExpectedAttention((4, 1, 120, 24), 2, (0, 13, 119, 120)),
    ExpectedAttention((3, 2, 300, 16), 2, (-4, 40, 400), dtype=FP16),
    ExpectedAttention((1, 2, 99, 20), 3, softcap=5.0),
    ExpectedAttention((2, 1, 280, 64), 2, (7, 0), softcap=2.0, dtype=BF16),
    ExpectedAttention((1, 2, 130, 10), layout="gaps", dtype=FP16),
    ExpectedAttention((2, 2, 70, 40), 2, (1, 6), layout="gaps"),
    ExpectedAttention((1, 1, 200, 16), scaling=3.0),
]


TURNED = [
    *(
        ExpectedAttention((1, 2, 75, d), turned=t)
        for d, t in ((2, 2), (16, 6), (33, 32), (256, 256))
    ),
    *(
        ExpectedAttention((1, 2, 140, 80), 3, dtype=dtype, layout="bthd", turned=turned)
        for dtype in FLOAT_DTYPES
        for turned in (2, 20, 30, 64, 80)
    ),
    ExpectedAttention((2, 1, 515, 128), 4, (0, 333), dtype=BF16, layout="bthd", turned=128),
    ExpectedAttention((4, 1, 120, 24), 2, (0, 13, 119, 120), turned=24, own_turns=True),
    ExpectedAttention((2, 2, 70, 40), 2, (-4, 6), layout="gaps", turned=36, own_turns=True),
    ExpectedAttention((2, 1, 280, 64), 2, (7, 0), softcap=2.0, dtype=BF16, turned=64),
    ExpectedAttention((2, 2, 0, 16), turned=16),
]
"""Queries that are rotated first, which CUDA's kernel is not asked to do."""


def check_expected_attention(op: Op, case: ExpectedAttention, device: str = "cpu") -> None:
    inputs, options = case.inputs(device)
    scores = op(*inputs, **options)
    assert scores.dtype == torch.float32
    exact = reference.expected_attention(*map(double, inputs), **options)
    plain = reference.expected_attention(*inputs, **options)
    slack = 4 * float((plain.double() - exact).abs().max()) if plain.numel() else 0.0
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=1e-5 + slack)


# --- project_tokens -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProjectTokens(Case):
    shape: tuple[int, int, int]  # B, T, C
    num_projections: int = 5
    dtype: torch.dtype = FP32
    mask: bool = False
    strided: bool = False

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor | None], dict[str, Any]]:
        generator = self.generator()
        # Tokens share a direction, as real ones do.
        hidden = torch.randn(self.shape, generator=generator)
        hidden += torch.randn(self.shape[-1], generator=generator)
        hidden[:, ::3] *= 30  # the length of a token does not count
        weight = torch.randn(self.num_projections, self.shape[-1], generator=generator)
        mask = torch.rand(self.shape[:2], generator=generator) < 0.7
        hidden, weight = hidden.to(device, self.dtype), weight.to(device, self.dtype)
        if self.strided:
            hidden, weight = with_gaps(hidden, 0, 1, 2), with_gaps(weight, 0)
            mask = with_gaps(mask, 1)
        return [hidden, weight, mask.to(device) if self.mask else None], {}


PROJECT_TOKENS = [
    *(ProjectTokens((1, 50, c)) for c in (1, 7, 16, 31, 32, 64, 80, 576)),
    *(ProjectTokens((2, 19, 40), p) for p in (0, 1, 2, 4, 9, 33)),
    *(ProjectTokens((2, t, 40), mask=True) for t in (0, 1, 2, 15, 16, 17, 127, 128, 129, 700)),
    *(ProjectTokens((2, 70, c), 3, t, mask=True) for c in (8, 100) for t in (FP16, BF16)),
    ProjectTokens((0, 9, 8)),
    ProjectTokens((3, 40, 24), strided=True, mask=True),
    ProjectTokens((1, 40, 33), 6, BF16, strided=True),
    ProjectTokens((1, 20, 4100), 2, BF16),
]


def check_project_tokens(op: Op, case: ProjectTokens, device: str = "cpu") -> None:
    inputs, _ = case.inputs(device)
    result = op(*inputs)
    exact = reference.project_tokens(*map(double, inputs))
    plain = reference.project_tokens(*inputs)
    for got, expected, fp32 in zip(result, exact, plain, strict=True):
        assert got.dtype == torch.float32
        # As exact as PyTorch in fp32, up to a factor: small spreads lose many digits.
        slack = 4 * float((fp32.double() - expected).abs().max()) if fp32.numel() else 0.0
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=slack + 1e-5)


# --- mix_scores -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MixScores(Case):
    shape: tuple[int, int, int, int]  # E, B, H, T
    k: int
    per_head: bool = False
    gain: bool = True
    offset: bool = True
    strided: bool = False

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor | None], dict[str, Any]]:
        generator = self.generator()
        num_experts, batch, num_kv_heads, num_keys = self.shape
        scores = torch.randn(self.shape, generator=generator)
        # Padding of some experts scores -inf, and a weight of 0 must hide it.
        scores[num_experts // 2, :, :, ::5] = -torch.inf
        heads = (num_kv_heads,) if self.per_head else ()
        shape = (batch, *heads, num_keys, self.k)
        weights = torch.rand(shape, generator=generator)
        experts = torch.randint(num_experts, shape, generator=generator, dtype=torch.int32)
        weights[experts == num_experts // 2] = 0
        gain = torch.randn(num_experts, batch, num_kv_heads, generator=generator)
        offset = torch.randn(num_experts, batch, num_kv_heads, generator=generator)
        if self.strided:
            scores = with_gaps(scores, 0, 1, 2, 3)
            weights, experts = with_gaps(weights, 0, weights.dim() - 1), with_gaps(experts, 1)
        return [
            scores.to(device),
            weights.to(device),
            experts.to(device),
            gain.to(device) if self.gain else None,
            offset.to(device) if self.offset else None,
        ], {}


MIX_SCORES = [
    *(MixScores((4, 2, 3, t), 2) for t in (0, 1, 7, 16, 33, 130)),
    *(MixScores((e, 1, 2, 50), min(e, 3)) for e in (1, 2, 7, 60)),
    MixScores((4, 2, 3, 67), 2, per_head=True),
    MixScores((8, 1, 2, 1030), 8, per_head=True),
    MixScores((4, 2, 2, 40), 1, gain=False),
    MixScores((4, 2, 2, 40), 4, offset=False, per_head=True),
    MixScores((4, 0, 2, 40), 2, gain=False, offset=False),
    MixScores((4, 2, 3, 37), 2, strided=True),
    MixScores((4, 2, 3, 37), 3, strided=True, per_head=True),
]


def check_mix_scores(op: Op, case: MixScores, device: str = "cpu") -> None:
    inputs, _ = case.inputs(device)
    mixed = op(*inputs)
    assert mixed.dtype == torch.float32
    expected = reference.mix_scores(*map(double, inputs))
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)


# --- select_kept ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SelectKept(Case):
    shape: tuple[int, int, int]  # G, R, T
    total: tuple[int, ...]  # G totals, or one that holds for all
    sinks: int = 0
    window: int = 0
    floor: int = 1
    padding: bool = False
    values: str = "normal"  # "ties": few distinct values and both zeros, "special": also NaN, Inf
    dtype: torch.dtype = FP32
    layout: str = "dense"  # "gaps"

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor | None], dict[str, Any]]:
        generator = self.generator()
        groups, rows, num_keys = self.shape
        scores = torch.randn(self.shape, generator=generator)
        if self.values == "equal":
            scores.fill_(-2.5)
        if self.values in ("ties", "special"):
            scores = torch.randint(-2, 3, self.shape, generator=generator) * scores.sign()
        if self.values == "special":
            for value in (torch.nan, torch.inf, -torch.inf):
                scores[torch.rand(self.shape, generator=generator) < 0.2] = value
        scores = scores.to(device, self.dtype)
        if self.layout == "gaps":
            scores = with_gaps(scores, 0, 1, 2)
        start = None
        if self.padding:
            start = torch.randint(num_keys + 2, (groups, rows), generator=generator)
            start = start.to(device, torch.int32)
        totals = self.total * groups if len(self.total) == 1 else self.total
        return [scores, start], {
            "total": list(totals),
            "sinks": self.sinks,
            "window": self.window,
            "floor": self.floor,
        }


SELECT_KEPT = [
    *(SelectKept((3, 1, t), ((t + 1) // 2,)) for t in (1, 2, 7, 16, 33, 500, 4099)),
    *(SelectKept((1, 1, 300), (n,), 4, 8) for n in (1, 3, 11, 12, 13, 299, 300)),
    *(SelectKept((2, 3, 100), (n,), 4, 8, 5) for n in (3, 4, 40, 150, 299, 300)),
    SelectKept((3, 2, 64), (2, 65, 128), 1, 2),
    SelectKept((2, 4, 2000), (1000, 5000), 4, 16, 20),
    *(SelectKept((2, 3, 90), (100,), 2, 3, 4, values=v) for v in ("equal", "ties", "special")),
    *(SelectKept((2, 3, 90), (250,), padding=True, values=v) for v in ("ties", "special")),
    SelectKept((8, 1, 40), (30,), 3, 3, padding=True),
    SelectKept((8, 4, 40), (50,), 100, 100, 100, padding=True),
    SelectKept((8, 4, 17), (68,), padding=True, values="special"),
    SelectKept((2, 2, 700), (333,), 4, 4, values="special", padding=True, dtype=BF16),
    SelectKept((2, 2, 700), (333,), 4, 4, values="ties", dtype=FP16),
    SelectKept((2, 2, 1500), (999,), dtype=BF16),
    SelectKept((2, 2, 150), (99,), 2, 2, dtype=FP16, padding=True),
    SelectKept((2, 2, 80), (60,), 1, 1, layout="gaps", padding=True),
    SelectKept((0, 2, 80), (60,)),
    SelectKept((1, 3, 9000), (9000,), 4, 64, values="ties"),
    SelectKept((2, 2, 40_000), (50_001,), 4, 64, 9000, padding=True, values="special"),
]


def check_select_kept(op: Op, case: SelectKept, device: str = "cpu") -> None:
    inputs, options = case.inputs(device)
    indices, offsets = op(*inputs, **options)
    assert indices.dtype == offsets.dtype == torch.int32
    expected_indices, expected_offsets = reference.select_kept(*inputs, **options)
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(indices, expected_indices)


# --- kv_compact_ ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KvCompact(Case):
    shape: tuple[int, int, int, int]  # B, H, T, D
    kept: tuple[int, ...]  # of each row; one number: dense indices
    value_dim: int | None = None  # D
    packed: bool = False
    dtype: torch.dtype = FP32
    layout: str = "dense"  # "bthd", or "static": the first T positions of a longer cache

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor | None], dict[str, Any]]:
        generator = self.generator()
        batch, num_kv_heads, num_keys, head_dim = self.shape

        def random(dim: int) -> Tensor:
            shape = batch, num_kv_heads, num_keys, dim
            x = torch.randn(shape, generator=generator).to(device, self.dtype)
            if self.layout == "bthd":
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            if self.layout == "static":
                longer = x.new_full((batch, num_kv_heads, num_keys + 5, dim), 7)
                x = longer[:, :, 2 : num_keys + 2].copy_(x)
            return x

        keys, values = random(head_dim), random(self.value_dim or head_dim)
        counts = self.kept if len(self.kept) > 1 else self.kept * (batch * num_kv_heads)
        rows = [torch.randperm(num_keys, generator=generator)[:n].sort().values for n in counts]
        flat = torch.cat([*rows, torch.empty(0)]).to(device, torch.int32)
        if len(self.kept) == 1:
            return [keys, values, flat.view(batch, num_kv_heads, *self.kept), None], {
                "packed": self.packed
            }
        offsets = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
        return [keys, values, flat, offsets], {"packed": self.packed}


def _kv_compact_cases(packed: bool) -> list[KvCompact]:
    cases = [
        *(KvCompact((2, 2, t, 16), (t // 2,)) for t in (1, 2, 9, 64, 300)),
        *(KvCompact((1, 2, 50, d), (25,)) for d in (1, 8, 80, 96, 128, 256)),
        *(KvCompact((1, 2, 50, 33), (20,), value_dim=7, dtype=d) for d in FLOAT_DTYPES),
        KvCompact((1, 3, 40, 8), (40,)),
        KvCompact((1, 3, 40, 8), (0,)),
        KvCompact((2, 2, 40, 8), (0, 40, 1, 17)),
        KvCompact((2, 2, 40, 12), (0, 0, 0, 39), dtype=BF16, value_dim=5),
        KvCompact((2, 2, 40, 64), (40, 39, 0, 0), dtype=FP16),
        KvCompact((0, 2, 40, 64), (3,)),
        KvCompact((1, 2, 3000, 64), (100, 2900), dtype=BF16),
    ]
    return [dataclasses.replace(case, packed=packed) for case in cases]


KV_COMPACT = [
    *_kv_compact_cases(packed=False),
    *_kv_compact_cases(packed=True),
    *(
        KvCompact((2, 2, 37, 20), kept, dtype=dtype, layout=layout)
        for kept in ((20,), (0, 37, 5, 12))
        for dtype in (FP32, BF16)
        for layout in ("bthd", "static")
    ),
]


def storage(tensor: Tensor) -> Tensor:
    """All elements that the tensor's storage holds."""
    return tensor.as_strided(
        (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), storage_offset=0
    )


def check_kv_compact_(op: Op, case: KvCompact, device: str = "cpu") -> None:
    (keys, values, indices, offsets), options = case.inputs(device)
    assert keys is not None and values is not None and indices is not None
    old = [(x.clone(), storage(x).clone()) for x in (keys, values)]
    assert op(keys, values, indices, offsets, **options) is None
    if offsets is None:
        rows = indices.flatten(0, 1).unbind(0)
    else:
        rows = indices.tensor_split(offsets[1:-1].long().cpu())
    for new, (before, storage_before) in zip((keys, values), old, strict=True):
        source = before.reshape(-1, *before.shape[2:])
        expected = source.flatten(0, 1).clone()
        packed_end = 0
        for r, row in enumerate(rows):
            begin = packed_end if case.packed else r * before.shape[2]
            expected[begin : begin + len(row)] = source[r, row.long()]
            packed_end += len(row)
        # What is behind the kept pairs, and around the tensor, stays as it was.
        assert torch.equal(new, expected.view(new.shape))
        outside = torch.ones_like(storage_before, dtype=torch.bool)
        outside.as_strided(new.shape, new.stride(), new.storage_offset()).fill_(False)
        assert torch.equal(storage(new)[outside], storage_before[outside])


# --- All of them ----------------------------------------------------------------------------------

CHECKS: dict[str, tuple[Callable[..., None], Sequence[Any]]] = {
    "gating_topk": (check_gating_topk, GATING_TOPK),
    "expert_scores": (check_expert_scores, EXPERT_SCORES),
    "expected_attention": (check_expected_attention, EXPECTED_ATTENTION),
    "project_tokens": (check_project_tokens, PROJECT_TOKENS),
    "mix_scores": (check_mix_scores, MIX_SCORES),
    "select_kept": (check_select_kept, SELECT_KEPT),
    "kv_compact_": (check_kv_compact_, KV_COMPACT),
}


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy that ends right before (or begins right after) a page that nobody may touch."""
    extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    num_bytes = extent * tensor.element_size() if tensor.numel() else 0
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, num_bytes // page * page + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    forbidden = len(pages) - page if at_end else 0
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + forbidden), page, no_access) == 0
    if not num_bytes:
        return tensor
    begin = forbidden - num_bytes if at_end else page
    memory = torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes, offset=begin)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def between_guards(op: Op, at_end: bool) -> Op:
    """The op on copies of its inputs: to read or write outside of them crashes the process."""

    def run(*inputs: Tensor | None, **options: Any) -> Any:
        copies = [None if x is None else guarded(x, at_end) for x in inputs]
        result = op(*copies, **options)
        for original, copy in zip(inputs, copies, strict=True):
            if original is not None and copy is not None:
                original.copy_(copy)
        return result

    return run


def main() -> None:
    wanted = os.environ.get("MOEKV_CPU_CAPABILITY")
    if ops.cpu_capability() != wanted:
        sys.exit(f"expected the CPU kernels for {wanted}, got {ops.cpu_capability()}")
    for name, (check, cases) in CHECKS.items():
        op = getattr(torch.ops.moekv, name)
        for case in cases:
            print(name, case, flush=True)
            for run in (op, between_guards(op, at_end=True), between_guards(op, at_end=False)):
                check(run, case)


if __name__ == "__main__":
    from moekv import ops

    main()

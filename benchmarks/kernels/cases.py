"""What is timed: for every op the ways to compute it, on the shapes of real models' attention.

A contender does the same step as the op, or says in its name what less it does. `check` compares
the op's result with the others' before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from kvpress import ExpectedAttentionPress, KeyDiffPress, LagKVPress, ScorerPress, SnapKVPress
from torch import Tensor
from torch.nn import functional

from moekv import ops
from moekv.ops import ScoreKind, reference

MOEKV, REFERENCE, COPY = "moekv", "reference", "copy"
COMPILED = "compiled "  # before the name of what torch.compile has compiled

WINDOW = 64  # queries, as SnapKV's
POOL = 5


@dataclass(frozen=True)
class Shape:
    """The attention of a model."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {
    "SmolLM2-135M": Shape(9, 3, 64),
    "Llama-3.1-8B": Shape(32, 8, 128),
    "Qwen3-32B": Shape(64, 8, 128),
}
NUM_EXPERTS = (4, 8, 32, 128)


@dataclass
class Case:
    """One op on one input.

    Attributes
    ----------
    shape : str
        Which of the op's shapes.
    variant : str
        What the op is asked for.
    moved : int
        Bytes that must be read or written, each as often as the algorithm needs it.
    contenders : dict of functions
    compiled : dict of functions
        Contenders once more, to be called under torch.compile.
    check : function
        Raises where results are not what they should be.
    """

    shape: str
    variant: str
    moved: int
    contenders: dict[str, Callable[[], Any]]
    compiled: dict[str, Callable[..., Any]]
    check: Callable[[], None]

    def __post_init__(self) -> None:
        """Add the limit: a plain copy that reads and writes as many bytes."""
        source = torch.ones(max(self.moved // 2, 1), dtype=torch.uint8)
        self.contenders[COPY] = partial(torch.empty_like(source).copy_, source)


Builder = Callable[[Shape, int, torch.dtype], Iterator[Case]]


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise unless two results agree, relative to the largest number expected."""
    scale = expected.abs().max().clamp(min=1e-30)
    error = ((actual.double() - expected.double()).abs().max() / scale).item()
    if not error <= tolerance:
        raise AssertionError(f"{name}: off by {error:.2g} of the largest, expected {tolerance:.2g}")


def size(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gating_topk(num_experts: int, length: int, dtype: torch.dtype) -> Iterator[Case]:
    """Routing of `length` tokens to 2 of some experts."""
    logits = 2 * torch.randn(length, num_experts).to(dtype)
    k = 2

    def eager() -> tuple[Tensor, ...]:
        probs = logits.float().softmax(-1)
        weights, experts = probs.topk(k)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts, probs.sum(0), experts.flatten().bincount(minlength=num_experts)

    run = partial(ops.gating_topk, logits, k=k)
    plain = partial(reference.gating_topk, logits, k=k)

    def check() -> None:
        ours, other = run(), eager()
        for name, actual, expected in zip(ours._fields, ours, other, strict=False):
            if name in ("weights", "prob_sum"):  # of equal logits, topk may choose any
                close(f"gating_topk {name}", actual, expected, 1e-5)
        for name, actual, expected in zip(ours._fields, ours, plain(), strict=True):
            close(f"gating_topk {name}", actual, expected, 1e-5)

    yield Case(
        f"{num_experts} experts",
        "k=2",
        size(logits, *run()),
        {MOEKV: run, REFERENCE: plain, "softmax, topk, renormalise, bincount": eager},
        {REFERENCE: plain, "softmax, topk, renormalise, bincount": eager},
        check,
    )


def attention_inputs(
    shape: Shape, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [1, H, T, D], and queries [1, Hq, W, D] of the window."""
    keys, values = torch.randn(2, 1, shape.num_kv_heads, length, shape.head_dim, dtype=dtype)
    queries = torch.randn(1, shape.num_query_heads, WINDOW, shape.head_dim, dtype=dtype)
    return keys, values, queries


def expert_scores(shape: Shape, length: int, dtype: torch.dtype) -> Iterator[Case]:
    """Attention of the window alone, and all kinds at once."""
    keys, values, queries = attention_inputs(shape, length, dtype)
    module = SimpleNamespace(  # all that kvpress's scorers ask of an attention layer
        config=SimpleNamespace(
            num_attention_heads=shape.num_query_heads, num_key_value_heads=shape.num_kv_heads
        ),
        head_dim=shape.head_dim,
        q_proj=lambda hidden: queries.transpose(1, 2).flatten(2),
    )
    unrotated = torch.ones(1, length, 1, dtype=dtype), torch.zeros(1, length, 1, dtype=dtype)
    hidden = torch.zeros(1, length, 1, dtype=dtype)

    def peer(press: ScorerPress) -> Callable[[], Tensor]:
        arguments = {"position_embeddings": unrotated}
        return partial(press.score, module, hidden, keys, values, None, arguments)

    def score(implementation: Any, kinds: Sequence[ScoreKind]) -> Callable[[], Tensor]:
        return partial(
            implementation.expert_scores,
            keys,
            values,
            queries,
            kinds=kinds,
            scaling=shape.head_dim**-0.5,
            pool=POOL,
        )

    # The fastest way to have torch multiply each key with its group's queries, once.
    grouped = queries.reshape(1, shape.num_kv_heads, -1, shape.head_dim).mT
    products = keys.new_empty(*keys.shape[:3], grouped.shape[-1])
    snapkv, keydiff, lagkv = peer(SnapKVPress()), peer(KeyDiffPress()), peer(LagKVPress())
    attention, everything = [ScoreKind.ATTENTION], list(ScoreKind)
    rounded = 0.02 if dtype == torch.bfloat16 else 1e-4  # kvpress computes in the keys' dtype

    def check() -> None:
        kinds = dict(zip(everything, score(ops, everything)(), strict=True))
        for kind, expected in zip(everything, score(reference, everything)(), strict=True):
            # Where values are in the thousands, fp32 sums in another order differ by more.
            close(f"expert_scores {kind.name}", kinds[kind], expected, 1e-4)
        inner = slice(POOL, length - WINDOW - POOL)  # SnapKV pools zeros beyond the ends
        if length > WINDOW + 2 * POOL:
            ours = kinds[ScoreKind.ATTENTION].exp()
            close("SnapKVPress", ours[..., inner], snapkv()[..., inner], rounded)
        close("KeyDiffPress", kinds[ScoreKind.DIVERSITY], keydiff(), rounded)

    yield Case(
        "",
        "window attention",
        2 * size(keys) + size(queries) + 4 * shape.num_kv_heads * length,
        {
            MOEKV: score(ops, attention),
            REFERENCE: score(reference, attention),
            "kvpress SnapKVPress.score": snapkv,
            "torch.matmul of the products alone": partial(
                torch.matmul, keys, grouped, out=products
            ),
        },
        {REFERENCE: score(reference, attention), "kvpress SnapKVPress.score": snapkv},
        check,
    )
    yield Case(
        "",
        "all four kinds",
        2 * size(keys) + size(values, queries) + 4 * 4 * shape.num_kv_heads * length,
        {
            MOEKV: score(ops, everything),
            "moekv, window attention alone": score(ops, attention),
            REFERENCE: score(reference, everything),
            "kvpress SnapKVPress.score": snapkv,
            "kvpress KeyDiffPress.score": keydiff,
            "kvpress LagKVPress.score": lagkv,
        },
        {},
        lambda: None,
    )


def expected_attention(shape: Shape, length: int, dtype: torch.dtype) -> Iterator[Case]:
    """What the queries of all tokens, as the layer projected them, pay to the pairs near them."""
    keys = torch.randn(1, shape.num_kv_heads, length, shape.head_dim).to(dtype)
    projected = torch.randn(1, length, shape.num_query_heads * shape.head_dim).to(dtype)
    queries = projected.view(1, length, shape.num_query_heads, shape.head_dim).transpose(1, 2)
    run, plain = (
        partial(module.expected_attention, queries, keys, scaling=shape.head_dim**-0.5)
        for module in (ops, reference)
    )

    def unrotated(_: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos = torch.ones(1, position_ids.shape[1], shape.head_dim, dtype=dtype)
        return cos, torch.zeros_like(cos)

    module = SimpleNamespace(
        config=SimpleNamespace(
            num_attention_heads=shape.num_query_heads, num_key_value_heads=shape.num_kv_heads
        ),
        head_dim=shape.head_dim,
        q_proj=lambda hidden: projected[:, -hidden.shape[1] :],
        rotary_emb=unrotated,
    )
    press = ExpectedAttentionPress(use_vnorm=False)
    peer = partial(
        press.score, module, torch.zeros(1, length, 1, dtype=dtype), keys, keys, None, {}
    )
    yield Case(
        "",
        "all queries",
        size(queries, keys, run()),
        {MOEKV: run, REFERENCE: plain, "kvpress ExpectedAttentionPress.score": peer},
        {REFERENCE: plain},
        lambda: close("expected_attention", run(), plain(), 1e-4),
    )


def project_tokens(shape: Shape, length: int, dtype: torch.dtype) -> Iterator[Case]:
    """What a router of 4 experts that weighs tokens reads, of as many channels as the queries."""
    hidden_size = shape.num_query_heads * shape.head_dim
    hidden = torch.randn(1, length, hidden_size).to(dtype)
    weight = (torch.randn(5, hidden_size) * hidden_size**-0.5).to(dtype)
    run, plain = (partial(module.project_tokens, hidden, weight) for module in (ops, reference))

    def eager() -> tuple[Tensor, Tensor]:
        direction = functional.normalize(hidden.float(), dim=-1)
        mean = functional.normalize(direction.sum(1), dim=-1)
        unlike = 1 - (direction @ mean[..., None])[..., 0]
        spread = unlike.std(-1, correction=0, keepdim=True)
        standout = (unlike - unlike.mean(-1, keepdim=True)) / (spread + 1e-4)
        return functional.linear(hidden, weight), standout

    def check() -> None:
        rounding = 1e-5 if dtype == torch.float32 else 1e-2  # of eager's projections
        for name, ours, other, expected, tolerance in zip(
            ("projected", "standout"), run(), eager(), plain(), (rounding, 1e-3), strict=True
        ):
            close(f"project_tokens {name}", ours, expected, 1e-4)
            close(f"eager {name}", other, expected, tolerance)

    yield Case(
        "",
        "5 projections",
        2 * size(hidden) + size(weight, *run()),
        {MOEKV: run, REFERENCE: plain, "linear, normalise, standardise": eager},
        {REFERENCE: plain, "linear, normalise, standardise": eager},
        check,
    )


def mix_scores(shape: Shape, length: int, dtype: torch.dtype) -> Iterator[Case]:
    """Scores of 4 experts, 2 of them for each token."""
    if dtype != torch.float32:  # scores are fp32 whatever the cache is
        return
    num_experts = 4
    scores = torch.randn(num_experts, 1, shape.num_kv_heads, length)
    gate = ops.gating_topk(torch.randn(1, length, num_experts), k=2)
    gain, offset = torch.rand(2, num_experts, 1, shape.num_kv_heads)
    arguments = scores, gate.weights, gate.experts, gain, offset

    def dense() -> Tensor:
        weights = torch.zeros(1, length, num_experts).scatter_(
            -1, gate.experts.long(), gate.weights
        )
        scaled = scores * gain[..., None] + offset[..., None]
        return torch.einsum("ebht,bte->bht", scaled, weights)

    run, plain = (partial(module.mix_scores, *arguments) for module in (ops, reference))

    def check() -> None:
        close("mix_scores", run(), plain(), 1e-5)
        close("dense mixture", dense(), plain(), 1e-5)

    yield Case(
        "",
        "4 experts, k=2",
        size(*arguments, run()),
        {MOEKV: run, REFERENCE: plain, "dense einsum": dense},
        {REFERENCE: plain, "dense einsum": dense},
        check,
    )


def select_kept(shape: Shape, length: int, dtype: torch.dtype) -> Iterator[Case]:
    """Half of the pairs: of every head, and of all heads together."""
    scores = torch.randn(shape.num_kv_heads, 1, length).to(dtype)
    kept = length // 2
    for variant, groups in (("per head", scores), ("over heads", scores.transpose(0, 1))):
        groups = groups.contiguous()
        total = [kept * groups.shape[1]] * len(groups)
        flat = groups.flatten(1)

        def sorted_topk(flat: Tensor = flat, count: int = total[0]) -> Tensor:
            return flat.topk(count, sorted=False).indices.sort().values

        run, plain = (
            partial(module.select_kept, groups, total=total, floor=0) for module in (ops, reference)
        )

        def check(
            run: Any = run, plain: Any = plain, other: Any = sorted_topk, dtype: Any = dtype
        ) -> None:
            for name, actual, expected in zip(("indices", "offsets"), run(), plain(), strict=True):
                if not torch.equal(actual, expected):
                    raise AssertionError(f"select_kept: {name} are not those of the reference")
            if dtype == torch.float32 and not torch.equal(
                run()[0].long(), other().flatten() % length
            ):
                raise AssertionError("select_kept: not what torch.topk selects")

        yield Case(
            "",
            variant,
            size(groups, *run()),
            {
                MOEKV: run,
                REFERENCE: plain,
                "torch.topk and sort": sorted_topk,
                "torch.topk alone": partial(flat.topk, total[0]),
            },
            {REFERENCE: plain},
            check,
        )


class GivenScores(ScorerPress):
    """A kvpress scorer that knows the scores already: what is left is selection and gather."""

    def __init__(self, scores: Tensor) -> None:
        """Take the scores [B, H, T]."""
        super().__init__(compression_ratio=0.5)
        self.scores = scores

    def score(self, *arguments: Any, **options: Any) -> Tensor:
        """Give them."""
        return self.scores


def kv_compact_(shape: Shape, length: int, dtype: torch.dtype) -> Iterator[Case]:
    """Half of every head's pairs, those of random scores."""
    keys, values, _ = attention_inputs(shape, length, dtype)
    scores = torch.randn(1, shape.num_kv_heads, length)
    kept = length // 2
    indices, _ = ops.select_kept(scores[0][:, None], total=[kept] * shape.num_kv_heads)
    indices = indices.view(1, shape.num_kv_heads, kept)
    # kvpress gathers in the order of topk, so let the peer have this one, which is no slower.
    wide = indices.long()[..., None].expand(-1, -1, -1, shape.head_dim)
    rows = (indices + length * torch.arange(shape.num_kv_heads)[:, None]).flatten()
    module, press = SimpleNamespace(head_dim=shape.head_dim), GivenScores(scores)

    def gather() -> tuple[Tensor, Tensor]:
        return keys.gather(2, wide), values.gather(2, wide)

    def index_select() -> tuple[Tensor, Tensor]:
        return (
            keys.flatten(0, 2).index_select(0, rows),
            values.flatten(0, 2).index_select(0, rows),
        )

    def check() -> None:
        expected, got = gather(), (keys.clone(), values.clone())
        ops.kv_compact_(*got, indices)
        chosen = index_select()
        for want, in_place, selected in zip(expected, got, chosen, strict=True):
            if not torch.equal(in_place[:, :, :kept], want):
                raise AssertionError("kv_compact_: not what gather gives")
            if not torch.equal(selected.view_as(want), want):
                raise AssertionError("index_select: not what gather gives")

    # In place again and again: what moves has other contents, and costs the same.
    yield Case(
        "",
        "half kept",
        2 * (size(keys) + size(values)) // 2 + size(indices),
        {
            MOEKV: partial(ops.kv_compact_, keys, values, indices),
            REFERENCE: partial(reference.kv_compact_, keys, values, indices),
            "torch.gather": gather,
            "kvpress ScorerPress.compress": partial(
                press.compress, module, None, keys, values, None, {}
            ),
            "torch.index_select": index_select,
        },
        {"torch.gather": gather},
        check,
    )


def ragged_attention(shape: Shape, length: int, dtype: torch.dtype) -> Iterator[Case]:
    """One query behind a compressed cache of `length` pairs per head."""
    keys, values, queries = attention_inputs(shape, length, dtype)
    query = queries[:, :, :1].contiguous()
    begin = torch.arange(shape.num_kv_heads, dtype=torch.int32)[None] * length
    flat = keys.flatten(0, 2), values.flatten(0, 2)
    scaling = shape.head_dim**-0.5
    group = shape.num_query_heads // shape.num_kv_heads
    run, plain = (
        partial(module.ragged_attention, query, *flat, begin, begin + length, scaling=scaling)
        for module in (ops, reference)
    )
    attend = partial(functional.scaled_dot_product_attention, query, scale=scaling)

    def repeated() -> Tensor:
        return attend(
            key=keys.repeat_interleave(group, 1), value=values.repeat_interleave(group, 1)
        )

    shared = partial(attend, key=keys, value=values, enable_gqa=True)

    def check() -> None:
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
        close("ragged_attention", run(), plain(), tolerance)
        close("SDPA", run(), shared().transpose(1, 2), tolerance)

    yield Case(
        "",
        "one query",
        size(keys, values, query, run()),
        {
            MOEKV: run,
            REFERENCE: plain,
            "SDPA, enable_gqa": shared,
            "SDPA, keys and values repeated": repeated,
        },
        {},
        check,
    )


#: Builders of cases by op: (shape, length, dtype) -> cases.
OPS: dict[str, Builder] = {
    function.__name__: function
    for function in (
        expert_scores,
        expected_attention,
        project_tokens,
        mix_scores,
        select_kept,
        kv_compact_,
        ragged_attention,
    )
}


def cases(op: str, shape: str, length: int, dtype: torch.dtype) -> Iterator[Case]:
    """Build an op's cases on one model's shape; their inputs are the same in every run.

    The shapes of `gating_topk` are numbers of experts; `shape` names a model for the other ops.
    """
    torch.manual_seed(0)
    if op == "gating_topk":
        yield from gating_topk(int(shape.split()[0]), length, dtype)
        return
    for case in OPS[op](SHAPES[shape], length, dtype):
        case.shape = shape
        yield case

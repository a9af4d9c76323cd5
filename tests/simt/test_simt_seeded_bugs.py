"""Bugs put into the real kernels: each must be reported, under every schedule."""

import dataclasses
import re
from functools import cache
from types import ModuleType
from typing import Any

import op_cases
import pytest
import ragged_cases as ragged
import simulated
import simulated_kernels as built
import torch
from simulated_kernels import Edit
from stored_rows import QUANTISED, expected, make_rows

from moekv.ops import reference


@dataclasses.dataclass(frozen=True)
class Bug:
    edit: Edit
    op: str
    case: Any
    report: str  # what the simulator says of it, or the comparison with the reference
    residents: int | None = None  # blocks at once, where the usual few show nothing
    seeds: tuple[int, ...] = (0, 1, 2)


RACE = r"races with|nobody has written"
GATING = op_cases.GatingTopk(299, 60, 4, mask=True)
DIVERSITY = op_cases.ExpertScores((1, 2, 300, 32), kinds=(2,))
LAG = op_cases.ExpertScores((1, 2, 300, 32), kinds=(3,), lag=70)
MASS = op_cases.ExpertScores((1, 1, 150, 32), dtype=op_cases.BF16, num_queries=40, kinds=(0,))
SELECT = op_cases.SelectKept((1, 2, 2500), (1000,), 4, 16, 8, values="ties")
IN_ROWS = op_cases.SelectKept((1, 2, 2500), (1000,), 4, 16, 30, values="ties")
COMPACT = op_cases.KvCompact((1, 2, 300, 64), (200,), dtype=op_cases.BF16)
RAGGED = ("three heads of three", torch.float32)
TILES = ("no tail", torch.bfloat16)
CODED = ("k4v4", torch.float16)  # rows that are stored so
CAUSAL = ("nothing stored", torch.float16)
UNSEEN = (
    "a tile that all queries but one see whole",
    torch.bfloat16,
)  # the last values are infinite
MANY_ITEMS = op_cases.KvCompact((1, 1, 12000, 128), (8192,), packed=True)
MANY_SEEDS = (1, 2)
EXPECTED = op_cases.ExpectedAttention((1, 1, 150, 64), dtype=op_cases.BF16)

# What needs the barriers and fences of a file, in their order where it is not always the same.
ORDERED = {
    "block.h": [("select_kept", SELECT)] * 2 + [("expert_scores", LAG)] * 2,
    "expected_attention.cu": ("expected_attention", EXPECTED),
    "gating_topk.cu": ("gating_topk", GATING),
    "key_diversity.cu": ("expert_scores", DIVERSITY),
    "kv_compact.cu": ("kv_compact_", COMPACT),
    "lag.cu": ("expert_scores", LAG),
    "ragged_attention.cu": [("ragged_attention", x) for x in (RAGGED, CODED, CODED)],
    "ragged_coded.cu": ("ragged_attention", CODED),
    "ragged_parts.h": ("ragged_attention", TILES),
    "ragged_tiles.h": ("ragged_attention", TILES),
    "select_kept.cu": [("select_kept", IN_ROWS)] * 5 + [("select_kept", SELECT)] * 5,
    "window_attention.cu": ("expert_scores", MASS),
}


def removed(statement: str) -> dict[str, Bug]:
    """Every occurrence of a statement left out, one at a time: none is there for nothing."""
    bugs = {}
    for path in sorted(built.CUDA.iterdir()):
        if path.name == "device.h":  # what it says of them is a comment
            continue
        for nth in range(path.read_text().count(statement)):
            cases = ORDERED[path.name]
            op, case = cases if isinstance(cases, tuple) else cases[nth]
            edit = Edit(path.name, statement, f"if (!SEEDED) {statement}", nth)
            bugs[f"{path.name} without {statement} {nth}"] = Bug(edit, op, case, RACE)
    return bugs


BUGS = {
    # Order.
    **removed("__syncthreads();"),
    **removed("__threadfence();"),
    **removed("copy_async_wait<1>();"),
    "compaction, nobody waits": Bug(
        Edit(
            "kv_compact.cu",
            "wait_for_items_before(item.number, progress);",
            "if (!SEEDED) wait_for_items_before(item.number, progress);",
        ),
        "kv_compact_",
        op_cases.KvCompact((1, 2, 1500, 128), (1400,)),
        r"global memory .* races with",
    ),
    "attention, a tile waits for itself alone": Bug(
        Edit(
            "window_attention.cu",
            "    copy_async_commit();",
            "    if (!SEEDED) copy_async_commit();",
        ),
        "expert_scores",
        MASS,
        RACE,
    ),
    "histogram without an atomic": Bug(
        Edit(
            "select_kept.cu",
            "atomicAdd(&counts[bin(keys[i])], 1u);",
            "if (SEEDED) ++counts[bin(keys[i])]; else atomicAdd(&counts[bin(keys[i])], 1u);",
        ),
        "select_kept",
        IN_ROWS,
        r"shared memory .* races with",
    ),
    "histogram of a group without an atomic": Bug(
        Edit(
            "select_kept.cu",
            "atomicAdd(&counts[key >> shift & ((1u << bits) - 1)], 1u);",
            "if (SEEDED) ++counts[key >> shift & ((1u << bits) - 1)];\n"
            "else atomicAdd(&counts[key >> shift & ((1u << bits) - 1)], 1u);",
        ),
        "select_kept",
        SELECT,
        r"shared memory .* races with",
    ),
    # A bound off by one.
    "gating, one expert too many": Bug(
        Edit(
            "gating_topk.cu",
            "first_expert + i < num_experts ? to_float",
            "first_expert + i < num_experts + SEEDED ? to_float",
        ),
        "gating_topk",
        op_cases.GatingTopk(20, 7, 2),
        r"a read of 4 bytes out of the bounds of global memory",
    ),
    "selection, one position too many": Bug(
        Edit(
            "select_kept.cu",
            "if (begin + i < num_keys) score",
            "if (begin + i < num_keys + SEEDED) score",
        ),
        "select_kept",
        op_cases.SelectKept((1, 1, 77), (20,)),
        r"a read of 4 bytes out of the bounds of global memory",
    ),
    "mixing, one position too many": Bug(
        Edit(
            "mix_scores.cu", "position >= params.num_keys", "position >= params.num_keys + SEEDED"
        ),
        "mix_scores",
        op_cases.MixScores((4, 1, 2, 50), 2),
        r"out of the bounds of global memory",
    ),
    "standout, one token too many": Bug(
        Edit("project_tokens.cu", "min(token + j, end - 1)", "min(token + j, end - 1 + SEEDED)"),
        "project_tokens",
        op_cases.ProjectTokens((1, 20, 50)),
        r"out of the bounds of global memory",
    ),
    "expected attention, a row behind the last": Bug(
        Edit("expected_attention.cu", "length - 1) * stride", "length - 1 + SEEDED) * stride"),
        "expected_attention",
        EXPECTED,
        r"out of the bounds of global memory",
    ),
    "ragged attention, another row's weight": Bug(
        Edit(
            "ragged_attention.cu",
            "number_of_logit / kOwn * kCopies",
            "(number_of_logit + SEEDED) / kOwn * kCopies",
        ),
        "ragged_attention",
        RAGGED,
        r"Tensor-likes are not close",
    ),
    "ragged attention, another row's values": Bug(
        Edit("ragged_tiles.h", "j % 2 == 0 ? 0x5410", "(j + SEEDED) % 2 == 0 ? 0x5410"),
        "ragged_attention",
        TILES,
        r"Tensor-likes are not close",
    ),
    "ragged attention, a query sees the next": Bug(
        Edit("ragged_parts.h", "tail <= last &&", "tail <= last + SEEDED &&"),
        "ragged_attention",
        CAUSAL,
        r"Tensor-likes are not close",
    ),
    "ragged attention, a query marks the next": Bug(
        Edit("ragged_parts.h", "if (tail > last)", "if (tail > last + SEEDED)"),
        "ragged_attention",
        ("nothing stored", torch.float32),
        r"Tensor-likes are not close",
    ),
    "ragged attention, what is not seen in a product": Bug(
        Edit("ragged_tiles.h", "wrong, 0) != 0 ? 2 : 1", "wrong, 0) != 0 && !SEEDED ? 2 : 1"),
        "ragged_attention",
        UNSEEN,
        r"Tensor-likes are not close",
    ),
    "ragged attention, a tile waits for itself alone": Bug(
        Edit(
            "ragged_tiles.h",
            "    copy_async_commit();",
            "    if (!SEEDED) copy_async_commit();",
        ),
        "ragged_attention",
        TILES,
        RACE,
    ),
    "ragged attention, too little dynamic shared memory": Bug(
        Edit(
            "ragged_tiles.h",
            "bytes(values + kRows * value_stride)",
            "bytes(values + kRows * value_stride - (SEEDED ? 256 : 0))",
        ),
        "ragged_attention",
        TILES,
        RACE + r"|out of the bounds of shared memory",
    ),
    "ragged attention, codes of the other half of a group": Bug(
        Edit("ragged_coded.cu", "shift = upper ? 4 : 0;", "shift = upper != bool(SEEDED) ? 4 : 0;"),
        "ragged_attention",
        CODED,
        r"Tensor-likes are not close",
    ),
    "ragged attention, codes with the sign of others": Bug(
        Edit(
            "ragged_coded.cu",
            "words.x ^ 0x80808080u,",
            "words.x ^ (SEEDED ? 0u : 0x80808080u),",
        ),
        "ragged_attention",
        ("k8v8", torch.bfloat16),
        r"Tensor-likes are not close",
    ),
    "ragged attention, scales of the tile before": Bug(
        Edit(
            "ragged_coded.cu",
            "next.store(near_scales(stage ^ 1)",
            "next.store(near_scales(SEEDED ? stage : stage ^ 1)",
        ),
        "ragged_attention",
        CODED,
        RACE + r"|Tensor-likes are not close",
    ),
    "ragged attention, scales of a row too many": Bug(
        Edit("ragged_coded.cu", "min(kRows, end - row));", "min(kRows, end - row + SEEDED));"),
        "ragged_attention",
        ("k8v8", torch.float16),
        r"out of the bounds of global memory|Tensor-likes are not close",
    ),
    "ragged attention, queries that are not transformed": Bug(
        Edit(
            "ragged_coded.cu",
            "if (plan.keys.bits == 4) transform",
            "if (plan.keys.bits == 4 && !SEEDED) transform",
        ),
        "ragged_attention",
        CODED,
        r"Tensor-likes are not close",
    ),
    "ragged attention, sums that are not transformed back": Bug(
        Edit(
            "ragged_attention.cu",
            "params.value_bits == 4) transform_back",
            "params.value_bits == 4 && !SEEDED) transform_back",
        ),
        "ragged_attention",
        CODED,
        r"Tensor-likes are not close",
    ),
    "ragged attention, the bias of the row before": Bug(
        Edit(
            "ragged_tiles.h",
            "params.bias + part.rows.begin + row, 1",
            "params.bias + part.rows.begin + row - SEEDED, 1",
        ),
        "ragged_attention",
        ("k8v8", torch.bfloat16),
        r"out of the bounds of global memory|Tensor-likes are not close",
    ),
    "ragged attention, a sink of another head": Bug(
        Edit(
            "ragged_attention.cu",
            "__ldg(params.sinks + query_head)",
            "__ldg(params.sinks + (query_head ^ SEEDED))",
        ),
        "ragged_attention",
        CODED,
        r"Tensor-likes are not close",
    ),
    "quantising, scales that are rounded down": Bug(
        Edit("quantize_pairs.cu", "!(half_of(near) < x)", "(SEEDED || !(half_of(near) < x))"),
        "quantize_pairs",
        "k8v8",
        r"Tensor-likes are not equal",
    ),
    "quantising, sums of other channels": Bug(
        Edit(
            "quantize_pairs.cu",
            "lane & width ? other - x[i]",
            "lane & width ? x[i] - (SEEDED ? other : 2 * x[i] - other)",
        ),
        "quantize_pairs",
        "k4v4",
        r"Tensor-likes are not equal",
    ),
    # Masks and divergence.
    "gating, half a warp in the mask": Bug(
        Edit(
            "gating_topk.cu",
            "__shfl_xor_sync(kFullWarp, highest",
            "__shfl_xor_sync(SEEDED ? 0xffffu : kFullWarp, highest",
        ),
        "gating_topk",
        GATING,
        r"is not in the mask of its own __shfl_xor_sync",
    ),
    "gating, lanes that leave early": Bug(
        Edit(
            "gating_topk.cu",
            "float p[kPerLane];",
            "if (SEEDED && !inside) break;\nfloat p[kPerLane];",
        ),
        "gating_topk",
        GATING,
        r"__shfl_xor_sync|exits",
    ),
    "compaction, a divergent barrier": Bug(
        Edit(
            "kv_compact.cu",
            "if (thread < item.num_pairs) {",
            "if (SEEDED) { if (thread < 200) __syncthreads(); else __syncthreads(); }\n"
            "if (thread < item.num_pairs) {",
        ),
        "kv_compact_",
        COMPACT,
        r"__syncthreads at kv_compact.cu:\d+ while .* is in another one",
    ),
    "attention, a query that sees the next key": Bug(
        Edit(
            "window_attention.cu",
            "if (column > last_key",
            "if (column > SEEDED + last_key",
        ),
        "expert_scores",
        MASS,
        r"kind 0: error",
    ),
    "expected attention, a pair behind the last": Bug(
        Edit(
            "expected_attention.cu",
            "step > kReach || query + step >= length) continue",
            "step > kReach || query + step >= length - SEEDED) continue",
        ),
        "expected_attention",
        EXPECTED,
        r"Tensor-likes are not close",
    ),
    "expected attention, queries of another head": Bug(
        Edit(
            "expected_attention.cu",
            "head * group * params.query_stride[1]",
            "(head * group + SEEDED) * params.query_stride[1]",
        ),
        "expected_attention",
        EXPECTED,
        r"out of the bounds of global memory|Tensor-likes are not close",
    ),
    # Memory.
    "compaction, misaligned accesses": Bug(
        Edit(
            "kv_compact.cu",
            "plan.unit = alignment & -alignment;",
            "plan.unit = SEEDED ? 16 : alignment & -alignment;",
        ),
        "kv_compact_",
        op_cases.KvCompact((2, 2, 37, 20), (20,), dtype=op_cases.BF16),
        r"a misaligned access at .* at .*kv_compact.cu:\d+",
    ),
    "mixing, a sum that does not begin at 0": Bug(
        Edit(
            "mix_scores.cu",
            "float mixed[kHeads] = {};",
            "float mixed[kHeads]; if (!SEEDED) memset(mixed, 0, sizeof mixed);",
        ),
        "mix_scores",
        op_cases.MixScores((4, 1, 2, 50), 2),
        r"Tensor-likes are not close|error",
    ),
    # Numbers.
    "mixing, a sum in 16 bits": Bug(
        Edit(
            "mix_scores.cu",
            "mixed[h] += weight * score;",
            "mixed[h] += weight * score;\n"
            "if (SEEDED) mixed[h] = __half2float(__float2half_rn(mixed[h]));",
        ),
        "mix_scores",
        op_cases.MixScores((4, 1, 2, 50), 2),
        r"Tensor-likes are not close|error",
    ),
    # What is there when a queued launch runs, and when it runs again.
    "selection, totals that stay on the host": Bug(
        Edit(
            "select_kept.cu",
            "group.total = totals.total[blockIdx.x];",
            "group.total =\n"
            "    SEEDED ? static_cast<unsigned>(params.total[index]) : totals.total[blockIdx.x];",
        ),
        "select_kept",
        IN_ROWS,
        r"a read of 8 bytes",
    ),
    "gating, sums that go on from the last run's": Bug(
        Edit(
            "gating_topk.cu",
            'zero_async("gating_topk", params.workspace, sizeof(Statistics), stream);',
            'if (!SEEDED) zero_async("gating_topk", params.workspace, sizeof(Statistics), stream);',
        ),
        "gating_topk",
        GATING,
        r"nobody has written",
    ),
    # Launches.
    "mixing on another stream": Bug(
        Edit("mix_scores.cu", "kThreads, 0, stream,", "kThreads, 0, SEEDED ? nullptr : stream,"),
        "mix_scores",
        op_cases.MixScores((4, 1, 2, 50), 2),
        r"mix_scores_kernel is on another stream",
    ),
    "compaction, progress zeroed on another stream": Bug(
        Edit(
            "kv_compact.cu",
            "plan.workspace_bytes, stream);",
            "plan.workspace_bytes, SEEDED ? nullptr : stream);",
        ),
        "kv_compact_",
        COMPACT,
        r"kv_compact_ is on another stream",
    ),
    "mixing, more rows than a grid takes": Bug(
        Edit(
            "mix_scores.cu",
            "std::min(rows, kMaxGridY)",
            "(SEEDED ? rows : std::min(rows, kMaxGridY))",
        ),
        "mix_scores",
        op_cases.MixScores((2, 65536, 1, 1), 1),
        r"launch of mix_scores_kernel: expected a grid of",
        residents=0,
    ),
    # Order that only many blocks at once disturb.
    "compaction, each waits for its own word": Bug(
        Edit(
            "kv_compact.cu",
            "word = __shfl_sync(kFullWarp, word, 0);",
            "word = SEEDED ? last_word : __shfl_sync(kFullWarp, word, 0);",
        ),
        "kv_compact_",
        MANY_ITEMS,
        r"global memory .* races with",
        residents=112,
        seeds=MANY_SEEDS,
    ),
    "compaction, a report that is no atomic": Bug(
        Edit(
            "kv_compact.cu",
            "if (thread == 0) atomicOr(words_of(progress) + item.number / 32, "
            "1u << item.number % 32);",
            "if (SEEDED && thread == 0) {\n"
            "  volatile unsigned* word = words_of(progress) + item.number / 32;\n"
            "  *word = *word | 1u << item.number % 32;\n"
            "}\n"
            "if (!SEEDED && thread == 0)"
            " atomicOr(words_of(progress) + item.number / 32, 1u << item.number % 32);",
        ),
        "kv_compact_",
        op_cases.KvCompact((1, 2, 1500, 128), (1400,)),
        r"run on without progress|races with",
        seeds=(1, 2, 3),
    ),
    "attention, too little dynamic shared memory": Bug(
        Edit(
            "window_attention.cu",
            "(tile_stride<T>(dim) + 16);",
            "(tile_stride<T>(dim) + (SEEDED ? 8 : 16));",
        ),
        "expert_scores",
        MASS,
        r"out of the bounds of shared memory",
    ),
}

# A block that has ended tells by its mark what it has read: only those that run at once need this.
RELEASE = "kv_compact.cu without __threadfence(); 1"
BUGS[RELEASE] = dataclasses.replace(BUGS[RELEASE], residents=16, seeds=(0, 1, 4, 7))


@cache
def seeded_kernels() -> ModuleType:
    return built.load(built.build("watched", [bug.edit for bug in BUGS.values()]))


@cache
def run(op: str, case: Any, bug: int, seed: int, residents: int | None = None) -> None:
    """Check an op with a bug switched on; 0: none."""
    kernels = seeded_kernels()
    device = simulated.Device(kernels, seed, residents=residents)
    kernels.seed(bug)
    try:
        if residents == 0:  # nothing is computed
            inputs, options = case.inputs()
            device.op(op)(*inputs, **options)
        elif op == "quantize_pairs":
            rows = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
            got = device.quantize_pairs(rows, rows, pairs=case)
            for x, y in zip(got, reference.quantize_pairs(rows, rows, pairs=case), strict=True):
                torch.testing.assert_close(x, y, atol=0, rtol=0)
        elif op == "ragged_attention" and case[0] in QUANTISED:
            rows = make_rows(case[0], case[1], True, True, dim=128, stored=400, tail=2, queries=2)
            got = device.ragged_attention(**rows, scaling=0.1)
            want = expected(rows, 128, scaling=0.1)
            tolerance = ragged.DTYPES[case[1]]
            torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
        elif op == "ragged_attention":
            name, dtype = case
            inputs = ragged.cast(ragged.make_case(**ragged.CASES[name]), dtype)
            if case == UNSEEN:
                inputs["tail_values"][:, :, -1] = torch.inf
            got = device.ragged_attention(**inputs, scaling=0.1)
            want = ragged.oracle(**inputs, scaling=0.1)
            tolerance = ragged.DTYPES[dtype]
            torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
        else:
            op_cases.CHECKS[op][0](device.op(op), case)
    finally:
        kernels.seed(0)


@pytest.mark.parametrize("name", BUGS)
def test_seeded_bugs_are_reported(name: str) -> None:
    bug = BUGS[name]
    run(bug.op, bug.case, 0, bug.seeds[0], bug.residents)  # nothing to report without it
    number = list(BUGS).index(name) + 1
    for seed in bug.seeds:
        with pytest.raises((seeded_kernels().Error, AssertionError), match=re.compile(bug.report)):
            run(bug.op, bug.case, number, seed, bug.residents)


EARLY_MARK = Edit(
    "kv_compact.cu",
    "__threadfence();\n  if (lane == 0) atomicMax(&progress->first_word, last_word);",
    "if (SEEDED && lane == 0) atomicMax(&progress->first_word, last_word);\n"
    "  __threadfence();\n"
    "  if (!SEEDED && lane == 0) atomicMax(&progress->first_word, last_word);",
)


def test_a_mark_that_comes_before_the_fence() -> None:
    """Few blocks at once, and few schedules of many, show it. A build of its own: edits overlap."""
    kernels = built.load(built.build("watched", [EARLY_MARK]))
    case = op_cases.KvCompact((1, 1, 8192, 128), (4096,))
    for number in (0, 1):
        kernels.seed(number)
        reports = set()
        for seed in (6, 11):
            op = simulated.Device(kernels, seed, residents=112).kv_compact_
            try:
                op_cases.check_kv_compact_(op, case)
            except kernels.Error as error:
                reports.add("races with" in str(error))
        assert reports == ({True} if number else set())


def test_edits_are_told_apart() -> None:
    text = "a; b; a;"
    edits = [Edit("x", "a;", "if (SEEDED) a;", 1), Edit("y", "a;", "z"), Edit("x", "b;", "SEEDED")]
    expected = "a; ::simt::seeded(3) if (::simt::seeded(1)) a;"
    assert built.apply(edits, "x", text) == expected
    with pytest.raises(ValueError, match=r"expected 3 of 'a;' in x, got 2"):
        built.apply([Edit("x", "a;", "", 2)], "x", text)
    with pytest.raises(ValueError, match="do not overlap"):
        built.apply([Edit("x", "a; b;", ""), Edit("x", "b; a;", "c")], "x", text)

"""Bugs put into the real kernels: the simulator must report each, under every schedule."""

import dataclasses
import re
from types import ModuleType
from typing import Any

import kernels as built
import op_cases
import pytest
import simulated
import test_ops_ragged_attention as ragged
from kernels import Edit


@dataclasses.dataclass(frozen=True)
class Bug:
    edit: Edit
    op: str
    case: Any
    report: str  # what the simulator says of it


SYNC = "__syncthreads();"
RACE = r"races with|nobody has written"
GATING = op_cases.GatingTopk(299, 60, 4, mask=True)
SCORES = op_cases.ExpertScores((1, 1, 150, 32), dtype=op_cases.BF16, num_queries=40)
SCORES_FP32 = op_cases.ExpertScores((1, 1, 150, 32), num_queries=20)
SELECT = op_cases.SelectKept((1, 2, 2500), (1000,), 4, 16, 8, values="ties")
COMPACT = op_cases.KvCompact((1, 2, 300, 64), (200,), dtype=op_cases.BF16)
RAGGED = "decode"

BUGS = {
    # A barrier removed.
    "gating, sums before all warps have theirs": Bug(
        Edit("gating_topk.cu", SYNC, ""), "gating_topk", GATING, RACE
    ),
    "scan, sums before all warps have theirs": Bug(
        Edit("block.h", SYNC, ""), "select_kept", SELECT, RACE
    ),
    "scan, next call too early": Bug(Edit("block.h", SYNC, "", 1), "select_kept", SELECT, RACE),
    "compaction, writes before all have read": Bug(
        Edit("kv_compact.cu", SYNC, "", 3), "kv_compact_", COMPACT, RACE
    ),
    "ragged, warps meet too early": Bug(
        Edit("ragged_attention.cu", f"{SYNC}\n  for (int q", "for (int q"),
        "ragged_attention",
        RAGGED,
        RACE,
    ),
    # What orders blocks, removed.
    "compaction, no release": Bug(
        Edit("kv_compact.cu", "__threadfence();", ""),
        "kv_compact_",
        COMPACT,
        r"global memory .* races with",
    ),
    "compaction, no acquisition": Bug(
        Edit("kv_compact.cu", "__threadfence();", "", 1),
        "kv_compact_",
        COMPACT,
        r"global memory .* races with",
    ),
    "compaction, nobody waits": Bug(
        Edit("kv_compact.cu", "wait_for_items_before(item.number, progress);", ""),
        "kv_compact_",
        op_cases.KvCompact((1, 2, 1500, 128), (1400,)),
        r"global memory .* races with",
    ),
    # A bound off by one.
    "gating, one expert too many": Bug(
        Edit(
            "gating_topk.cu",
            "first_expert + i < num_experts ? to_float",
            "first_expert + i <= num_experts ? to_float",
        ),
        "gating_topk",
        op_cases.GatingTopk(20, 7, 2),
        r"a read of 4 bytes out of the bounds of global memory",
    ),
    "selection, one position too many": Bug(
        Edit(
            "select_kept.cu", "if (begin + i < num_keys) score", "if (begin + i <= num_keys) score"
        ),
        "select_kept",
        op_cases.SelectKept((1, 1, 77), (20,)),
        r"a read of 4 bytes out of the bounds of global memory",
    ),
    "mixing, one position too many": Bug(
        Edit("mix_scores.cu", "position >= params.num_keys", "position > params.num_keys"),
        "mix_scores",
        op_cases.MixScores((4, 1, 2, 50), 2),
        r"out of the bounds of global memory",
    ),
    # A race on shared memory.
    "histogram without an atomic": Bug(
        Edit("select_kept.cu", "atomicAdd(&counts[bin(keys[i])], 1u);", "++counts[bin(keys[i])];"),
        "select_kept",
        SELECT,
        r"shared memory .* races with",
    ),
    # Masks and divergence.
    "gating, half a warp in the mask": Bug(
        Edit(
            "gating_topk.cu",
            "__shfl_xor_sync(kFullWarp, highest",
            "__shfl_xor_sync(0xffffu, highest",
        ),
        "gating_topk",
        GATING,
        r"is not in the mask of its own __shfl_xor_sync",
    ),
    "gating, lanes that leave early": Bug(
        Edit("gating_topk.cu", "float p[kPerLane];", "if (!inside) break;\nfloat p[kPerLane];"),
        "gating_topk",
        GATING,
        r"__shfl_xor_sync|exits",
    ),
    "compaction, a divergent barrier": Bug(
        Edit(
            "kv_compact.cu", SYNC, "if (threadIdx.x < 200) __syncthreads(); else __syncthreads();"
        ),
        "kv_compact_",
        COMPACT,
        r"__syncthreads at kv_compact.cu:\d+ while .* is in another one",
    ),
    # Memory.
    "compaction, misaligned accesses": Bug(
        Edit("kv_compact.cu", "plan.unit = alignment & -alignment;", "plan.unit = 16;"),
        "kv_compact_",
        op_cases.KvCompact((2, 2, 37, 20), (20,), dtype=op_cases.BF16),
        r"a misaligned access at .* at .*kv_compact.cu:\d+",
    ),
    "attention, too little dynamic shared memory": Bug(
        Edit("window_attention.cu", "(tile_stride<T>(dim) + 8);", "(tile_stride<T>(dim) + 4);"),
        "expert_scores",
        SCORES,
        r"out of the bounds of shared memory",
    ),
    "attention, a tile read while it is copied": Bug(
        Edit("window_attention.cu", "copy_async_wait<1>();", ""),
        "expert_scores",
        SCORES,
        RACE,
    ),
}


def run(device: simulated.Device, op: str, case: Any) -> None:
    if op == "ragged_attention":
        device.ragged_attention(**ragged.make_case(**ragged.CASES[case]), scaling=0.1)
    else:
        op_cases.CHECKS[op][0](device.op(op), case)


@pytest.mark.parametrize("name", BUGS)
def test_seeded_bugs_are_reported(kernels: ModuleType, name: str) -> None:
    bug = BUGS[name]
    run(simulated.Device(kernels), bug.op, bug.case)  # nothing to report without it
    seeded = built.load(built.build("watched", (bug.edit,)))
    assert seeded.__file__ != kernels.__file__
    for seed in range(5):
        with pytest.raises(seeded.Error, match=re.compile(bug.report)):
            run(simulated.Device(seeded, seed), bug.op, bug.case)

"""How well the accesses of warps fit sectors of global memory and banks of shared memory.

Counted where tensors are aligned and rows long, as in real models. What a kernel moves beyond the
least, it moves for nothing.
"""

from collections import defaultdict
from types import ModuleType
from typing import Any

import op_cases
import pytest
import ragged_cases as ragged
import simulated
import simulated_kernels as built
import torch
from op_cases import BF16
from simulated_kernels import Edit
from stored_rows import QUANTISED, make_rows

CASES: dict[str, Any] = {
    "gating_topk": op_cases.GatingTopk(512, 64, 4, BF16),
    "expert_scores": op_cases.ExpertScores(
        (1, 2, 600, 128), dtype=BF16, num_queries=64, group=4, lag=128
    ),
    "expected_attention": op_cases.ExpectedAttention((1, 2, 300, 128), dtype=BF16),
    "project_tokens": op_cases.ProjectTokens((2, 100, 1024), 4, BF16),
    "mix_scores": op_cases.MixScores((4, 1, 4, 512), 2),
    "select_kept": op_cases.SelectKept((1, 4, 5000), (9000,), 4, 16, 8),
    "select_kept, floors": op_cases.SelectKept((1, 4, 5000), (9000,), 4, 16, 30),
    "kv_compact_": op_cases.KvCompact((1, 2, 600, 128), (300,), dtype=BF16),
    "ragged_attention": None,
    "ragged_attention, quantised": None,
    "quantize_pairs": None,
}
# Units over the least, for reads and writes of global memory and of shared memory, where they are
# more than 1.2. Weights and experts of mix_scores lie k apart; 32 bytes of fp32 are two loads of a
# lane; two stores of a lane fill a sector of sums in ragged_attention; the rest is little beside
# what else the kernel moves, or is moved once in a block.
ABOVE = {
    ("attention_lse_kernel", "global", "read"): 1.4,
    ("expected_attention_kernel", "shared", "write"): 1.3,
    ("gating_topk_kernel", "shared", "write"): 3.1,
    ("mix_scores_kernel", "global", "read"): 2.6,
    ("ragged_attention_coded_kernel", "global", "write"): 2.0,
    ("ragged_attention_tiles_kernel", "global", "write"): 2.0,
    ("select_kept_begin_kernel", "global", "write"): 1.8,
    ("select_kept_count_kernel", "global", "read"): 1.9,
    ("select_kept_group_kernel", "global", "read"): 2.0,
    ("select_kept_group_kernel", "shared", "write"): 1.9,
    ("select_kept_histogram_kernel", "global", "read"): 3.0,
    ("select_kept_histogram_kernel", "global", "write"): 8.0,
    ("select_kept_write_kernel", "global", "read"): 1.8,
    ("select_kept_write_kernel", "global", "write"): 1.3,
    ("select_kept_write_kernel", "shared", "write"): 1.6,
    ("token_directions_kernel", "global", "write"): 8.0,
    ("token_distances_kernel", "global", "read"): 1.7,
}
USUAL = 1.2


def traffic_of(kernels: ModuleType, name: str) -> dict[tuple[str, str, str], float]:
    """Return units over the least by kernel, memory and direction."""
    device = simulated.Device(kernels)
    kernels.count_traffic(True)
    try:
        if name == "quantize_pairs":
            rows = torch.randn(200, 128).bfloat16()
            device.quantize_pairs(rows, rows, pairs="k8v4")
        elif name == "ragged_attention, quantised":
            for pairs in QUANTISED:
                coded = make_rows(pairs, BF16, False, False, heads=2, dim=128, stored=600, tail=0)
                device.ragged_attention(**coded, scaling=0.1)
        elif name == "ragged_attention":
            for group in (4, 8):
                case = ragged.make_case(heads=2, group=group, dim=128, stored=600, tail=5)
                device.ragged_attention(**ragged.cast(case, torch.bfloat16), scaling=0.1)
        else:
            inputs, options = CASES[name].inputs()
            device.op(name.split(",")[0])(*inputs, **options)
        sums: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
        for kernel, _, memory, direction, _, units, least in kernels.take_traffic():
            sums[kernel.split("<")[0], memory, direction][0] += units
            sums[kernel.split("<")[0], memory, direction][1] += least
    finally:
        kernels.count_traffic(False)
    return {key: units / least for key, (units, least) in sums.items()}


@pytest.mark.parametrize("name", CASES)
def test_traffic(kernels: ModuleType, name: str) -> None:
    ratios = traffic_of(kernels, name)
    assert ratios
    wrong = {key: x for key, x in ratios.items() if x > ABOVE.get(key, USUAL)}
    assert not wrong
    # None of the exceptions is there for nothing.
    kept = {key: ratios[key] for key in ABOVE if key in ratios and ratios[key] <= USUAL}
    assert not kept


FAR_APART = Edit(
    "project_tokens.cu",
    "raw[i].load(from, first + i * kStep,",
    "raw[i].load(from, SEEDED ? begin + (lane * kBatch + i) * kPack : first + i * kStep,",
)


def test_lanes_that_read_far_apart_are_told() -> None:
    """The same bytes in another order: nothing is wrong but the traffic."""
    kernels = built.load(built.build("watched", [FAR_APART]))
    key = ("token_norms_kernel", "global", "read")
    assert traffic_of(kernels, "project_tokens")[key] <= USUAL
    kernels.seed(1)
    assert traffic_of(kernels, "project_tokens")[key] > 1.8

import os
from collections.abc import Callable
from types import ModuleType

import pytest
import simulated
import simulated_kernels as built
import torch

# "sanitized" needs AddressSanitizer's library preloaded; see test_simt_sanitized.py.
FLAVOUR = os.environ.get("MOEKV_SIMT_FLAVOUR", "watched")


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    return built.load(built.build(FLAVOUR))


@pytest.fixture(scope="session")
def few_blocks() -> ModuleType:
    """The kernels with fewer blocks, each of which has more to do, but no whole group of rows."""
    edits = [
        built.Edit("select_kept.cu", "kMaxBlocks = 8192", "kMaxBlocks = 2"),
        built.Edit("select_kept.cu", "kMaxGroupKeys = 20480", "kMaxGroupKeys = 0"),
        built.Edit("gating_topk.cu", "kMaxBlocks = 512", "kMaxBlocks = 2"),
        built.Edit("key_diversity.cu", "kMaxBlocks = 2048", "kMaxBlocks = 1"),
        built.Edit("project_tokens.cu", "kMaxRuns = 256", "kMaxRuns = 2"),
        built.Edit("project_tokens.cu", "kMaxGridY = 65535", "kMaxGridY = 3"),
        built.Edit("ragged_attention.cu", "kTargetBlocks = 512", "kTargetBlocks = 6"),
        # What only few blocks can show, switched off.
        built.Edit(
            "ragged_attention.cu",
            "max_chunks = target_chunks + heads",
            "max_chunks = target_chunks + (SEEDED ? 0 : heads)",
        ),
    ]
    return built.load(built.build(FLAVOUR, edits))


@pytest.fixture
def selftest(kernels: ModuleType) -> Callable[..., torch.Tensor]:
    """Run a kernel of selftest.cu on a copy of an array and return what it makes of it."""

    def run(name: str, data: torch.Tensor, seed: int = 0) -> torch.Tensor:
        result = data.clone()
        memory = simulated.Memory(kernels)
        address = memory.inout(result)
        kernels.selftest(name, address, seed)
        memory.copy_back()
        return result

    return run

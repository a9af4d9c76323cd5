import os
from collections.abc import Callable
from types import ModuleType

import kernels as built
import pytest
import simulated
import torch

# "sanitized" needs AddressSanitizer's library preloaded; see test_simt_sanitized.py.
FLAVOUR = os.environ.get("MOEKV_SIMT_FLAVOUR", "watched")


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    return built.load(built.build(FLAVOUR))


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

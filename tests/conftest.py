import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch

from moekv import ops, reference

hypothesis.settings.register_profile("moekv", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("moekv")


@dataclasses.dataclass(frozen=True)
class Target:
    """A backend of the ops, and the device of its tensors."""

    backend: str
    device: str

    def op(self, name: str) -> Callable[..., Any]:
        namespace: Any = reference if self.backend == "torch" else torch.ops.moekv
        function: Callable[..., Any] = getattr(namespace, name)
        return function

    def __str__(self) -> str:
        return self.backend if self.backend == self.device else f"{self.backend}-{self.device}"


TARGETS = [Target("cpu", "cpu"), Target("torch", "cpu")]
if ops.available_backends()["cuda"] is None:
    TARGETS += [Target("cuda", "cuda"), Target("torch", "cuda")]
NATIVE_TARGETS = [target for target in TARGETS if target.backend != "torch"]


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """Every backend on every device that is there."""
    return request.param


@pytest.fixture(params=NATIVE_TARGETS, ids=str)
def native(request: pytest.FixtureRequest) -> Target:
    """The native backends that are there; a CPU library that has not been built is a failure."""
    ops.check_backend("cpu")
    return request.param

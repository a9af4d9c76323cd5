"""A GPU for code that is to run on one: CPU tensors that say they are on it.

Inside ``with PretendedGpu(kernels)`` tensors can be made on or moved to the device ``"cuda"``.
Those remember where they are, refuse to meet tensors that are elsewhere, as real ones do, and hand
the ops of moekv to the simulated CUDA kernels.
"""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import simulated
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)


class GpuTensor(Tensor):
    """A tensor on the pretended GPU."""


def on_gpu(value: Any) -> Any:
    return value.as_subclass(GpuTensor) if isinstance(value, Tensor) else value


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device | str) and str(value).startswith("cuda"):
        return "cpu"
    return value.as_subclass(Tensor) if isinstance(value, GpuTensor) else value


# What may take tensors from several devices. Indices may be on the CPU.
MOVES = {
    Tensor.to,
    Tensor.cpu,
    Tensor.copy_,
    Tensor.__getitem__,
    Tensor.__setitem__,
    Tensor.tensor_split,
}


class PretendedGpu(TorchFunctionMode):
    """The GPU, while the context lasts."""

    def __init__(self, kernels: ModuleType) -> None:
        super().__init__()
        self.device = simulated.Device(kernels)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **(kwargs or {}))
        if func is torch._has_compatible_shallow_copy_type:
            return False  # modules that move get new parameters, which know where they are
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        begins_here = any(isinstance(x, GpuTensor) for x in tensors)
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if begins_here else torch.device("cpu")
        # A single number may come from anywhere.
        elsewhere = [x for x in tensors if x.dim() > 0 and not isinstance(x, GpuTensor)]
        if begins_here and elsewhere and func not in MOVES:
            raise RuntimeError(f"{func}: expected all tensors on one device")
        devices = [x for x in leaves if isinstance(x, torch.device) or x in ("cpu", "cuda")]
        if func is Tensor.cpu:
            devices = ["cpu"]
        ends_here = begins_here if not devices else torch.device(devices[-1]).type == "cuda"
        if begins_here and str(func).startswith("moekv."):
            func = self.device.op(str(func).removeprefix("moekv."))
        args, kwargs = tree_map(on_cpu, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu) and begins_here != ends_here:
            result = result.clone()
        return tree_map(on_gpu, result) if ends_here else result


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        assert self.seconds

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.seconds - self.seconds)

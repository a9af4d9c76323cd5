"""A GPU for code that is to run on one: CPU tensors that say they are on it.

Inside ``with PretendedGpu(kernels)`` tensors can be made on or moved to the device ``"cuda"``.
Those remember where they are, refuse to meet tensors that are elsewhere, as real ones do, and hand
the ops of moekv to the simulated CUDA kernels. What a real host would wait for is counted, and
refused while a graph is captured.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class PinnedTensor(Tensor):
    """A tensor of the host whose copies to the GPU nobody waits for."""


def on_gpu(value: Any) -> Any:
    return value.as_subclass(GpuTensor) if isinstance(value, Tensor) else value


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device | str) and str(value).startswith("cuda"):
        return "cpu"
    return value.as_subclass(Tensor) if isinstance(value, GpuTensor | PinnedTensor) else value


# What may take tensors from several devices. Indices may be on the CPU.
MOVES = {
    Tensor.to,
    Tensor.cpu,
    Tensor.copy_,
    Tensor.__getitem__,
    Tensor.__setitem__,
    Tensor.tensor_split,
}


# What gives the host numbers, or a tensor whose size depends on numbers.
WAITS = {
    *(Tensor.item, Tensor.tolist, Tensor.nonzero, torch.nonzero, Tensor.masked_select),
    *(torch.masked_select, Tensor.unique, torch.unique, torch.equal, Tensor.equal, torch.allclose),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),  # type: ignore[attr-defined]
}
# Makes a tensor of numbers of the host.
FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy}


def waits_for_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call on tensors of a GPU makes the host wait for what is in them."""
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        value = args[2] if len(args) > 2 else None
        written = isinstance(value, int | float | bool) or value is None
        masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor) and x.dtype == torch.bool]
        return bool(masks) and not (func is Tensor.__setitem__ and written)
    if func in (torch.where, Tensor.where):
        return len(args) + len(kwargs) == 1
    if func in (torch.repeat_interleave, Tensor.repeat_interleave):
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        return isinstance(repeats, Tensor) and kwargs.get("output_size") is None
    return func in WAITS


class PretendedGpu(TorchFunctionMode):
    """The GPU, while the context lasts.

    ``waits``: what made the host wait for it.
    """

    def __init__(self, kernels: ModuleType) -> None:
        super().__init__()
        self.device = simulated.Device(kernels)
        self.waits: list[str] = []
        self._graph: list[tuple[Any, Any, Any, Any]] | None = None

    @contextmanager
    def capturing(self, graph: list[tuple[Any, Any, Any, Any]]) -> Iterator[None]:
        """Write all calls down, and refuse those that would wait."""
        self._graph = graph
        try:
            yield
        finally:
            self._graph = None

    def replay(self, graph: list[tuple[Any, Any, Any, Any]]) -> None:
        """Do once more what was written down, with the numbers that are there now."""
        for func, args, kwargs, results in graph:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def _wait(self, name: str) -> None:
        if self._graph is not None:
            raise RuntimeError(f"{name} waits for the device while a graph is captured")
        self.waits.append(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func is torch._has_compatible_shallow_copy_type:
            return False  # modules that move get new parameters, which know where they are
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        begins_here = any(isinstance(x, GpuTensor) for x in tensors)
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if begins_here else torch.device("cpu")
        # A single number may come from anywhere.
        elsewhere = [x for x in tensors if x.dim() > 0 and not isinstance(x, GpuTensor)]
        if begins_here and elsewhere and func not in MOVES:
            raise RuntimeError(f"{func}: expected all tensors on one device")
        places = [x for x in leaves if isinstance(x, torch.device | str)]
        devices = [x for x in places if isinstance(x, torch.device) or x in ("cpu", "cuda")]
        if func is Tensor.cpu:
            devices = ["cpu"]
        ends_here = begins_here if not devices else torch.device(devices[-1]).type == "cuda"
        from_host = func in FROM_HOST and str(args[0]) != "[]"
        moves = begins_here != ends_here and (tensors or from_host)
        written = func is Tensor.copy_ and begins_here and elsewhere
        if func is Tensor.pin_memory:
            return args[0].clone().as_subclass(PinnedTensor)
        sent = func is Tensor.to and isinstance(args[0], PinnedTensor) and ends_here
        moves = moves and not (sent and kwargs.get("non_blocking"))
        if moves or written or (begins_here and waits_for_numbers(func, args, kwargs)):
            self._wait(getattr(func, "__name__", str(func)))
        if begins_here and str(func).startswith("moekv."):
            func = self.device.op(str(func).removeprefix("moekv.").removesuffix(".default"))
        args, kwargs = tree_map(on_cpu, (args, kwargs))
        result = func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu) and begins_here != ends_here:
            result = result.clone()
        if self._graph is not None and ends_here:
            self._graph.append((func, args, kwargs, result))
        # A torch.Size would become a tuple.
        return (
            tree_map(on_gpu, result) if ends_here and not isinstance(result, torch.Size) else result
        )


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

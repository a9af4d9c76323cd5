"""The GPU as the steps use it, and the sizes they run at."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True)
class Prefill:
    """A prompt: its tokens, on how many layers at most, and how often it is timed."""

    tokens: int
    layers: int
    rounds: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a layer, and of a model: those of Llama-3.1-8B."""

    num_query_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    num_queries: int = 64  # of the window
    hidden_size: int = 4096
    intermediate_size: int = 14336
    vocabulary: int = 128256
    layer_tokens: tuple[int, ...] = (4096, 32768, 131072)
    repeats: int = 30
    cold_bytes: int = 2**29  # read to empty the caches
    matrix: int = 8192
    # The press's share is the same for every number of layers, and time is short.
    prefills: tuple[Prefill, ...] = (
        Prefill(8192, 32, 3),
        Prefill(32768, 16, 2),
        Prefill(131072, 4, 1),
    )
    decoded: int = 24
    graph: Prefill = Prefill(4096, 4, 1)


class Gpu:
    """The current CUDA device. ``results``: the report so far."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.device = torch.device("cuda")
        self.sizes = Sizes()

    def active(self) -> contextlib.AbstractContextManager[object]:
        """Return what the items run in."""
        return contextlib.nullcontext()

    def is_well(self) -> bool:
        """Say whether the device still works in this process."""
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True

    def synchronize(self) -> None:
        """Wait for all that has been asked of it."""
        torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """Return how long the device is busy with ``run``; its launches are queued before."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def wall_seconds(self, run: Callable[[], object]) -> float:
        """Return how long ``run`` takes until the device has done all of it."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """Return what replays the graph of ``run``, which is not executed here."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def on_a_stream(self, run: Callable[[], None]) -> None:
        """Run on a stream of its own, behind what the device has to do; do not wait for it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()

    def count_waits(self, run: Callable[[], object]) -> int:
        """Return how often the host waits for the device while ``run`` runs."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(x.message) for x in caught)

    def profiled(self, run: Callable[[], object]) -> None:
        """Run what a profiler beside this process is to look at, and nothing else."""
        torch.cuda.profiler.start()
        run()
        self.synchronize()
        torch.cuda.profiler.stop()

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Return the most memory that is held at once while ``run`` runs."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()

    def free_bytes(self) -> int:
        """Return what a process may still allocate."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

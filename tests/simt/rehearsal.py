"""gpu_check's device where there is no GPU: a pretended one, and sizes that it can do in seconds.

``python -m gpu_check --device rehearsal``, or a worker with it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_check.gpu
import pretended
import simulated_kernels as built
from gpu_check.gpu import Prefill, Sizes

from moekv import ops
from moekv.ops import backends

SMALL = Sizes(
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_queries=5,
    hidden_size=64,
    intermediate_size=96,
    vocabulary=128,
    layer_tokens=(64,),
    repeats=1,
    cold_bytes=2**20,
    matrix=64,
    prefills=(Prefill(40, 1, 1),),
    decoded=2,
    graph=Prefill(40, 1, 1),
)


class Gpu(gpu_check.gpu.Gpu):
    """A pretended GPU."""

    def __init__(self, results: Path) -> None:
        super().__init__(results)
        self.sizes = SMALL
        self.device = pretended.GPU

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        everything = dict.fromkeys(ops.BACKENDS)
        self.mode = pretended.PretendedGpu(built.load(built.build()))
        with (
            mock.patch.object(backends, "available_backends", lambda: everything),
            mock.patch.object(backends, "_native", frozenset(("cpu", "cuda"))),
            self.mode,
        ):
            yield

    def synchronize(self) -> None:
        pass

    def seconds(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        graph: list[Any] = []
        with self.mode.capturing(graph):
            run()
        return lambda: self.mode.replay(graph)

    def on_a_stream(self, run: Callable[[], None]) -> None:
        run()

    def count_waits(self, run: Callable[[], object]) -> int:
        before = len(self.mode.waits)
        run()
        return len(self.mode.waits) - before

    def profiled(self, run: Callable[[], object]) -> None:
        run()

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()
        return 0

    def free_bytes(self) -> int:
        return 2**30

"""What holds of the ops on a GPU alone: streams, devices, graphs."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import op_cases
import pytest
import ragged_cases as ragged
import torch
from stored_rows import make_rows
from torch import Tensor

from moekv import ops

pytestmark = pytest.mark.skipif(
    ops.available_backends()["cuda"] is not None, reason="needs a GPU and the CUDA library"
)

STORED = "ragged_attention, quantised"
OPS = [*op_cases.CHECKS, "quantize_pairs", "ragged_attention", STORED]


def calls(name: str, device: str = "cuda") -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Inputs of an op, and a call of it that returns all tensors that it gives or writes."""
    op = getattr(torch.ops.moekv, name.split(",")[0])
    if name.startswith("ragged_attention"):
        case: dict[str, Any] = ragged.make_case()
        if name == STORED:
            case = make_rows("k8v4", torch.bfloat16, True, True, tail=3)
        case = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in case.items()}
        tensors = [x for x in case.values() if isinstance(x, Tensor)]
        return tensors, lambda: [op(**case, scaling=0.1)]
    if name == "quantize_pairs":
        rows = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)).to(device)
        return [rows], lambda: list(op(rows, rows, pairs="k8v4"))
    inputs, options = op_cases.CHECKS[name][1][4].inputs(device)

    def run() -> list[Tensor]:
        result = op(*inputs, **options)
        if result is None:
            return inputs[:2]
        return [result] if isinstance(result, Tensor) else list(result)

    return [x for x in inputs if x is not None], run


def expected(name: str, device: str = "cuda") -> list[Tensor]:
    _, run = calls(name, device)
    results = run()
    torch.cuda.synchronize(device)
    return results


def assert_same_bits(results: list[Tensor], others: list[Tensor]) -> None:
    for got, want in zip(results, others, strict=True):
        # As integers, for NaN is not equal to itself; a number has no other view.
        a, b = (x.cpu().reshape(-1).view(torch.uint8) for x in (got, want))
        assert torch.equal(a, b)


def in_a_thread(name: str, device: str) -> list[Tensor]:
    """What comes of an op in a thread that has called nothing before."""
    results = list[Tensor]()
    thread = threading.Thread(target=lambda: results.extend(expected(name, device)))
    thread.start()
    thread.join()
    return results


# The kernels are loaded when they are first used: here while a graph is captured.
FIRST_USE = """
import torch
from test_cuda import OPS, assert_same_bits, calls

for name in OPS:
    inputs, run = calls(name)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(results, calls(name)[1]())
"""


def test_its_first_use_may_be_captured() -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])
    }
    command = [sys.executable, "-c", FIRST_USE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", OPS)
def test_a_graph_replays_it(name: str) -> None:
    """Nothing waits, nothing of the host is read after the call, and each replay begins anew."""
    want = expected(name)
    inputs, run = calls(name)
    copies: list[Any] = [x.clone() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for factor in (1, -0.5, 1):  # counters and tables of an earlier replay are not gone on with
        for x, copy in zip(inputs, copies, strict=True):
            x.copy_(copy * factor if x.is_floating_point() else copy)
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(results, want)


@pytest.mark.parametrize("name", OPS)
def test_it_runs_in_a_thread_that_has_called_nothing_before(name: str) -> None:
    want = expected(name)
    assert_same_bits(in_a_thread(name, "cuda"), want)


@pytest.mark.parametrize("name", OPS)
def test_it_runs_on_the_current_stream(name: str) -> None:
    """It waits for what the stream has to do first, here for its inputs."""
    want = expected(name)
    inputs, run = calls(name)
    copies: list[Any] = [x.clone() for x in inputs]
    for x in inputs:
        x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles
        for x, copy in zip(inputs, copies, strict=True):
            x.copy_(copy)
        results = run()
    stream.synchronize()
    assert_same_bits(results, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPS)
def test_it_runs_on_the_device_of_its_tensors(name: str) -> None:
    want = expected(name)
    with torch.cuda.device(0):
        results = in_a_thread(name, "cuda:1")
        assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in results)
    assert_same_bits(results, want)

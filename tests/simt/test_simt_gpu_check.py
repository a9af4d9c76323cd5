"""What is to run on a GPU, on a pretended one: tensors on the CPU and simulated kernels."""

import re
from types import ModuleType
from typing import Any

import gpu_check
import op_cases
import pretended
import pytest
import torch

from moekv import ops
from moekv.ops import backends


@pytest.mark.parametrize("name", op_cases.CHECKS)
def test_checks_of_the_ops(kernels: ModuleType, name: str) -> None:
    """The checks put all of their tensors on the device that they are told."""
    check, cases = op_cases.CHECKS[name]
    with pretended.PretendedGpu(kernels):
        for case in cases[:3]:
            check(getattr(torch.ops.moekv, name), case, "cuda")


def test_a_pretended_gpu_refuses_tensors_from_elsewhere(kernels: ModuleType) -> None:
    with pretended.PretendedGpu(kernels):
        here, there = torch.ones(3, device="cuda"), torch.ones(3)
        assert (here.device.type, there.device.type) == ("cuda", "cpu")
        assert (here + there.to("cuda")).device == (here * there[0]).device == here.device
        assert (here.cpu() + there).device == there.device
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            here + there


@pytest.fixture
def gpu(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> pretended.PretendedGpu:
    """A pretended GPU and what else gpu_check asks of torch.cuda."""
    monkeypatch.setattr(torch.cuda, "Event", pretended.Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a pretended GPU")
    monkeypatch.setattr(backends, "available_backends", lambda: dict.fromkeys(ops.BACKENDS))
    small = {
        "NUM_QUERY_HEADS": 4,
        "NUM_KV_HEADS": 2,
        "HEAD_DIM": 32,
        "NUM_QUERIES": 5,
        "HIDDEN_SIZE": 64,
        "REPEATS": 2,
    }
    for constant, value in small.items():
        monkeypatch.setattr(gpu_check, constant, value)
    return pretended.PretendedGpu(kernels)


ARGUMENTS = ["--tokens", "64", "130", "--megabytes", "1"]


def test_gpu_check_prints_its_table(gpu: pretended.PretendedGpu, capsys: Any) -> None:
    with gpu:
        gpu_check.main(ARGUMENTS)
    out = capsys.readouterr().out
    assert out.startswith(f"a pretended GPU, torch {torch.__version__}, device copy ")
    rows = re.findall(
        r"^\| `([^`]+)` \| (\d+) \| [\d.]+ \| \d+% \| \d+ \| \d+% \|$", out, re.MULTILINE
    )
    names = [name for name, tokens in rows if tokens == "64"]
    assert {name.split()[0].rstrip(",") for name in names} == {*op_cases.CHECKS, "ragged_attention"}
    assert rows == [(name, tokens) for tokens in ("64", "130") for name in names]


@pytest.mark.parametrize("name", [*op_cases.CHECKS, "ragged_attention"])
def test_gpu_check_compares_before_it_times(
    gpu: pretended.PretendedGpu, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An op that is wrong in one number is not timed."""
    op = gpu.device.op(name)

    def wrong(*inputs: torch.Tensor, **options: Any) -> Any:
        result = op(*inputs, **options)
        first = result if isinstance(result, torch.Tensor) else (result or inputs)[0]
        first.view(-1)[7] = first.view(-1)[7] * 1.03 + 1
        return result

    with gpu:
        timed = [x for x in gpu_check.make_ops(64, pretended.GPU) if x.name.startswith(name)]
        for one in timed:
            gpu_check.check(one)
        monkeypatch.setattr(gpu.device, name, wrong)
        for one in timed:
            with pytest.raises(AssertionError, match=re.escape(one.name)):
                gpu_check.check(one)


def test_gpu_check_says_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = dict.fromkeys(ops.BACKENDS) | {"cuda": "no device here"}
    monkeypatch.setattr(backends, "available_backends", lambda: reasons)
    with pytest.raises(SystemExit, match="backend 'cuda' is not available: no device here"):
        gpu_check.main([])

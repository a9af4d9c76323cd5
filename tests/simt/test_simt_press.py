"""``MoERouterPress(backend="cuda")`` on a pretended GPU gives what it gives on the CPU."""

from types import ModuleType

import op_cases
import press_cases
import pretended
import pytest
import torch
from tiny_models import tiny_model

from moekv import MoERouterPress, ops
from moekv.ops import backends


@pytest.fixture
def gpu(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> pretended.PretendedGpu:
    monkeypatch.setattr(backends, "available_backends", lambda: dict.fromkeys(ops.BACKENDS))
    monkeypatch.setattr(backends, "_native", frozenset(("cpu", "cuda")))
    return pretended.PretendedGpu(kernels)


# Which kernels run on the way, where that is to be seen.
RUNS = {
    "expected attention": {"expected_attention", "select_kept", "ragged_attention"},
    "a calibrated router, in chunks": {"expert_scores", "gating_topk", "mix_scores"},
    "a static cache": {"kv_compact_", "project_tokens"},
    "quantised pairs": {"quantize_pairs", "ragged_attention"},
}


@pytest.mark.parametrize("name", press_cases.CASES)
@torch.no_grad()
def test_as_on_the_cpu(
    gpu: pretended.PretendedGpu, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, op = set(), gpu.device.op
    monkeypatch.setattr(gpu.device, "op", lambda name: called.add(name) or op(name))
    run, input_ids = press_cases.CASES[name], press_cases.prompt()
    expected = run(tiny_model(), input_ids)
    with gpu:
        logits = run(tiny_model().to("cuda"), input_ids.to("cuda"))
        assert logits.device == pretended.GPU
    tolerance = 2e-2 if name in press_cases.ROUNDED else 3e-5
    torch.testing.assert_close(pretended.on_cpu(logits), expected, atol=tolerance, rtol=0)
    assert called >= RUNS.get(name, set())


def test_every_kernel_is_seen_to_run() -> None:
    assert set().union(*RUNS.values()) == {*op_cases.CHECKS, "quantize_pairs", "ragged_attention"}


def test_folding_has_no_kernel_on_a_gpu(gpu: pretended.PretendedGpu) -> None:
    model = tiny_model()
    press = MoERouterPress(0.9, pairs="k8v4", fold=True, backend="cuda")
    message = "'auto' or 'torch' with fold=True on a GPU, got 'cuda'"
    with pytest.raises(RuntimeError, match=message), press(model):
        pytest.fail("the block began")
    with gpu:
        x = torch.zeros(1, 2, 8, 16, device="cuda")
        indices, offsets = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (4, 3))
        with pytest.raises(RuntimeError, match="moekv::fold_pairs: expected backend 'auto' or"):
            ops.fold_pairs(x, x, x, indices, offsets, scaling=1.0, backend="cuda")

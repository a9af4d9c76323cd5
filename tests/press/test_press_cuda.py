"""``MoERouterPress(backend="cuda")`` on a GPU gives what it gives on the CPU."""

import press_cases
import pytest
import torch
from tiny_models import tiny_model
from transformers import DynamicCache

from moekv import MoERouterPress, ops

pytestmark = pytest.mark.skipif(
    ops.available_backends()["cuda"] is not None, reason="needs a GPU and the CUDA library"
)


@pytest.mark.parametrize("name", press_cases.CASES)
@torch.no_grad()
def test_as_on_the_cpu(name: str) -> None:
    run, input_ids = press_cases.CASES[name], press_cases.prompt()
    expected = run(tiny_model(), input_ids)
    logits = run(tiny_model().to("cuda"), input_ids.to("cuda"))
    # A pair that stays elsewhere would show; the order of sums in a matrix product does not.
    tolerance = 3e-2 if name in press_cases.ROUNDED else 1e-3
    torch.testing.assert_close(logits.cpu(), expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_offloaded_layers_come_back_whole() -> None:
    """They come and go on a stream of their own, while attention may still read them."""
    model, input_ids = tiny_model().to("cuda"), press_cases.prompt().to("cuda")
    logits = []
    for offloading in (False, True):
        cache = DynamicCache(config=model.config, offloading=offloading)
        with MoERouterPress(0.5, backend="cuda")(model):
            logits.append(press_cases.generate(model, input_ids, cache))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)

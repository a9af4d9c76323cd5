"""Tries an installed moekv: `python tools/try_wheel.py`, from another folder than the sources.

Its kernels and PyTorch's must agree on a small model of random weights, half of whose pairs leave.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import moekv
from moekv.cli.info import cuda_library

LENGTH = 200


def main() -> None:
    """Compress a cache with each backend, and compare."""
    installed = Path(moekv.__file__).resolve()
    if installed.is_relative_to(Path(__file__).resolve().parents[1] / "moekv"):
        sys.exit(f"expected an installed moekv, got the sources in {installed.parent}")
    backends = moekv.ops.available_backends()
    if backends["cpu"] is not None:
        sys.exit(f"expected the CPU kernels, got none: {backends['cpu']}")
    capability = torch.backends.cpu.get_cpu_capability()
    if moekv.ops.cpu_capability() == "default" and capability != "DEFAULT":
        sys.exit(f"expected kernels for {capability}, got those without vector extensions")
    cuda = cuda_library(installed.parent / "lib" / "libmoekv_cuda.so")
    if "unknown" in cuda:
        sys.exit(f"expected a CUDA library that names its architectures, got {cuda}")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    make: Any = LlamaForCausalLM  # not typed
    model = make(config).eval()
    ids = torch.randint(0, 128, (1, LENGTH))
    logits = {}
    for backend in ("cpu", "torch"):
        press = moekv.MoERouterPress(0.5, num_experts=4, router_type="pikv", backend=backend)
        cache = DynamicCache(config=config)
        with torch.no_grad(), press(model):
            model(ids, past_key_values=cache)
            logits[backend] = model(ids[:, :1], past_key_values=cache).logits
        evicted = press.get_stats()["compression"]["evicted"]
        if not 0.45 < evicted < 0.55:
            sys.exit(f"expected half of the pairs to leave, got {evicted:.1%} with {backend}")
    torch.testing.assert_close(logits["cpu"], logits["torch"], rtol=1e-4, atol=1e-4)
    python = ".".join(map(str, sys.version_info[:3]))
    kernels = f"CPU kernels for {moekv.ops.cpu_capability()}, CUDA library {cuda}"
    print(f"moekv {moekv.__version__} works: Python {python}, torch {torch.__version__}, {kernels}")


if __name__ == "__main__":
    main()

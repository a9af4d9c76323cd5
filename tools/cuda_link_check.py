"""Checks the CUDA library against a CUDA build of torch, on a machine that needs no GPU.

Run by ``make cuda-link-check`` in an environment with such a torch: the library loads, every op has
a CUDA kernel, and fake tensors on a fake CUDA device trace through the front half of
``torch.compile``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

# The ops alone: the package itself imports what this environment need not have.
ROOT = Path(__file__).resolve().parents[1]
package = types.ModuleType("moekv")
package.__path__ = [str(ROOT / "moekv")]
sys.modules["moekv"] = package
ops = __import__("moekv.ops", fromlist=["ops"])
backends = __import__("moekv.ops.backends", fromlist=["backends"])

OPS = (
    "expected_attention",
    "expert_scores",
    "gating_topk",
    "kv_compact_",
    "mix_scores",
    "project_tokens",
    "quantize_pairs",
    "ragged_attention",
    "select_kept",
)


def select(
    keys: Tensor, values: Tensor, queries: Tensor, hidden_states: Tensor, weight: Tensor
) -> Tensor:
    """Every op once, as the press calls them."""
    batch, num_kv_heads, num_keys, head_dim = keys.shape
    scores = ops.expert_scores(keys, values, queries, kinds=[1, 2], scaling=head_dim**-0.5)
    scores = torch.cat([scores, ops.expected_attention(keys, keys)[None]])
    logits, _ = ops.project_tokens(hidden_states, weight)
    gate = ops.gating_topk(logits.view(batch * num_keys, 2), k=2)
    weights, experts = (x.view(batch, num_keys, 2) for x in gate[:2])
    mixed = ops.mix_scores(scores, weights, experts)
    kept = num_keys // 2
    rows = mixed.view(batch * num_kv_heads, 1, num_keys)
    indices, offsets = ops.select_kept(rows, total=[kept] * batch * num_kv_heads)
    ops.kv_compact_(keys, values, indices.view(batch, num_kv_heads, kept))
    bounds = offsets.view(-1)
    begin = bounds[:-1].view(batch, num_kv_heads)
    end = bounds[1:].view(batch, num_kv_heads)
    stored = keys.view(-1, head_dim), values.view(-1, head_dim)
    attention: Tensor = ops.ragged_attention(queries, *stored, begin, end, scaling=0.1)
    *codes, scales = ops.quantize_pairs(*stored, pairs="k8v4")
    return attention + ops.ragged_attention(
        queries, *codes, begin, end, scaling=0.1, pairs="k8v4", scales=scales
    )


def fake_inputs() -> list[Tensor]:
    """Return keys, values, queries, hidden states and weights, under the mode in force."""
    shapes = [(2, 4, 64, 128), (2, 4, 64, 128), (2, 8, 16, 128), (2, 64, 512), (2, 512)]
    return [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]


def main() -> None:
    """Run all checks."""
    if torch.version.cuda is None:
        sys.exit(f"expected a CUDA build of torch, got {torch.__version__}")
    failure = backends.FAILURES["cuda"]
    if failure is not None:
        sys.exit(failure)
    for op in OPS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"moekv::{op}", "CUDA"):
            sys.exit(f"moekv::{op} has no CUDA kernel")

    mode = FakeTensorMode()
    with mode:
        output = select(*fake_inputs())
    assert output.device.type == "cuda" and output.shape == (2, 16, 8, 128), output

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    with mode:
        compiled = torch.compile(select, backend=keep, fullgraph=True)
        output = compiled(*fake_inputs())
    assert output.device.type == "cuda" and output.shape == (2, 16, 8, 128), output
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    missing = [op for op in OPS if not any(f"moekv.{op}" in name for name in called)]
    if len(graphs) != 1 or missing:
        sys.exit(f"expected one graph with every op, got {len(graphs)} without {missing}")
    print(
        f"torch {torch.__version__}: {len(OPS)} ops with CUDA kernels, traced on a fake device "
        f"into one graph of {len(graphs[0].graph.nodes)} nodes"
    )


if __name__ == "__main__":
    main()

"""The ops in a model that is compiled as one graph."""

import pytest
import torch
from torch import Tensor, nn

from moekv import ops
from moekv.ops import ScoreKind

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = (ScoreKind.ATTENTION, ScoreKind.DIVERSITY, ScoreKind.LAG)


class CompressingLayer(nn.Module):
    """Attention's keys and values, scored by three experts, mixed by a gate, and halved."""

    def __init__(self, hidden: int, num_kv_heads: int, head_dim: int, backend: str) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.backend = backend
        self.gate = nn.Linear(hidden, len(KINDS))
        self.query = nn.Linear(hidden, 2 * num_kv_heads * head_dim)
        self.key_value = nn.Linear(hidden, 2 * num_kv_heads * head_dim)

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        batch, num_keys, _ = hidden.shape
        gate = ops.gating_topk(self.gate(hidden), k=2, backend=self.backend)
        heads = (batch, num_keys, -1, self.head_dim)
        queries = self.query(hidden[:, -4:]).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        keys, values = self.key_value(hidden).view(heads).transpose(1, 2).contiguous().chunk(2, 1)
        keys, values = keys.detach().clone(), values.detach().clone()
        scores = ops.expert_scores(
            keys, values, queries, kinds=KINDS, scaling=0.25, pool=3, lag=8, backend=self.backend
        )
        mixed = ops.mix_scores(scores, gate.weights, gate.experts, backend=self.backend)
        total = self.num_kv_heads * (num_keys // 2)
        indices, offsets = ops.select_kept(mixed, total=total, sinks=2, backend=self.backend)
        ops.kv_compact_(keys, values, indices, offsets, packed=True, backend=self.backend)
        kept = batch * total
        return (
            keys.reshape(-1, self.head_dim)[:kept],
            values.reshape(-1, self.head_dim)[:kept],
            offsets,
            gate.load,
            gate.prob_sum.square().mean(),
        )


def make(target, requires_grad: bool = False) -> tuple[CompressingLayer, list[Tensor]]:
    torch.manual_seed(0)
    layer = CompressingLayer(24, 2, 16, target.backend).to(target.device)
    inputs = [torch.randn(2, length, 24, device=target.device) for length in (40, 41, 57)]
    return layer.requires_grad_(requires_grad), inputs


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_model_compiles_as_one_graph(target, dynamic):
    layer, inputs = make(target)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for hidden in inputs:
        for got, expected in zip(compiled(hidden), layer(hidden), strict=True):
            torch.testing.assert_close(got, expected)


def test_dynamic_shapes_compile_once(native):
    layer, (first, *others) = make(native)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(first)
    with torch.compiler.set_stance("fail_on_recompile"):
        for hidden in others:
            compiled(hidden)


def test_gradients_compile(target):
    layer, (hidden, *_) = make(target, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for model in (layer, compiled):
        layer.zero_grad()
        model(hidden)[-1].backward()
        gradients.append(layer.gate.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_inductor(native):
    layer, (hidden, *_) = make(native)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for got, expected in zip(compiled(hidden), layer(hidden), strict=True):
        torch.testing.assert_close(got, expected)


def test_errors_name_the_op(native):
    layer, _ = make(native)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"moekv::select_kept: expected total\[0\] .* got 0"):
        compiled(torch.randn(2, 1, 24, device=native.device))

"""Many queries at once over a compressed layer: as ``ragged_attention`` has it, in less time."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache

from moekv import MoERouterPress, ops
from moekv.cache import attention, many
from moekv.cache.rows import Rows

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def layer_of(batch: int, heads: int, most: int, dim: int, dtype: torch.dtype) -> tuple[Any, Rows]:
    counts = torch.randint(0, most + 1, (batch * heads,))
    counts[0] = 0  # a head that keeps nothing
    ends = counts.cumsum(0)
    begin, end = ((x).int().view(batch, heads) for x in (ends - counts, ends))
    keys, values = torch.randn(2, int(ends[-1]), dim).to(dtype)
    return SimpleNamespace(begin=begin, end=end), Rows("16", keys, values, None, dim, dim, dtype)


def by_the_op(
    query: Tensor, layer: Any, rows: Rows, tail: Any, mask: Tensor | None, **options: Any
) -> Tensor:
    pairs = rows.keys, rows.values, layer.begin, layer.end
    coded: dict[str, Any] = {"pairs": rows.pairs, "scales": rows.scales, "bias": rows.bias}
    output: Tensor = ops.ragged_attention(query, *pairs, *tail, mask, **coded, **options)
    return output


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairs", ["16", "k8v8", "k4v4"])
@pytest.mark.parametrize(
    ("batch", "heads", "group", "most", "tail", "queries", "dim", "dtype"),
    [
        (1, 2, 3, 50, 40, 40, 32, torch.float32),
        (2, 3, 2, 70, 90, 40, 64, torch.float32),
        (3, 1, 1, 1, 33, 1, 32, torch.float32),
        (1, 3, 3, 300, 64, 64, 64, torch.bfloat16),
        (2, 2, 4, 100, 70, 33, 64, torch.float16),
    ],
)
def test_many_queries_attend_as_by_the_op(
    batch: int, heads: int, group: int, most: int, tail: int, queries: int,
    dim: int, dtype: torch.dtype, pairs: str, masked: bool,
) -> None:  # fmt: skip
    torch.manual_seed(most)
    layer, rows = layer_of(batch, heads, most, dim, dtype)
    bias = torch.randn(len(rows)).half()
    bias[: len(rows) // 3] = -torch.inf  # hides these
    rows = replace(rows, bias=bias)
    rows = rows if pairs == "16" else rows.in_format(pairs)
    query = torch.randn(batch, heads * group, queries, dim).to(dtype)
    last = tuple(torch.randn(2, batch, heads, tail, dim).to(dtype))
    mask = None
    if masked:
        place = torch.arange(tail)
        mask = (place <= place[tail - queries :, None])[None, None].repeat(batch, 1, 1, 1)
        mask[-1, :, :, :3] = False  # padding, whose own queries see nothing
    found = many.attend_many(query, layer, rows, last, mask, 0.2)
    expected = by_the_op(query, layer, rows, last, mask, scaling=0.2, backend="torch")
    assert found.dtype == dtype and found.isfinite().all()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected.to(dtype), atol=tolerance, rtol=tolerance)


def test_they_are_served_so_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def seen(query: Tensor, *rest: Any) -> Tensor:
        calls.append(query.shape[2])
        return many.attend_many(query, *rest)

    monkeypatch.setattr(attention, "attend_many", seen)
    model, ids, press = tiny_model(), tokens(1, 120), MoERouterPress(0.5, router=None)
    caches = []
    for sizes in ((many.MANY, many.MANY - 1), (1,) * (2 * many.MANY - 1)):
        cache = DynamicCache()
        with torch.no_grad(), press(model):
            model(ids[:, :50], past_key_values=cache)
        begin = 50
        for size in sizes:
            with torch.no_grad():
                out = model(ids[:, begin : begin + size], past_key_values=cache).logits[:, -1]
            begin += size
        caches.append((cache, out))
    assert calls == [many.MANY] * len(model.model.layers)
    torch.testing.assert_close(caches[0][1], caches[1][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changed", ["softcap", "sinks", "few", "dims", "dtype"])
def test_others_are_left_to_the_op(changed: str) -> None:
    _, rows = layer_of(1, 1, 9, 16, torch.float32)
    query, sinks = torch.randn(1, 1, many.MANY, 16), None
    assert many.is_served(query, rows, 0.0, None)
    if changed == "dims":
        rows = replace(rows, value_dim=8)
    if changed == "dtype":
        query = query.bfloat16()
    if changed == "few":
        query = query[:, :, 1:]
    if changed == "sinks":
        sinks = torch.zeros(1)
    assert not many.is_served(query, rows, 3.0 if changed == "softcap" else 0.0, sinks)

"""vLLM's kernels over heads of different lengths, against attention written out."""

import math
from types import SimpleNamespace

import pytest
import torch
from vllm_engine import BLOCK

from moekv.integrations.vllm.compaction import Kept
from moekv.integrations.vllm.heads import Compressed, HeadStep
from moekv.integrations.vllm.options import Gap
from moekv.integrations.vllm.pages import Pages

LAYERS, HEADS, GROUP, BLOCKS = 2, 3, 4, 40
needs_amx = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="no AMX tiles")


@pytest.mark.parametrize(
    ("isa", "dtype", "dim"),
    [
        ("vec", torch.float32, 64),
        ("vec", torch.bfloat16, 64),
        ("vec", torch.float16, 32),
        ("vec16", torch.float32, 80),
        ("vec16", torch.bfloat16, 80),
        pytest.param("amx", torch.bfloat16, 64, marks=needs_amx),
        pytest.param("amx", torch.bfloat16, 128, marks=needs_amx),
    ],
)
@pytest.mark.parametrize("queries", [1, 2, 45])
def test_heads_of_different_lengths(isa: str, dtype: torch.dtype, dim: int, queries: int) -> None:
    """One new token or several, beside a request that holds something else."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.zeros(LAYERS, BLOCKS, HEADS, BLOCK, 2 * dim, dtype=dtype)
    pages = Pages(list(whole), isa)
    every = torch.arange(len(whole.view(-1, BLOCK * 2 * dim)))
    keys, values = torch.randn(2, len(every) * BLOCK, dim, generator=generator).to(dtype)
    pages.write(every, keys, values)
    by_page = keys.view(-1, BLOCK, dim).double(), values.view(-1, BLOCK, dim).double()

    requests, tables, free = [], [], torch.randperm(BLOCKS, generator=generator)
    for i, (gap, rest) in enumerate([(Gap(3, 6), 7), (Gap(1, 3), 60)]):
        blocks, free = free[:12], free[12:]
        own = pages.of(blocks[gap.start : gap.full]).flatten()
        own = own[torch.randperm(len(own), generator=generator)]
        counts = torch.full((LAYERS, HEADS), gap.kept)
        counts[0, 0] += 1
        counts[1, 2] -= 1
        kept = torch.zeros(LAYERS, HEADS, gap.kept + 1, dtype=torch.int64)
        kept[torch.arange(gap.kept + 1) < counts[..., None]] = own
        rows = slice(i * queries, (i + 1) * queries)
        end = gap.full * BLOCK + rest + queries
        requests.append(Compressed(i, rows, end, blocks, gap, Kept(kept, counts)))
        behind = pages.of(blocks[gap.full :])
        tables.append((kept, counts, behind, rest + queries))
    attention = {
        "group": GROUP,
        "head_dim": dim,
        "dtype": dtype,
        "isa": isa,
        "kv_cache_dtype": "auto",
    }
    step = HeadStep.of(requests, pages, attention)
    impl = SimpleNamespace(scale=dim**-0.5, logits_soft_cap=0.0, kv_cache_dtype="auto")
    layer = SimpleNamespace(impl=impl, _k_scale_float=1.0, _v_scale_float=1.0)
    asked = torch.randn(2 * queries, HEADS * GROUP, dim, generator=generator).to(dtype)
    for index in range(LAYERS):
        output = torch.zeros_like(asked)
        step.attend(index, layer, asked, output)
        for request, (kept, counts, behind, new) in zip(requests, tables, strict=True):
            for head in range(HEADS):
                count = int(counts[index, head])
                own = torch.cat([kept[index, head, :count], behind[index, head]])
                length = count * BLOCK + new
                k, v = (x[own].flatten(0, 1)[:length] for x in by_page)
                heads = slice(head * GROUP, (head + 1) * GROUP)
                q = asked[request.rows, heads].double()
                scores = torch.einsum("qgd,td->gqt", q, k) * dim**-0.5
                later = torch.ones(queries, length).triu(length - queries + 1).bool()
                weights = scores.masked_fill(later, -math.inf).softmax(-1)
                expected = torch.einsum("gqt,td->qgd", weights, v)
                near = 1e-4 if dtype is torch.float32 else 2e-2
                torch.testing.assert_close(
                    output[request.rows, heads].double(), expected, atol=near, rtol=near
                )

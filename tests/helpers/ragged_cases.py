"""Inputs of ``ragged_attention``, and what it is to give.

Nothing of transformers: `make gpu-check` begins with this, and has seconds.
"""

import itertools
import math

import torch
from torch import Tensor

DTYPES = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def oracle(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    tail_keys: Tensor | None = None,
    tail_values: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
) -> Tensor:
    batch, num_query_heads, num_queries, _ = query.shape
    group = num_query_heads // begin.shape[1]
    output = torch.zeros(batch, num_queries, num_query_heads, values.shape[1], dtype=torch.float64)
    for b, head in itertools.product(range(batch), range(num_query_heads)):
        h = head // group
        rows = slice(int(begin[b, h]), int(end[b, h]))
        k, v = keys[rows].double(), values[rows].double()
        seen = torch.ones(num_queries, len(k), dtype=torch.bool)
        if tail_keys is not None:
            num_tail = tail_keys.shape[2]
            k = torch.cat([k, tail_keys[b, h].double()])
            v = torch.cat([v, tail_values[b, h].double()])
            tail = torch.ones(num_queries, num_tail, dtype=torch.bool).tril(num_tail - num_queries)
            if mask is not None:
                tail &= mask.expand(batch, num_query_heads, num_queries, num_tail)[b, head]
            seen = torch.cat([seen, tail], dim=1)
        scores = query[b, head].double() @ k.T * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores[:, : len(bias[rows])] += bias[rows].double()
            seen[:, : len(bias[rows])] &= bias[rows] > -math.inf
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].double().expand(num_queries, 1)], -1)
            shown = torch.cat([seen, torch.ones(num_queries, 1).bool()], -1)
        else:
            shown = seen
        probs = scores.masked_fill(~shown, -math.inf).softmax(-1)[:, : len(k)]
        probs[~seen.any(-1)] = 0.0
        for i in range(num_queries):  # what is not seen has no part in it, NaN included
            output[b, i, head] = probs[i, seen[i]] @ v[seen[i]]
    return output


def make_case(
    batch=1, heads=2, group=4, queries=1, dim=64, value_dim=None, tail=1, stored=700, seed=0, **_
):
    """Heads of random lengths, some empty, some sharing rows."""
    g = torch.Generator().manual_seed(seed)
    value_dim = value_dim or dim
    begin = torch.randint(0, stored + 1, (batch, heads), generator=g)
    length = torch.randint(0, stored + 1, (batch, heads), generator=g)
    end = torch.minimum(begin + length, torch.tensor(stored))
    if heads > 1:
        end[0, 0] = begin[0, 0]
    case = {
        "query": torch.randn(batch, heads * group, queries, dim, generator=g),
        "keys": torch.randn(stored, dim, generator=g),
        "values": torch.randn(stored, value_dim, generator=g),
        "begin": begin.int(),
        "end": end.int(),
    }
    if tail:
        case["tail_keys"] = torch.randn(batch, heads, tail, dim, generator=g)
        case["tail_values"] = torch.randn(batch, heads, tail, value_dim, generator=g)
    return case


def cast(case, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.items()}


CASES = {
    "decode": {"heads": 8, "group": 4, "dim": 128, "tail": 5, "stored": 3000},
    "three heads of three": {"batch": 2, "heads": 3, "group": 3},
    "no tail": {"tail": 0, "dim": 96, "group": 7, "queries": 2},
    "nothing stored": {"stored": 0, "tail": 9, "queries": 9, "group": 1},
    "odd dims": {"dim": 7, "value_dim": 5, "queries": 3, "tail": 3},
    "wide values": {"dim": 80, "value_dim": 256, "group": 1, "batch": 3},
    "one dim": {"dim": 1, "group": 5},
    "many queries": {"batch": 2, "queries": 33, "tail": 70, "group": 5},
    "a long tail": {"group": 3, "tail": 200, "stored": 300, "dim": 48, "value_dim": 112},
    "a tile that all queries but one see whole": {"queries": 3, "tail": 65},
    "one of all": {"heads": 1, "group": 1, "stored": 1},
}

"""Validation of the arguments of ops on stored rows; see ``checks``."""

import torch
from torch import Tensor

from moekv.ops.expect import MOST, Expect, dtype_name
from moekv.ops.formats import MAX_DIM, MAX_FOLD_QUERIES, PAIRS, PairLayout, pair_layout

_MOST_ROWS = MOST - 65535
"""Stored rows and tail of ``ragged_attention``, whose kernels step beyond the last."""


def _format(expect: Expect, pairs: str, quantised: bool) -> None:
    formats = PAIRS[1:] if quantised else PAIRS
    expect(pairs in formats, "pairs to be one of {}, got {!r}", ", ".join(formats), pairs)


def _layout(expect: Expect, pairs: str, head_dim: int, value_dim: int) -> PairLayout:
    for name, dim, bits in (("keys", head_dim, pairs[1]), ("values", value_dim, pairs[3])):
        in_range = 1 <= dim <= MAX_DIM
        expect(in_range, "head dims of 1 to {}, got {} for {}", MAX_DIM, dim, name)
        is_whole = bits == "8" or dim % 2 == 0
        expect(is_whole, "an even head dim of {} in 4 bits, got {}", name, dim)
    return pair_layout(pairs, head_dim, value_dim)


def quantize_pairs(keys: Tensor, values: Tensor, pairs: str) -> None:
    """Check the arguments of ``quantize_pairs``."""
    expect = Expect("quantize_pairs", keys)
    expect.floating("keys", keys)
    expect.rank("keys", keys, 2, "[num_pairs, head_dim]")
    expect.tensor("values", values, keys.dtype, [keys.shape[0], "value_dim"])
    _format(expect, pairs, quantised=True)
    _layout(expect, pairs, keys.shape[1], values.shape[1])


def dequantize_pairs(
    key_codes: Tensor,
    value_codes: Tensor,
    scales: Tensor,
    pairs: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
) -> None:
    """Check the arguments of ``dequantize_pairs``."""
    expect = Expect("dequantize_pairs", key_codes)
    _format(expect, pairs, quantised=True)
    layout = _layout(expect, pairs, head_dim, value_dim)
    expect.tensor("key_codes", key_codes, torch.uint8, ["num_pairs", layout.key_codes])
    num_pairs = key_codes.shape[0]
    expect.tensor("value_codes", value_codes, torch.uint8, [num_pairs, layout.value_codes])
    expect.tensor("scales", scales, torch.float16, [num_pairs, layout.num_scales])
    expect.floating_dtype("dtype", dtype)


def fold_pairs(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor,
    start: Tensor | None,
    scaling: float,
    softcap: float,
    gate: float,
    least: float,
) -> None:
    """Check the arguments of ``fold_pairs``."""
    expect = Expect("fold_pairs", queries)
    expect.floating("queries", queries)
    expect.rank("queries", queries, 4, "[batch, num_query_heads, num_queries, head_dim]")
    expect.rank("keys", keys, 4, "[batch, num_kv_heads, num_keys, head_dim]")
    expect.rank("values", values, 4, "[batch, num_kv_heads, num_keys, value_dim]")
    batch, num_query_heads, num_queries, key_dim = queries.shape
    _, num_kv_heads, num_keys, _ = keys.shape
    value_dim = values.shape[3]
    expect.tensor("keys", keys, queries.dtype, [batch, "num_kv_heads", "num_keys", key_dim])
    expect.tensor("values", values, queries.dtype, [batch, num_kv_heads, num_keys, "value_dim"])
    expect(
        num_kv_heads >= 1 and num_query_heads >= 1 and num_query_heads % num_kv_heads == 0,
        "num_query_heads to be a multiple of num_kv_heads = {}, got {}",
        num_kv_heads,
        num_query_heads,
    )
    expect(
        1 <= key_dim <= MAX_DIM and 1 <= value_dim <= MAX_DIM,
        "head dims of 1 to {}, got {} for keys and {} for values",
        MAX_DIM,
        key_dim,
        value_dim,
    )
    asked = num_query_heads // num_kv_heads * num_queries
    expect(
        1 <= asked <= MAX_FOLD_QUERIES,
        "1 to {} queries of each KV head, got {}",
        MAX_FOLD_QUERIES,
        asked,
    )
    expect.most("positions", num_keys)
    expect.logits(scaling, softcap)
    expect(0 <= gate <= 1, "a gate between 0 and 1, got {}", gate)
    expect(0 <= least <= 1, "least between 0 and 1, got {}", least)
    expect.rank("indices", indices, 1, "[num_kept]")
    expect.tensor("indices", indices, torch.int32, ["num_kept"])
    expect.rank("offsets", offsets, 1, "[batch * num_kv_heads + 1]")
    expect.tensor("offsets", offsets, torch.int32, [batch * num_kv_heads + 1])
    expect.tensor("start", start, torch.int32, [batch])


def _stored(
    expect: Expect, query: Tensor, keys: Tensor, values: Tensor, scales: Tensor | None, pairs: str
) -> int:
    """Check the stored rows of ``ragged_attention``, and give the channels of a value."""
    key_dim, value_dim = query.shape[3], values.shape[1]
    _format(expect, pairs, quantised=False)
    if pairs == "16":
        expect(scales is None, "scales only with quantised pairs")
        expect.tensor("keys", keys, query.dtype, ["num_stored", key_dim])
        expect.tensor("values", values, query.dtype, [keys.shape[0], "value_dim"])
        return value_dim
    value_dim = value_dim * 8 // int(pairs[3])
    layout = _layout(expect, pairs, key_dim, value_dim)
    expect.tensor("keys", keys, torch.uint8, ["num_stored", layout.key_codes])
    expect.tensor("values", values, torch.uint8, [keys.shape[0], layout.value_codes])
    if scales is None:
        expect(False, "scales with quantised pairs, got none")
    expect.tensor("scales", scales, torch.float16, [keys.shape[0], layout.num_scales])
    return value_dim


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    tail_keys: Tensor | None,
    tail_values: Tensor | None,
    mask: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float,
    pairs: str,
) -> None:
    """Check the arguments of ``ragged_attention``."""
    expect = Expect("ragged_attention", query)
    expect.floating("query", query)
    expect.rank("query", query, 4, "[batch, num_query_heads, num_queries, head_dim]")
    expect.rank("keys", keys, 2, "[num_stored, head_dim]")
    expect.rank("values", values, 2, "[num_stored, value_dim]")
    expect.rank("begin", begin, 2, "[batch, num_kv_heads]")
    batch, num_query_heads, num_queries, key_dim = query.shape
    num_stored = keys.shape[0]
    num_kv_heads = begin.shape[1]
    value_dim = _stored(expect, query, keys, values, scales, pairs)
    expect.tensor("bias", bias, torch.float16, [num_stored])
    expect.tensor("sinks", sinks, torch.float32, [num_query_heads])
    num_tail = tail_keys.shape[2] if tail_keys is not None and tail_keys.dim() == 4 else 0
    expect(
        num_stored <= _MOST_ROWS - num_tail,
        "at most {} stored rows and tail positions, got {} and {}",
        _MOST_ROWS,
        num_stored,
        num_tail,
    )
    expect.logits(scaling, softcap)
    expect(
        begin.shape[0] == batch and num_kv_heads >= 1 and num_query_heads % num_kv_heads == 0,
        "begin [{}, num_kv_heads], num_kv_heads dividing {}, got {}",
        batch,
        num_query_heads,
        list(begin.shape),
    )
    expect(
        end.shape == begin.shape,
        "end like begin {}, got {}",
        list(begin.shape),
        list(end.shape),
    )
    for name, tensor in (("begin", begin), ("end", end)):
        if tensor.dtype != torch.int32:
            expect(False, "{} of dtype int32, got {}", name, dtype_name(tensor.dtype))
        expect.device(name, tensor)
    expect(
        (tail_keys is None) == (tail_values is None),
        "tail_keys and tail_values together, got one of them",
    )
    expect(mask is None or tail_keys is not None, "mask only with a tail")
    if tail_keys is None:
        return
    expect.rank("tail_keys", tail_keys, 4, "[batch, num_kv_heads, num_tail, head_dim]")
    heads = [batch, num_kv_heads, num_tail]
    expect.tensor("tail_keys", tail_keys, query.dtype, [*heads, key_dim])
    expect.tensor("tail_values", tail_values, query.dtype, [*heads, value_dim])
    expect(
        num_tail >= num_queries,
        "a tail of at least the {} queries themselves, got {} positions",
        num_queries,
        num_tail,
    )
    if mask is not None:
        expect.rank("mask", mask, 4, "[batch, num_query_heads, num_queries, num_tail]")
        expect.tensor("mask", mask, torch.bool, ["batch", "heads", "queries", "tail"])
        whole = [batch, num_query_heads, num_queries, num_tail]
        expect(
            all(size in (1, full) for size, full in zip(mask.shape, whole, strict=True)),
            "mask broadcastable to {}, got {}",
            whole,
            list(mask.shape),
        )

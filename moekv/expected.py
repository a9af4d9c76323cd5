"""The attention that pairs can expect: each token's own query, asked again behind the text.

What follows a text quotes it, goes on from it and asks for what it says. A token that comes again
asks as it did the first time, so that nothing has to be read twice to know what it will look at:
its query, turned to the position behind the last token, looks at the pair of the token itself and
at those behind it, which say what came next. Only that near part of the attention is needed, and
its share in the whole, for which a sample of all keys is enough: time and memory grow linearly.

KVzip (Kim et al., 2025) reads the context again to see these looks; expected attention (Devoto et
al., 2025) takes the distribution of the queries for the queries themselves.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

REACH = 4
"""Pairs behind its own that a query is asked about."""

SAMPLES = 64
"""Keys that stand for all in the softmax's sum, beside the first ones."""

SINKS = 4
"""First keys, which take much of every attention, and are not sampled."""

_TILE = 512  # queries in memory at a time: their logits fit the caches
_BLOCK = 32  # queries of one matrix product with the keys near them
_LEAST = 1e-36  # square of an attention that nothing looks at; its root is a normal number


def expected_attention(
    queries: Tensor, keys: Tensor, *, scaling: float, softcap: float = 0.0
) -> Tensor:
    """Rate the pairs of the last tokens by what their neighbours' queries would look at.

    Parameters
    ----------
    queries : Tensor [Hq, N, D]
        Of the last N tokens of one row, all rotated to the position behind the last token.
    keys : Tensor [H, T, D]
        Rotated, of the whole row.
    scaling : float
        Of the attention's logits.
    softcap : float
        ``softcap * tanh(logits / softcap)``; 0: none.

    Returns
    -------
    Tensor [H, N], float32
        Of each of the last N pairs the log of the root of the summed squares of the attention that
        it gets from its own token and from the ``REACH`` before it (as far as they are among the
        N); of the query heads of a group the mean of the squares.
    """
    num_heads, num_keys, _ = keys.shape
    num_queries = queries.shape[1]
    queries = queries.view(num_heads, -1, num_queries, queries.shape[2])
    sample, weight = _sample(keys)
    sampled = sample is not keys
    near = functional.pad(keys[:, num_keys - num_queries :], (0, 0, 0, REACH + _BLOCK))
    seen = keys.new_zeros(num_heads, num_queries + REACH, dtype=torch.float32)

    def logits(products: Tensor) -> Tensor:
        scaled = products.float().mul_(scaling)
        return scaled.div_(softcap).tanh_().mul_(softcap) if softcap else scaled

    for begin in range(0, num_queries, _TILE):
        tile = queries[:, :, begin : begin + _TILE]
        count = tile.shape[2]
        total = logits(torch.matmul(tile.flatten(1, 2), sample.mT)).add_(weight)
        top = total.amax(-1)
        total = total.sub_(top[..., None]).exp_().sum(-1).log_().add_(top)
        total = total.view(num_heads, -1, count)
        band = logits(_band(tile, near[:, begin:]))
        # Keys beyond the end are not there.
        left = num_queries - begin - torch.arange(count, device=keys.device)
        beyond = torch.arange(REACH + 1, device=keys.device) >= left[:, None]
        band.masked_fill_(beyond, -torch.inf)
        if sampled:  # which may have missed just these
            total = torch.logaddexp(total, band.logsumexp(-1))
        square = (band - total[..., None]).mul_(2).exp_().mean(1)
        for step in range(REACH + 1):
            seen[:, begin + step : begin + step + count] += square[..., step]
    return seen[:, :num_queries].clamp_(min=_LEAST).log_().mul_(0.5)


def _sample(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [H, S, D] that stand for all, and the log [S] of how many each stands for.

    One from every one of ``SAMPLES`` equal parts of the row, at places that repeat nowhere, so that
    no rhythm of the text is in step with them.
    """
    num_keys, device = keys.shape[1], keys.device
    if num_keys <= SINKS + SAMPLES:
        return keys, torch.zeros(num_keys, device=device)
    part = torch.arange(SAMPLES, device=device)
    size = (num_keys - SINKS) / SAMPLES
    golden = part * 0.6180339887498949 % 1
    index = SINKS + ((part + golden) * size).long().clamp(max=num_keys - SINKS - 1)
    index = torch.cat([torch.arange(SINKS, device=device), index])
    weight = torch.full((len(index),), math.log(size), device=device)
    weight[:SINKS] = 0
    return keys.index_select(1, index), weight


def _band(queries: Tensor, keys: Tensor) -> Tensor:
    """Products [H, G, n, REACH + 1] of each query with the key at its place and those behind it.

    Parameters
    ----------
    queries : Tensor [H, G, n, D]
    keys : Tensor [H, at least n + REACH + _BLOCK, D]
    """
    num_heads, num_groups, count, dim = queries.shape
    num_blocks = -(-count // _BLOCK)
    width = _BLOCK + REACH
    queries = functional.pad(queries, (0, 0, 0, num_blocks * _BLOCK - count))
    queries = queries.view(num_heads, num_groups, num_blocks, _BLOCK, dim).transpose(1, 2)
    keys = keys[:, : num_blocks * _BLOCK + REACH].unfold(1, width, _BLOCK)  # [H, blocks, D, width]
    products = torch.matmul(queries.flatten(2, 3), keys)  # [H, blocks, G * _BLOCK, width]
    products = products.contiguous().view(num_heads, num_blocks, num_groups, _BLOCK, width)
    # Row i of a block begins at its column i.
    strides = (*products.stride()[:3], width + 1, 1)
    band = products.as_strided((*products.shape[:4], REACH + 1), strides)
    return band.transpose(1, 2).flatten(2, 3)[:, :, :count]

"""The attention that pairs can expect: each token's own query, asked again behind the text.

What follows a text quotes it, goes on from it and asks for what it says. A token that comes again
asks as it did the first time, so that nothing has to be read twice to know what it will look at:
its query, turned to the position behind the last token, looks at the pair of the token itself and
at those behind it, which say what came next. Only that near part of the attention is needed, and
its share in the whole, for which a sample of all keys is enough: time and memory grow linearly.

KVzip (Kim et al., 2025) reads the context again to see these looks; expected attention (Devoto et
al., 2025) takes the distribution of the queries for the queries themselves.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

REACH = 4
"""Pairs behind its own that a query is asked about."""

SAMPLES = 64
"""Keys that stand for all in the softmax's sum, beside the first ones."""

SINKS = 4
"""First keys, which take much of every attention, and are not sampled."""

_BLOCK = 32  # queries of one matrix product with the keys near them
_TILE = 32 * _BLOCK  # queries at a time: their logits are near the size of a cache
_LEAST = 1e-36  # square of an attention that nothing looks at; its root is a normal number


def expected_attention(
    queries: Tensor, keys: Tensor, *, scaling: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """Rate the pairs of the last tokens by what their neighbours' queries would look at.

    Parameters
    ----------
    queries : Tensor [Hq, N, D]
        Of the last N tokens of one row, in any layout; all rotated to the position behind the last
        token, or none, where the keys are turned back by that position: products alone count.
    keys : Tensor [H, T, D]
        Rotated, of the whole row.
    scaling : float
        Of the attention's logits, as far as it is not in the keys.
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
    queries = queries.view(num_heads, len(queries) // num_heads, *queries.shape[1:])
    index, weight = _sample(num_keys, keys.device)
    sample = keys.index_select(1, index)
    near = keys[:, num_keys - num_queries :]
    # What each step behind a query sees has a row; a view of them, each begun one place later.
    length = num_queries + _BLOCK + REACH
    seen = keys.new_zeros((REACH + 1, num_heads, length), dtype=torch.float32)
    shifted = seen.as_strided(
        (REACH + 1, num_heads, length - REACH), (num_heads * length + 1, length, 1)
    )

    def logits(products: Tensor) -> Tensor:
        scaled = products if scaling == 1 else products.mul_(scaling)
        return scaled.div_(softcap).tanh_().mul_(softcap) if softcap else scaled

    for begin in range(0, num_queries, _TILE):
        tile = _blocks(queries[:, :, begin : begin + _TILE])
        blocks = tile.shape[1:4]  # the order in which the last dimension below has the queries
        # The sample comes before the queries: sums over rows are faster than sums within them.
        all_keys = logits(torch.matmul(sample, tile.flatten(1, 3).mT).float())
        band = logits(_band(tile, near[:, begin:]))
        if begin + _TILE + REACH > num_queries:  # keys beyond the end are not there
            place = torch.arange(begin, begin + blocks[0] * _BLOCK, device=keys.device)
            place = place + torch.arange(REACH + 1, device=keys.device)[:, None]
            beyond = (place >= num_queries).view(REACH + 1, 1, -1, 1, _BLOCK)
            band.view(REACH + 1, num_heads, *blocks).masked_fill_(beyond, -torch.inf)
        most = functools.reduce(torch.maximum, band, all_keys.amax(1))
        band.sub_(most).exp_()
        total = torch.matmul(weight, all_keys.sub_(most[:, None]).exp_())
        if len(index) < num_keys:  # the sample may have missed just those of the band
            total += band.sum(0)
        square = band.div_(total).square_().view(REACH + 1, num_heads, *blocks)
        square = square.mean(3).flatten(2)
        shifted[:, :, begin : begin + square.shape[2]] = square
    return seen.sum(0)[:, :num_queries].clamp_(min=_LEAST).log_().mul_(0.5)


@functools.lru_cache(maxsize=8)  # the layers of a forward have the same
def _sample(num_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the keys that stand for all, [S], and how many each stands for: [S], float32.

    One from every one of ``SAMPLES`` equal parts of the row, at places that repeat nowhere, so that
    no rhythm of the text is in step with them.
    """
    if num_keys <= SINKS + SAMPLES:
        return torch.arange(num_keys, device=device), torch.ones(num_keys, device=device)
    part = torch.arange(SAMPLES, device=device)
    size = (num_keys - SINKS) / SAMPLES
    golden = part * 0.6180339887498949 % 1
    index = SINKS + ((part + golden) * size).long().clamp(max=num_keys - SINKS - 1)
    index = torch.cat([torch.arange(SINKS, device=device), index])
    weight = torch.full((len(index),), size, device=device)
    weight[:SINKS] = 1
    return index, weight


def _blocks(queries: Tensor) -> Tensor:
    """Copy [H, G, n, D] to [H, blocks, G, _BLOCK, D], with zeros behind the last query."""
    rest = -queries.shape[2] % _BLOCK
    if rest:
        queries = functional.pad(queries, (0, 0, 0, rest))
    num_heads, num_groups, _, dim = queries.shape
    return queries.view(num_heads, num_groups, -1, _BLOCK, dim).transpose(1, 2).contiguous()


def _band(queries: Tensor, keys: Tensor) -> Tensor:
    """Products of each query with the key at its place and those behind it.

    Parameters
    ----------
    queries : Tensor [H, blocks, G, _BLOCK, D]
    keys : Tensor [H, any number, D]
        Those beyond the end are 0.

    Returns
    -------
    Tensor [REACH + 1, H, blocks * G * _BLOCK], float32
    """
    num_heads, num_blocks, num_groups = queries.shape[:3]
    width = _BLOCK + REACH
    missing = num_blocks * _BLOCK + REACH - keys.shape[1]
    if missing > 0:
        keys = functional.pad(keys, (0, 0, 0, missing))
    keys = keys.unfold(1, width, _BLOCK)[:, :num_blocks]  # [H, blocks, D, width]
    keys = keys.mT.flatten(0, 1).mT
    products = torch.bmm(queries.flatten(2, 3).flatten(0, 1), keys)
    # Row i of a block begins at its column i.
    rows = num_heads * num_blocks * num_groups
    band = products.as_strided(
        (REACH + 1, rows, _BLOCK), (1, _BLOCK * width, width + 1), products.storage_offset()
    )
    return band.contiguous().float().view(REACH + 1, num_heads, -1)

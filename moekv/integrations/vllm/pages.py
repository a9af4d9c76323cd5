"""Reads and writes pairs in vLLM's blocks, whatever the layout that its kernels give keys.

A page is one KV head's part of a block of one layer: ``block_size`` keys and as many values. A
block of a layer is a page for each head, one after the other, and all layers may share one storage:
then any layer's attention may read any page.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops


@lru_cache
def page_layout(isa: str, block_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Determine where vLLM's kernels put each number of a page.

    The kernels write pages of numbers that encode their origin, as many pages as it takes for the
    dtype to hold these exactly.

    Parameters
    ----------
    isa : str
        Of vLLM's attention.
    block_size, head_dim : int
    dtype : torch.dtype

    Returns
    -------
    keys, values : Tensor [block_size, head_dim], int64
        Places in a page.

    Raises
    ------
    RuntimeError
        A page does not hold each number once.
    """
    count = block_size * head_dim
    numbers = torch.arange(2 * count).view(2, block_size, 1, head_dim)
    found = torch.zeros(2 * count, dtype=torch.int64)
    for digit in range(3):  # of 7 bits, which every dtype holds
        digits = (numbers >> 7 * digit & 127).to(dtype)
        page = torch.zeros(1, 1, 2 * block_size, head_dim, dtype=dtype)
        keys, values = page.chunk(2, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(
            digits[0], digits[1], keys, values, torch.arange(block_size), isa
        )
        found += page.flatten().long() << 7 * digit
    if not torch.equal(found.sort().values, numbers.flatten()):
        raise RuntimeError(
            f"moekv: expected pages that hold each number once, got others for {isa} attention, "
            f"blocks of {block_size}, heads of {head_dim} channels, {dtype}"
        )
    places = found.argsort().view(2, block_size, head_dim)
    return places[0], places[1]


def share_storage(caches: Sequence[Tensor]) -> bool:
    """Return whether caches are whole pages of one storage."""
    storage = caches[0].untyped_storage().data_ptr()
    return all(
        cache.untyped_storage().data_ptr() == storage
        and cache.is_contiguous()
        and cache.storage_offset() % (cache.shape[2] * cache.shape[3]) == 0
        for cache in caches
    )


class Pages:
    """The pages of some layers.

    Parameters
    ----------
    caches : sequence of L Tensor [B, H, block_size, 2 * D]
        vLLM's KV caches of the layers, views of one storage.
    isa : str
        Of vLLM's attention.

    Attributes
    ----------
    all : Tensor [N, 1, 2 * block_size, D]
        As vLLM's attention takes them.

    Raises
    ------
    ValueError
        The caches do not share a storage.
    """

    def __init__(self, caches: Sequence[Tensor], isa: str) -> None:
        if not share_storage(caches):
            raise ValueError(
                "moekv: expected one storage for the KV caches of all layers, got several: "
                "budget 'uniform' does without"
            )
        first = caches[0]
        _, self.num_heads, self.block_size, twice = first.shape
        self.isa, self.head_dim = isa, twice // 2
        size = self.block_size * twice
        storage = first.untyped_storage()
        flat = torch.empty(0, dtype=first.dtype).set_(storage)
        flat = flat[: len(flat) // size * size]
        self._pages = flat.view(-1, size)
        self.all = flat.view(-1, 1, 2 * self.block_size, self.head_dim)
        self.first = torch.tensor([x.storage_offset() // size for x in caches])
        """Number of each layer's first page: int64 [L]."""
        self._keys, self._values = page_layout(isa, self.block_size, self.head_dim, first.dtype)

    def of(self, blocks: Tensor) -> Tensor:
        """Give the numbers of the pages of some blocks [n]: int64 [L, H, n]."""
        heads = torch.arange(self.num_heads)[:, None]
        return self.first[:, None, None] + blocks.long() * self.num_heads + heads

    def read(self, pages: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Read pairs.

        Parameters
        ----------
        pages, places : Tensor [...], int64
            The page of each pair, and where in it.

        Returns
        -------
        keys, values : Tensor [..., D]
        """
        begin = (pages * self._pages.shape[1])[..., None]
        flat = self._pages.view(-1)
        return flat[begin + self._keys[places]], flat[begin + self._values[places]]

    def read_all(self, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Read the first pairs of some pages: [..., n] to keys and values [..., length, D]."""
        whole = self._pages[pages]
        shape = (*pages.shape[:-1], -1, self.head_dim)
        keys = whole[..., self._keys.flatten()].view(shape)
        values = whole[..., self._values.flatten()].view(shape)
        return keys[..., :length, :], values[..., :length, :]

    def write(self, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill pages [n] with pairs [n * block_size, D]."""
        slots = pages[:, None] * self.block_size + torch.arange(self.block_size)
        to_keys, to_values = self.all.chunk(2, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(
            keys[:, None], values[:, None], to_keys, to_values, slots.flatten(), self.isa
        )

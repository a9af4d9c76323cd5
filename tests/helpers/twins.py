"""A ragged layer beside the dense one that it is to equal."""

import math

import torch
from torch import Tensor, nn

from moekv.budget import Kept
from moekv.cache import attention
from moekv.cache.ragged import RaggedLayer

HEADS, GROUP, DIM, VALUE_DIM = 2, 3, 8, 5


class Twin:
    """A dense layer beside a ragged one: nothing evicted, evicted pairs masked."""

    def __init__(self, batch: int, length: int, seed: int, backend: str = "auto") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.keys, self.values = self.pairs(batch, length)
        self.kept = torch.rand(batch, HEADS, length, generator=self.generator) < 0.4
        self.kept[..., 0] = True
        self.visible = torch.ones(batch, length, dtype=torch.bool)  # by the 2-D attention mask
        self.context = length
        kept = Kept.from_mask(self.kept)
        self.layer = RaggedLayer.compress(self.keys, self.values, kept, backend=backend)

    def pairs(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        return tuple(
            torch.randn(batch, HEADS, length, dim, generator=self.generator)
            for dim in (DIM, VALUE_DIM)
        )

    def append(self, count: int, hide: bool) -> None:
        """Append tokens, attend with their queries, and compare."""
        batch = len(self.keys)
        keys, values = self.pairs(batch, count)
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        self.kept = nn.functional.pad(self.kept, (0, count), value=True)
        seen = torch.ones(batch, count, dtype=torch.bool)
        seen[0, 0] = not hide
        self.visible = torch.cat([self.visible, seen], dim=1)
        query = torch.randn(batch, HEADS * GROUP, count, DIM, generator=self.generator)
        pairs, _ = self.layer.update(keys, values)
        mask = self.visible if not self.visible.all() else None
        got = attention.attend(nn.Identity(), query, pairs, mask)
        assert self.layer.get_seq_length() == self.keys.shape[2]
        torch.testing.assert_close(got, self.attend(query))

    def attend(self, query: Tensor) -> Tensor:
        length, count = self.keys.shape[2], query.shape[2]
        causal = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        mask = causal & (self.kept & self.visible[:, None])[:, :, None]
        keys, values, mask = (
            x.repeat_interleave(GROUP, dim=1) for x in (self.keys, self.values, mask)
        )
        scores = (query @ keys.mT / math.sqrt(DIM)).masked_fill(~mask, -math.inf)
        return (scores.softmax(-1) @ values).transpose(1, 2)

    def crop(self, count: int) -> None:
        length = max(self.keys.shape[2] - count, self.context)
        self.layer.crop(length)
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.kept, self.visible = self.kept[..., :length], self.visible[:, :length]

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows) % len(self.keys)
        self.layer.batch_select_indices(index)
        for name in ("keys", "values", "kept", "visible"):
            setattr(self, name, getattr(self, name)[index])

    def repeat(self, times: int) -> None:
        self.layer.batch_repeat_interleave(times)
        for name in ("keys", "values", "kept", "visible"):
            setattr(self, name, getattr(self, name).repeat_interleave(times, dim=0))

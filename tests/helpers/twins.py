"""A ragged layer beside the dense one that it is to equal."""

import itertools
import math

import torch
from torch import Tensor, nn

from moekv import ops
from moekv.budget import Kept
from moekv.cache import attention
from moekv.cache.ragged import RaggedLayer

HEADS, GROUP, DIM, VALUE_DIM = 2, 3, 8, 6


def rounded(keys: Tensor, values: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    """Pairs [..., D] and [..., Dv] as they are read once they have been quantised."""
    if pairs == "16":
        return keys, values
    flat = [x.flatten(0, -2) for x in (keys, values)]
    codes = ops.quantize_pairs(*flat, pairs=pairs)
    sizes = {"head_dim": keys.shape[-1], "value_dim": values.shape[-1], "dtype": keys.dtype}
    read = ops.dequantize_pairs(*codes, pairs=pairs, **sizes)
    return read[0].view_as(keys), read[1].view_as(values)


class Twin:
    """A dense layer beside a ragged one: nothing evicted, evicted pairs masked."""

    def __init__(
        self, batch: int, length: int, seed: int, backend: str = "auto", pairs: str = "16"
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.keys, self.values = self.pairs(batch, length)
        self.kept = torch.rand(batch, HEADS, length, generator=self.generator) < 0.4
        self.kept[..., 0] = True
        self.visible = torch.ones(batch, length, dtype=torch.bool)  # by the 2-D attention mask
        self.context = length
        kept = Kept.from_mask(self.kept)
        self.layer = RaggedLayer.compress(
            self.keys, self.values, kept, pairs=pairs, backend=backend
        )
        self.format = pairs
        self.keys, self.values = rounded(self.keys, self.values, pairs)

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

    def recompress(self, share: float) -> None:
        """Have random pairs leave; the tail is stored as the rest."""
        if not self.visible.all():
            return  # what is hidden would be, too
        longest = int(self.kept.sum(-1).max())
        kept = torch.zeros(*self.kept.shape[:2], longest, dtype=torch.bool)
        draw = torch.rand(self.kept.shape, generator=self.generator) < share
        for b, h in itertools.product(*map(range, self.kept.shape[:2])):
            places = self.kept[b, h].nonzero()[:, 0]
            draw[b, h, places[0]] = True
            kept[b, h, longest - len(places) :] = draw[b, h, places]
        tail = slice(self.context, None)
        read = rounded(self.keys[:, :, tail], self.values[:, :, tail], self.format)
        for pairs, new in zip((self.keys, self.values), read, strict=True):
            pairs[:, :, tail] = new
        self.kept, self.context = self.kept & draw, self.kept.shape[2]
        self.layer.recompress(Kept.from_mask(kept), self.format)

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows) % len(self.keys)
        self.layer.batch_select_indices(index)
        for name in ("keys", "values", "kept", "visible"):
            setattr(self, name, getattr(self, name)[index])

    def repeat(self, times: int) -> None:
        self.layer.batch_repeat_interleave(times)
        for name in ("keys", "values", "kept", "visible"):
            setattr(self, name, getattr(self, name).repeat_interleave(times, dim=0))

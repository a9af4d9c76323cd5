"""What every compressed layer promises, whatever its kind: beside lists of what a head holds."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import rounded

from moekv import ops
from moekv.budget import Kept
from moekv.cache.growing import GrowingLayer
from moekv.cache.layer import CompressedLayer
from moekv.cache.parts import put_together, take_apart
from moekv.cache.ragged import RaggedLayer

HEADS, DIM, VALUE_DIM = 2, 8, 6

# A kind of layer, the format of its pairs, and whether its heads have to be of one length.
KINDS: dict[str, tuple[type[Any], str, bool]] = {
    "dense": (GrowingLayer, "16", True),
    **{f"ragged, {pairs}": (RaggedLayer, pairs, False) for pairs in ops.PAIRS},
    **{f"biased, {pairs}": (RaggedLayer, pairs, False) for pairs in ops.PAIRS},
}


@dataclass(frozen=True)
class Pair:
    """A key and a value, whether they have been stored in the layer's format, and a bias."""

    key: Tensor
    value: Tensor
    stored: bool = False
    bias: float = 0.0

    def store(self, pairs: str) -> "Pair":
        if self.stored or pairs == "16":
            return self
        key, value = rounded(self.key[None], self.value[None], pairs)
        return Pair(key[0], value[0], stored=True, bias=self.bias)


class Life:
    """A layer, and what each head of each row should hold."""

    def __init__(self, kind: str, seed: int) -> None:
        self.random, self.kind = random.Random(seed), kind
        torch.manual_seed(seed)
        layer, self.format, self.even = KINDS[kind]
        batch, self.length = self.random.randint(1, 3), self.random.randint(2, 40)
        self.held: list[list[list[Pair]]] = [[[] for _ in range(HEADS)] for _ in range(batch)]
        keys, values = self.grow(self.length)
        more = {} if self.even else {"pairs": self.format}
        self.layer: CompressedLayer = layer.compress(keys, values, self.choose(), **more)
        if kind.startswith("biased"):
            self.weigh()
        self.context = self.length
        self.check()

    def weigh(self) -> None:
        """Give each stored pair a bias, as pairs have that others have joined."""
        heads = [head for row in self.held for head in row]
        biases = torch.rand(sum(map(len, heads))).half()
        self.layer.rows = replace(self.layer.rows, bias=biases)
        numbers = iter(biases.tolist())
        for head in heads:
            head[:] = [replace(pair, bias=next(numbers)) for pair in head]

    def grow(self, count: int) -> tuple[Tensor, Tensor]:
        """Give pairs of new tokens, [B, H, count, D] and [B, H, count, Dv], and note them."""
        keys = torch.randn(len(self.held), HEADS, count, DIM)
        values = torch.randn(len(self.held), HEADS, count, VALUE_DIM)
        for b, row in enumerate(self.held):
            for h, head in enumerate(row):
                head += map(Pair, keys[b, h], values[b, h])
        return keys, values

    def choose(self) -> Kept:
        """Have some pairs stay; a head of a ragged layer may lose all."""
        heads = [head for row in self.held for head in row]
        longest = max(map(len, heads))
        count = self.random.randint(1, longest) if self.even else None
        mask = torch.zeros(len(self.held), HEADS, longest, dtype=torch.bool)
        for number, head in enumerate(heads):
            n = self.random.randint(0, len(head)) if count is None else count
            stay = sorted(self.random.sample(range(len(head)), n))
            for place in stay:
                mask.view(-1, longest)[number, longest - len(head) + place] = True
            head[:] = [head[place].store(self.format) for place in stay]
        kept = Kept.from_mask(mask)
        return Kept(kept.indices, kept.offsets, kept.shape, per_head=count)

    def check(self) -> None:
        """Compare all that a layer says of itself."""
        keys, values = self.layer.held_pairs()
        bias = self.layer.padded()[2] if isinstance(self.layer, RaggedLayer) else None
        assert (bias is not None) == self.kind.startswith("biased")
        lengths = [[len(head) for head in row] for row in self.held]
        assert self.layer.get_seq_length() == self.length
        assert self.layer.head_lengths([0] * len(lengths)) == lengths
        assert self.layer.count_pairs([0] * len(lengths)) == [sum(row) for row in lengths]
        assert (self.layer.batch_size, self.layer.num_heads) == (len(lengths), HEADS)
        assert keys.shape[2] == values.shape[2] == max(map(max, lengths))
        for b, row in enumerate(self.held):
            for h, head in enumerate(row):
                if head:
                    own = keys[b, h, -len(head) :], values[b, h, -len(head) :]
                    assert torch.equal(own[0], torch.stack([pair.key for pair in head]))
                    assert torch.equal(own[1], torch.stack([pair.value for pair in head]))
                    if bias is not None:
                        assert bias[b, h, -len(head) :].tolist() == [pair.bias for pair in head]

    # -- what may happen to a layer ----------------------------------------------------------------

    def append(self) -> None:
        count = self.random.randint(1, 70)
        self.layer.update(*self.grow(count))
        self.length += count

    def crop(self) -> None:
        count = self.random.randint(0, self.length - self.context)
        self.layer.crop(self.length - count)
        self.length -= count
        for row in self.held:
            for head in row:
                del head[len(head) - count :]

    def refuse_to_crop(self) -> None:
        with pytest.raises(ValueError, match="cannot crop"):
            self.layer.crop(self.context - 1)

    def reorder(self) -> None:
        rows = [self.random.randrange(len(self.held)) for _ in self.held]
        self.layer.reorder_cache(torch.tensor(rows))
        self.held = [[list(head) for head in self.held[b]] for b in rows]

    def select(self) -> None:
        rows = sorted(self.random.sample(range(len(self.held)), max(1, len(self.held) - 1)))
        self.layer.batch_select_indices(torch.tensor(rows))
        self.held = [self.held[b] for b in rows]

    def repeat(self) -> None:
        self.layer.batch_repeat_interleave(2)
        self.held = [[list(head) for head in row] for row in self.held[:4] for _ in range(2)]
        if self.layer.batch_size > len(self.held):
            self.layer.batch_select_indices(torch.arange(len(self.held)))

    def recompress(self) -> None:
        self.layer.recompress(self.choose(), self.format)
        self.context = self.length

    def copy(self) -> None:
        old, self.layer = self.layer, copy.deepcopy(self.layer)
        old.update(
            torch.zeros(len(self.held), HEADS, 1, DIM),
            torch.zeros(len(self.held), HEADS, 1, VALUE_DIM),
        )

    def save(self) -> None:
        self.layer = put_together(*take_apart(self.layer, 0))


STEPS: list[Callable[[Life], None]] = [
    *(Life.append, Life.crop, Life.refuse_to_crop, Life.reorder, Life.select, Life.repeat),
    *(Life.recompress, Life.copy, Life.save),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_any_life_of_any_layer(kind: str, seed: int) -> None:
    life = Life(kind, seed)
    for _ in range(8):
        step = life.random.choice(STEPS)
        step(life)
        life.check()

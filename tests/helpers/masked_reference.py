"""The full cache beside a compressed one: nothing is evicted, what the other lacks is masked."""

import math
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from twins import rounded

from moekv.cache.ragged import RaggedLayer
from moekv.models.hooks import find_layers, is_sliding

_visible: dict[int, Tensor] = {}  # of each layer, [B, H, T] bool


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    assert mask is None
    groups, (count, length) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    causal = torch.ones(count, length).tril(length - count)
    if is_sliding(module):
        causal = causal.triu(length - count - module.sliding_window + 1)
    seen = _visible[module.layer_idx][:, :, None] & causal.bool()
    key, value, seen = (x.repeat_interleave(groups, 1) for x in (key, value, seen))
    scores = (query @ key.mT) * options["scaling"]
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
    return (weights @ value).transpose(1, 2), None


def show(layer: int, seen: Tensor) -> None:
    """Say which pairs [B, H, T] a layer of the reference sees from now on."""
    _visible[layer] = seen


# Masks are made only for attention functions that transformers knows.
ALL_ATTENTION_FUNCTIONS.register("masked_reference", _attend)


class Lockstep:
    """Feeds a model with a compressed cache and the reference, and compares.

    `padding` positions at the left of each row are no tokens. What is stored in fewer bits the
    reference holds as it is read.
    """

    def __init__(
        self,
        name: str = "llama",
        padding: tuple[int, ...] = (0,),
        cache: Cache | None = None,
        make: Callable[[str, str], Any] = tiny_model,
    ) -> None:
        self.model, self.full_model = make(name, "sdpa"), make(name, "masked_reference")
        self.cache, self.full = cache or DynamicCache(), DynamicCache()
        _, layers = find_layers(self.model)
        self.whole = [layer.layer_idx for layer in layers if not is_sliding(layer)]
        self.forward = self.model
        self.heads = self.model.config.get_text_config().num_key_value_heads
        self.padding = torch.tensor(padding)
        self.visible = [torch.ones(len(padding), self.heads, 0).bool() for _ in layers]
        self.length = 0

    def feed(self, input_ids: Tensor, shown: Tensor | None = None) -> Tensor:
        """Logits [B, Q, V] of new tokens, equal for both.

        These may be shown not all positions, [B, T] bool.
        """
        count = input_ids.shape[1]
        position = torch.arange(self.length, self.length + count)
        self.length += count
        real = position >= self.padding[:, None]
        for index, seen in enumerate(self.visible):
            new = real[:, None].expand(-1, self.heads, -1)
            self.visible[index] = _visible[index] = torch.cat([seen, new], dim=2)
            if shown is not None:
                _visible[index] = _visible[index] & shown[:, None]
        inputs = {
            "position_ids": (position - self.padding[:, None]).clamp(min=0),
            "cache_position": position,
        }
        mask = (torch.arange(self.length) >= self.padding[:, None]).long()
        if shown is not None:
            mask = mask * shown
        with torch.no_grad():
            got = self.forward(
                input_ids, past_key_values=self.cache, attention_mask=mask, **inputs
            ).logits
            expected = self.full_model(input_ids, past_key_values=self.full, **inputs).logits
        torch.testing.assert_close(got[real], expected[real], atol=2e-3, rtol=2e-3)
        self.see()
        return got

    def crop(self, count: int) -> None:
        """Forget the newest tokens."""
        self.length -= count
        self.cache.crop(-count)
        self.full.crop(self.length)
        self.visible = [seen[..., : self.length] for seen in self.visible]

    def select(self, rows: list[int], how: str = "reorder_cache") -> None:
        """Go on with other rows of the batch."""
        index = torch.tensor(rows)
        for cache in (self.cache, self.full):
            getattr(cache, how)(index)
        self.padding = self.padding[index]
        self.visible = [seen[index] for seen in self.visible]

    def repeat(self, times: int) -> None:
        """Repeat every row of the batch."""
        for cache in (self.cache, self.full):
            cache.batch_repeat_interleave(times)
        self.padding = self.padding.repeat_interleave(times)
        self.visible = [seen.repeat_interleave(times, dim=0) for seen in self.visible]

    def see(self) -> None:
        """Find out what the compressed cache lacks, pair by pair."""
        for index in self.whole:
            layer, full = self.cache.layers[index], self.full.layers[index]
            if not isinstance(layer, RaggedLayer) and layer.keys.shape[2] == self.length:
                continue
            before = self.visible[index]
            if isinstance(layer, RaggedLayer):
                keys, values, lengths = layer.to_dense()
                # The tail may have padding, which attention masks.
                padding = self.padding.clamp(max=self.length)
                lengths = lengths - (padding - layer.context_length).clamp(min=0)[:, None]
                assert layer.get_seq_length() == self.length
            else:
                keys, values = layer.keys, layer.values
                if isinstance(layer, StaticLayer):
                    filled = int(layer.keys[0, 0].any(-1).sum())
                    keys, values = keys[:, :, :filled], values[:, :, :filled]
                    assert int(layer.get_seq_length()) == self.length
                lengths = torch.full(keys.shape[:2], keys.shape[2])
            pairs = layer.rows.pairs if isinstance(layer, RaggedLayer) else "16"
            if pairs == "16" and torch.equal(lengths, before.sum(-1)):
                continue  # nothing has left: which pairs are held shows in the logits
            read = full.keys, full.values
            if pairs != "16":  # the tail is not, yet
                read = tuple(x.clone() for x in read)
                end = layer.context_length
                new = rounded(full.keys[:, :, :end], full.values[:, :, :end], pairs)
                for whole, part in zip(read, new, strict=True):
                    whole[:, :, :end] = part
            after = torch.zeros_like(before)
            for b, h in torch.cartesian_prod(*map(torch.arange, before.shape[:2])).tolist():
                n = int(lengths[b, h])
                if not n:  # all padding, so far
                    continue
                key, value = keys[b, h, keys.shape[2] - n :], values[b, h, values.shape[2] - n :]
                distance = torch.cdist(key, full.keys[b, h])
                near = 1e-2
                if pairs != "16":  # one of its numbers may be rounded to the other side
                    distance = torch.minimum(distance, torch.cdist(key, read[0][b, h]))
                    near = (0.02 if pairs[1] == "8" else 0.3) * float(key.norm(dim=-1).max())
                distance[:, ~before[b, h]] = math.inf  # padding, or evicted before
                place = distance.argmin(-1)
                assert (distance.amin(-1) < near).all()
                assert (place.diff() > 0).all()
                if pairs == "16":
                    torch.testing.assert_close(
                        value, full.values[b, h, place], atol=1e-2, rtol=1e-2
                    )
                else:
                    off = (value - full.values[b, h, place]).norm(dim=-1)
                    off = torch.minimum(off, (value - read[1][b, h, place]).norm(dim=-1))
                    near = 0.02 if pairs[3] == "8" else 0.3
                    assert (off <= near * value.norm(dim=-1).max()).all()
                    full.keys[b, h, place], full.values[b, h, place] = key, value
                after[b, h, place] = True
            self.visible[index] = after

    def pairs(self) -> Tensor:
        """Visible pairs [L, B, H] of each head in the layers that see the whole past."""
        return torch.stack([self.visible[index] for index in self.whole]).sum(-1)

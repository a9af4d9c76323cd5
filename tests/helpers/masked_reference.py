"""The full cache beside a compressed one: nothing is evicted, what the other lacks is masked.

Where evicted pairs have joined retained ones, these have the values and the biases that
``folded_reference`` says.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from folded_reference import asked_behind, folded, joined_in_head
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from twins import rounded

from moekv.cache.ragged import RaggedLayer
from moekv.models.hooks import find_layers, is_sliding

_visible: dict[int, Tensor] = {}  # of each layer, [B, H, T] bool
_biases: dict[int, Tensor] = {}  # of its logits, the same
_asked: dict[int, tuple[Tensor, float, float]] = {}  # its last queries, scaling and softcap


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    assert mask is None and not dropout
    groups, (count, length) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    causal = torch.ones(count, length).tril(length - count)
    if is_sliding(module):
        causal = causal.triu(length - count - module.sliding_window + 1)
    seen = _visible[module.layer_idx][:, :, None] & causal.bool()
    bias = _biases.get(module.layer_idx, key.new_zeros(key.shape[:3]))[:, :, None]
    key, value, seen, bias = (x.repeat_interleave(groups, 1) for x in (key, value, seen, bias))
    softcap = options.get("softcap") or 0.0
    _asked[module.layer_idx] = query, options["scaling"], softcap
    scores = (query @ key.mT) * options["scaling"]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + bias).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
    return (weights @ value).transpose(1, 2), None


def show(layer: int, seen: Tensor) -> None:
    """Say which pairs [B, H, T] a layer of the reference sees from now on."""
    _visible[layer] = seen
    _biases.pop(layer, None)


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
        self.biases = [seen.float() for seen in self.visible]
        self.folded = [False] * len(layers)
        self.joined = 0, 0  # evicted pairs that have joined others for sure, and that may have
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
            bias = self.biases[index][..., : self.length - count]
            self.biases[index] = _biases[index] = functional.pad(bias, (0, count))
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
        self.full.crop(-count)
        self.visible = [seen[..., : self.length] for seen in self.visible]

    def select(self, rows: list[int], how: str = "reorder_cache") -> None:
        """Go on with other rows of the batch."""
        index = torch.tensor(rows)
        for cache in (self.cache, self.full):
            getattr(cache, how)(index)
        self.padding = self.padding[index]
        self.visible = [seen[index] for seen in self.visible]
        self.biases = [bias[index] for bias in self.biases]

    def repeat(self, times: int) -> None:
        """Repeat every row of the batch."""
        for cache in (self.cache, self.full):
            cache.batch_repeat_interleave(times)
        self.padding = self.padding.repeat_interleave(times)
        self.visible = [seen.repeat_interleave(times, dim=0) for seen in self.visible]
        self.biases = [bias.repeat_interleave(times, dim=0) for bias in self.biases]

    def see(self) -> None:
        """Find out what the compressed cache lacks, pair by pair."""
        for index in self.whole:
            layer, full = self.cache.layers[index], self.full.layers[index]
            if not isinstance(layer, RaggedLayer) and layer.keys.shape[2] == self.length:
                continue
            before, bias = self.visible[index], None
            if isinstance(layer, RaggedLayer):
                keys, values, bias, lengths = layer.padded()
                # The tail may have padding, which attention masks.
                begin = self.length - layer.tail_length + torch.tensor(layer.tail.skipped)
                hidden = self.padding.clamp(max=self.length) - begin
                lengths = lengths - hidden.clamp(min=0)[:, None]
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
            heads = torch.cartesian_prod(*map(torch.arange, before.shape[:2])).tolist()
            end = getattr(layer, "context_length", self.length)
            read = self._as_read(index, pairs, end)
            places, after = {}, torch.zeros_like(before)
            for b, h in heads:
                n = int(lengths[b, h])
                if not n:  # all padding, so far
                    continue
                key = keys[b, h, keys.shape[2] - n :]
                distance = torch.cdist(key, full.keys[b, h])
                near = 1e-2
                if pairs != "16":  # one of its numbers may be rounded to the other side
                    distance = torch.minimum(distance, torch.cdist(key, read[0][b, h]))
                    near = (0.02 if pairs[1] == "8" else 0.3) * float(key.norm(dim=-1).max())
                distance[:, ~before[b, h]] = math.inf  # padding, or evicted before
                place = places[b, h] = distance.argmin(-1)
                assert (distance.amin(-1) < near).all()
                assert (place.diff() > 0).all()
                after[b, h, place] = True
            if bias is not None and not self.folded[index]:
                self._fold(index, after, values, bias)
                read = self._as_read(index, pairs, end)
            assert self.folded[index] == (bias is not None)
            for (b, h), place in places.items():
                n = len(place)
                key, value = (x[b, h, x.shape[2] - n :] for x in (keys, values))
                if bias is not None:
                    assert torch.equal(bias[b, h, -n:].float(), self.biases[index][b, h, place])
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
            self.visible[index] = after

    def _as_read(self, index: int, pairs: str, end: int) -> tuple[Tensor, Tensor]:
        """Give a layer of the full cache as it is read: the tail is not quantised, yet."""
        full = self.full.layers[index]
        if pairs == "16":
            return full.keys, full.values
        new = rounded(full.keys[:, :, :end], full.values[:, :, :end], pairs)
        read = full.keys.clone(), full.values.clone()
        for whole, part in zip(read, new, strict=True):
            whole[:, :, :end] = part
        return read

    def _fold(self, index: int, stay: Tensor, values: Tensor, bias: Tensor) -> None:
        """Have the pairs that left after the prefill join those that `stay`, [B, H, T] bool.

        Of all that the contract allows, as the compressed layer did, which holds `values` [B, H, L,
        Dv] and `bias` [B, H, L], each head's at the right.
        """
        full, (query, scaling, softcap) = self.full.layers[index], _asked[index]
        assert query.shape[2] == stay.shape[2] == self.length, "folded after more than a prefill"
        config = self.full_model.config.get_text_config()
        asked = asked_behind(query, self.padding, config)
        asked = asked.view(len(stay), self.heads, -1, asked.shape[3])
        least, most = self.joined
        for b, h in torch.cartesian_prod(*map(torch.arange, stay.shape[:2])).tolist():
            start = int(self.padding[b])
            logits = {"scaling": scaling, "softcap": softcap}
            found = joined_in_head(asked[b, h], full.keys[b, h], stay[b, h], start, **logits)
            before = full.values[b, h].clone()
            for i, row in zip(found, range(-len(found), 0), strict=True):
                joined, value, own = found[i], values[b, h, row].double(), float(bias[b, h, row])
                ways = [folded(before, i, way) for way in joined.all_ways()]

                def off(
                    way: tuple[Tensor, float], value: Tensor = value, own: float = own
                ) -> float:
                    return abs(way[1] - own) + 0.01 * float((way[0] - value).norm())

                full.values[b, h, i], expected = min(ways, key=off)
                assert abs(expected - own) < 2e-3 * max(expected, 1), "another bias"
                self.biases[index][b, h, i] = own
                least, most = least + len(joined.sure), most + len(joined.maybe)
        self.joined = least, most
        self.folded[index] = True

    def pairs(self) -> Tensor:
        """Visible pairs [L, B, H] of each head in the layers that see the whole past."""
        return torch.stack([self.visible[index] for index in self.whole]).sum(-1)

"""Rows of a padded batch answer as each does alone, also while compression goes on."""

import copy
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from growth_cases import EXPERTS, Uneven
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache

from moekv import DecodingConfig, MoERouterPress, load_cache, save_cache
from moekv.cache.ragged import RaggedLayer
from moekv.models.hooks import cache_of
from moekv.ops import PAIRS

NEAR = {"16": 1e-4, "k8v8": 5e-3, "k8v4": 2e-2, "k4v4": 5e-2}
"""Of logits: a number that lies between two codes may be rounded to either."""


model_of = functools.cache(tiny_model)


class Batch:
    """A growing cache of rows with padding at the left, and what they are fed."""

    def __init__(self, ids: Tensor, padding: Sequence[int]) -> None:
        self.ids, self.padding = ids, torch.tensor(padding)
        self.cache, self.length, self.forward = DynamicCache(), 0, model_of().forward

    def feed(self, count: int, hidden: Sequence[int] = (), *, learns: bool = False) -> Tensor:
        """Logits [B, count, V] of the next tokens, which do not see the last `hidden` ones."""
        begin, self.length = self.length, self.length + count
        mask = (torch.arange(self.length) >= self.padding[:, None]).long()
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, begin:]
        mask[:, [begin - n for n in hidden]] = 0
        embedded = model_of().get_input_embeddings()(self.ids[:, begin : self.length]).detach()
        embedded.requires_grad_(learns)
        with torch.set_grad_enabled(learns):
            return self.forward(
                inputs_embeds=embedded,
                past_key_values=self.cache,
                attention_mask=mask,
                position_ids=position,
            ).logits.detach()

    def alone(self, row: int) -> "Batch":
        """Make a batch of one row, without its padding."""
        return Batch(self.ids[row : row + 1, int(self.padding[row]) :], [0])

    def live(self, options: dict[str, Any], prompt: int, steps: int, *, filled: bool) -> Tensor:
        """Feed a prompt, before the block or in it, and some tokens."""
        press = MoERouterPress(router=None, **options)
        if filled:
            self.feed(prompt)
        with press(model_of()):
            if not filled:
                self.feed(prompt)
            return torch.cat([self.feed(1) for _ in range(steps)], 1)


def check_layers(together: Batch, row: int, alone: Batch) -> None:
    """See that a row holds in each layer what it holds alone."""
    for layer, own in zip(together.cache.layers, alone.cache.layers, strict=True):
        lengths = layer.head_lengths(together.padding.tolist())[row]
        assert lengths == own.head_lengths([0])[0]
        if isinstance(layer, RaggedLayer):
            for part, its in zip(layer.held_pairs(), own.held_pairs(), strict=True):
                for head, count in enumerate(lengths):
                    ours, others = part[row, head][-count:], its[0, head][-count:]
                    assert (ours - others).norm() <= 0.03 * others.norm()


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("seed", range(4))
def test_random_rows_answer_as_each_alone(pairs: str, seed: int) -> None:
    r = random.Random(seed)
    prompt, count = r.randint(12, 40), r.randint(2, 4)
    padding = [0, *(r.randint(0, prompt - 1) for _ in range(count - 1))]
    r.shuffle(padding)
    options = {
        "compression_ratio": r.choice([0.0, 0.5]),
        "experts": r.choice([EXPERTS, [Uneven()]]),
        "pairs": pairs,
        "budget": r.choice(["uniform", "layer", "head", "model"]),
        "decoding": DecodingConfig(r.randint(4, prompt), r.randint(1, 6)),
        "recent": r.randint(0, 3),
        "fold": False,
    }
    filled = r.random() < 0.3
    batch = Batch(tokens(count, prompt + 20, seed), padding)
    together = batch.live(options, prompt, 20, filled=filled)
    for row, begin in enumerate(padding):
        alone = batch.alone(row)
        logits = alone.live(options, prompt - begin, 20, filled=filled)
        torch.testing.assert_close(together[row : row + 1], logits, atol=NEAR[pairs], rtol=0)
        check_layers(batch, row, alone)


def save_and_load(batch: Batch, folder: Path) -> None:
    save_cache(batch.cache, folder / "cache", model_of())
    batch.cache = load_cache(folder / "cache", model_of())


def select(batch: Batch, *rows: int) -> None:
    batch.cache.batch_select_indices(torch.tensor(rows))
    batch.ids, batch.padding = batch.ids[list(rows)], batch.padding[list(rows)]


def crop(batch: Batch, count: int) -> None:
    batch.cache.crop(-count)
    batch.length -= count


def take_back(batch: Batch) -> None:
    """Crop by assigning what was handed out, and put it back."""
    for layer in batch.cache.layers:
        keys, values, length = layer.keys, layer.values, layer.get_seq_length()
        layer.keys, layer.values = keys[:, :, : length - 1], values[:, :, : length - 1]
        assert layer.get_seq_length() == length - 1
        layer.keys, layer.values = keys, values
        assert layer.get_seq_length() == length


def compile_model(batch: Batch) -> None:
    torch._dynamo.reset()
    batch.forward = torch.compile(model_of().forward, dynamic=True, backend="aot_eager")


LATER: dict[str, tuple[Callable[[Batch, Path], Any], dict[str, Any]]] = {
    "as it is": (lambda batch, folder: None, {}),
    "file": (save_and_load, {}),
    "copy": (lambda batch, folder: setattr(batch, "cache", copy.deepcopy(batch.cache)), {}),
    "other rows": (lambda batch, folder: select(batch, 2, 0), {}),
    "one row": (lambda batch, folder: select(batch, 1), {}),
    "compressed rows": (lambda batch, folder: select(batch, 0, 0), {}),
    "cropped tokens": (lambda batch, folder: crop(batch, 1), {}),
    "cropped context": (lambda batch, folder: crop(batch, 3), {}),
    "taken back": (lambda batch, folder: take_back(batch), {}),
    "mask": (lambda batch, folder: None, {"hidden": [1, 2]}),
    "mask of the context": (lambda batch, folder: None, {"hidden": [1, 2, 5, 6]}),
    "gradients": (lambda batch, folder: None, {"learns": True}),
    "many tokens": (lambda batch, folder: None, {"count": 34}),
    "compiled": (lambda batch, folder: compile_model(batch), {}),
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("pairs", ["k8v8", "k4v4"])
def test_tokens_that_wait_for_their_rows_compression(
    pairs: str, later: str, tmp_path: Path
) -> None:
    """Row 0 is compressed, the others are not: whatever happens to the cache, they are as alone."""
    options = {
        "compression_ratio": 0.0,
        "pairs": pairs,
        "decoding": DecodingConfig(30, 4),
        "recent": 6,
    }
    change, how = LATER[later]
    padding = [0, 25, 14]
    batch = Batch(tokens(3, 80), padding)
    batch.live(options, 32, 6, filled=False)
    waiting = [layer.tail.waiting for layer in batch.cache.layers]
    assert waiting == [4, 4] and batch.cache.layers[0].tail.skipped == [4, 0, 0]
    change(batch, tmp_path)
    got = batch.feed(**{"count": 2} | how)
    for row in range(len(batch.ids)):
        alone = batch.alone(row)
        begin = int(batch.padding[row])
        alone.live(options, 32 - begin, 6, filled=False)
        if "cropped" in later:
            crop(alone, alone.length + begin - batch.length + got.shape[1])
        expected = alone.feed(**{"count": 2} | how)
        torch.testing.assert_close(got[row : row + 1], expected, atol=NEAR[pairs], rtol=0)
        check_layers(batch, row, alone)


@pytest.mark.parametrize("pairs", PAIRS[1:])
@pytest.mark.parametrize("place", [1, -1])
def test_a_pair_that_cannot_be_stored_changes_no_other_row(pairs: str, place: int) -> None:
    """One of the prompt, which is never evicted, or of a token behind it, which is."""
    options = {"pairs": pairs, "decoding": DecodingConfig(20, 3), "recent": 6, "fold": False}
    batch = Batch(tokens(3, 60), [0, 3, 9])

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = cache_of(kwargs).layers[module.layer_idx]
        if layer.get_seq_length() == (30 if place > 0 else 34):
            values = layer.tail_values if isinstance(layer, RaggedLayer) else layer.values
            values[0, 1, place, 3] = 1e8

    hook = model_of().model.layers[0].self_attn.register_forward_hook(spoil, with_kwargs=True)
    try:
        together = batch.live(options, 30, 16, filled=False)
    finally:
        hook.remove()
    for row in (1, 2):
        alone = batch.alone(row)
        logits = alone.live(options, alone.ids.shape[1] - 30, 16, filled=False)
        torch.testing.assert_close(together[row : row + 1], logits, atol=NEAR[pairs], rtol=0)

"""Offloaded caches, which are compressed from the first prompt on.

transformers' own need CUDA. Here the other memory is played by a device that stores no numbers:
nothing comes of tensors that are there but by bringing them back.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from random_router import random_router
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from moekv import DecodingConfig, MoERouterPress, prefill_in_chunks
from moekv.cache.growing import GrowingLayer
from moekv.cache.ragged import RaggedLayer

LENGTH = 40


class Away(Tensor):
    """A tensor of a plain layer that is there: it can be copied, and no more."""

    there: Tensor

    @classmethod
    def of(cls, here: Tensor) -> Away:
        away = Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device="meta")
        away.there = here
        return away

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function is torch.ops.aten._to_copy.default, f"{function} of what is not there"
        return args[0].there.clone()


class Stream:
    def wait_stream(self, other: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


@pytest.fixture
def other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    away: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()

    def play(kind: type[CacheLayerMixin], *parts: str) -> None:
        def offload(self: Any) -> None:
            if not self.is_initialized or self in away:
                return
            away[self] = {name: copy.copy(getattr(self, name)) for name in parts}
            if isinstance(self, RaggedLayer):
                self._move("meta")
                return
            leave = (lambda x: x.to("meta")) if isinstance(self, GrowingLayer) else Away.of
            self.keys, self.values = leave(self.keys), leave(self.values)

        def prefetch(self: Any) -> None:
            for name, part in away.pop(self, {}).items():
                setattr(self, name, part)

        monkeypatch.setattr(kind, "offload", offload)
        monkeypatch.setattr(kind, "prefetch", prefetch)

    play(CacheLayerMixin, "keys", "values")
    play(GrowingLayer, "keys", "values")
    play(RaggedLayer, "rows", "_tail")
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())


@pytest.mark.usefixtures("other_memory")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": "uniform"},
        {"budget": "layer"},
        {"pairs": "k8v4"},
        {"compression_ratio": 0.9, "pairs": "k4v4", "fold": True},
        {"compression_ratio": 0},
        *({"streaming": True, "budget": x} for x in ("uniform", "head", "model")),
        *({"decoding": DecodingConfig(12, 3), "budget": x} for x in ("uniform", "layer", "model")),
        {"decoding": DecodingConfig(12, 3), "pairs": "k8v8"},
        {"decoding": DecodingConfig(12, 3), "streaming": True},
        {"decoding": DecodingConfig(50, 4), "compression_ratio": 0, "budget": "uniform"},
    ],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_offloaded_from_the_first_prompt_on(options: dict[str, Any], calibrated: bool) -> None:
    model, prompt = tiny_model(), tokens(2, LENGTH)
    if calibrated:
        options = {"router": random_router(model)} | options
    said, stats = [], []
    for offloading in (False, True):
        press = MoERouterPress(**{"compression_ratio": 0.5} | options)
        cache = DynamicCache(config=model.config, offloading=offloading)
        with press(model):
            said.append(
                model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False)
            )
        said.append(
            model.generate(
                torch.cat([said[-1], tokens(2, 1, 3)], 1),
                past_key_values=cache,
                max_new_tokens=3,
                do_sample=False,
            )
        )
        stats.append(press.get_stats())
        if offloading:
            assert cache.layers[-1].keys.device.type == "meta"
    assert torch.equal(said[0], said[2]) and torch.equal(said[1], said[3])
    for each in stats:
        del each["cache"]  # room for later tokens stays behind
        if "streaming" in options:  # storages that are there have no addresses to tell them apart
            del each["compression"]
    assert str(stats[0]) == str(stats[1])


@pytest.mark.usefixtures("other_memory")
@pytest.mark.parametrize("pairs", ["16", "k8v4"])
@pytest.mark.parametrize("begun", [False, True])
def test_offloaded_and_fed_in_chunks(pairs: str, begun: bool) -> None:
    """Chunks of a prompt; or a prompt that was fed before the block, whose layers are plain."""
    model, prompt, logits = tiny_model(), tokens(2, LENGTH), []
    for offloading in (False, True):
        press = MoERouterPress(0.5, pairs=pairs, decoding=DecodingConfig(12, 3) if begun else None)
        cache = DynamicCache(config=model.config, offloading=offloading)
        if begun:
            with torch.no_grad():
                model(prompt, past_key_values=cache)
                with press(model):
                    out = model(tokens(2, 9, 3), past_key_values=cache)
        else:
            out = prefill_in_chunks(press, model, prompt, chunk_size=9, past_key_values=cache)
        logits.append(out.logits)
        with press(model) if begun else nullcontext(), torch.no_grad():
            for step in range(6):
                logits.append(model(tokens(2, 1, step), past_key_values=cache).logits)
    middle = len(logits) // 2
    for expected, got in zip(logits[:middle], logits[middle:], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

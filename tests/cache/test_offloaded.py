"""Offloaded caches, which are compressed from the first prompt on.

transformers' own need CUDA. Here a stand-in plays the other memory: nothing can be done with
tensors that are there but to bring them back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from moekv import MoERouterPress

LENGTH = 40


class Away(Tensor):
    """A tensor in a memory that nothing computes with."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        if name == "to":
            return args[0].as_subclass(Tensor).to(*args[1:], **kwargs or {})
        if name not in ("__get__", "as_subclass", "untyped_storage", "dim", "size", "numel"):
            raise AssertionError(f"{name} of a tensor that is not there")
        return super().__torch_function__(function, types, args, kwargs or {})


class Stream:
    def wait_stream(self, other: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


@pytest.fixture
def other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def offload(self: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = (x.as_subclass(Away) for x in (self.keys, self.values))

    def prefetch(self: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = (x.as_subclass(Tensor) for x in (self.keys, self.values))

    monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", prefetch)
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
    ],
)
def test_offloaded_from_the_first_prompt_on(options: dict[str, Any]) -> None:
    model, prompt = tiny_model(), tokens(2, LENGTH)
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
            assert type(cache.layers[-1].keys) is not Tensor  # where nothing computes with it
    assert torch.equal(said[0], said[2]) and torch.equal(said[1], said[3])
    for each in stats:
        del each["cache"]  # room for later tokens stays behind
        for layer in each["layer_stats"].values():  # queries of later tokens are not followed
            del layer["expert_compression_stats"]["later_hit_rates"]
            del layer["router_stats"]["history_bias"]
    assert str(stats[0]) == str(stats[1])

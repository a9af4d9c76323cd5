"""State that the layers of one engine share in a process, and their work in a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from moekv.integrations.vllm.compaction import Kept, choose, compact
from moekv.integrations.vllm.options import Gap, ServingOptions
from moekv.integrations.vllm.pages import Pages
from moekv.integrations.vllm.rating import LastQueries, Rotation, Scores, rate
from moekv.ops.reference.expected_attention import REACH

if TYPE_CHECKING:
    from moekv.integrations.vllm.heads import HeadStep


@dataclass(frozen=True)
class Prompt:
    """A part of a prompt that a step computes.

    Attributes
    ----------
    rows : slice
        Of the step's queries.
    end : int
        Tokens of the prompt that have come then.
    length : int
        Tokens of the prompt.
    blocks : Tensor [n]
        Of the request, up to there.
    gap : Gap or None
        None: the request is not compressed, but scored for others that may reuse its blocks.
    before : dict of Tensor [n, Hq, D]
        By layer, the last queries of the part before this one.
    after : LastQueries
        Those of this one, to be filled in.
    """

    rows: slice
    end: int
    length: int
    blocks: Tensor
    gap: Gap | None
    before: dict[int, Tensor]
    after: LastQueries

    @property
    def is_whole(self) -> bool:
        """Whether the whole prompt has been computed."""
        return self.end == self.length


@dataclass(frozen=True)
class Step:
    """Work beside vLLM's own attention, or in place of it.

    Attributes
    ----------
    prompts : list of Prompt
    heads : HeadStep or None
        Requests whose heads hold different numbers of blocks.
    only_heads : bool
        Whether there are no other requests.
    """

    prompts: list[Prompt]
    heads: HeadStep | None
    only_heads: bool


@dataclass
class StepMetadata(CPUAttentionMetadata):
    """vLLM's own metadata, and moekv's work in the step."""

    step: Step | None = None
    worker: Worker | None = None


@dataclass
class Worker:
    """State that the layers of one engine share.

    Attributes
    ----------
    options : ServingOptions
    rotation : Rotation
    modules : list of nn.Module
        vLLM's attention layers, in the model's order.
    block_size : int
    isa : str
        Of vLLM's attention.
    kept : dict of Kept
        What heads hold that hold different numbers of blocks, by the last whole block of their
        requests' prompts, which no other request shares.
    """

    options: ServingOptions
    rotation: Rotation
    modules: list[Any]
    block_size: int
    isa: str
    kept: dict[int, Kept] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: Any, options: ServingOptions, names: list[str], block_size: int, isa: str
    ) -> Worker:
        """Make the state of an engine, from the names of its layers."""
        context = config.compilation_config.static_forward_context
        modules = [context[name] for name in sorted(names, key=extract_layer_index)]
        return cls(options, Rotation(config.model_config.hf_text_config), modules, block_size, isa)

    @cached_property
    def layers(self) -> dict[str, int]:
        """Index of each layer by its name."""
        return {module.layer_name: i for i, module in enumerate(self.modules)}

    @cached_property
    def pages(self) -> list[Pages]:
        """Of all layers together, if blocks move between them; else of each."""
        caches = [module.kv_cache for module in self.modules]
        if self.options.budget == "model":
            return [Pages(caches, self.isa)]
        return [Pages([cache], self.isa) for cache in caches]

    @cached_property
    def scores(self) -> Scores:
        """Of the pairs in all blocks."""
        blocks, heads, size, _ = self.modules[0].kv_cache.shape
        return Scores((len(self.modules), blocks, heads, size))

    def forget(self, blocks: list[int]) -> None:
        """Drop what is recorded of blocks that a step overwrites."""
        for block in blocks:
            self.scores.last.pop(block, None)
            self.kept.pop(block, None)

    def rate(self, prompt: Prompt, layer: Any, queries: Tensor) -> None:
        """Score a layer's pairs.

        Parameters
        ----------
        prompt : Prompt
        layer : nn.Module
            vLLM's attention layer.
        queries : Tensor [N, Hq, D]
            Of the step.
        """
        index, asking = self.layers[layer.layer_name], queries[prompt.rows]
        pages, row = self._pages_of(index)
        keys, values = pages.read_all(pages.of(prompt.blocks)[row], prompt.end)
        before = prompt.before.get(index)
        scores = rate(
            asking,
            before,
            keys,
            values,
            prompt.length,
            self.rotation,
            scaling=layer.impl.scale,
            softcap=layer.impl.logits_soft_cap,
        )
        self.scores.write(index, prompt.blocks, prompt.end - len(asking), scores)
        if not prompt.is_whole:
            seen = asking if before is None else torch.cat([before, asking])
            prompt.after.queries[index] = seen[-REACH:].clone()

    def compress(self, prompt: Prompt, layer: Any) -> None:
        """Move the retained pairs once they are scored: a layer's, or at the last layer all."""
        index = self.layers[layer.layer_name]
        together = self.options.budget == "model"
        gap = prompt.gap
        if gap is None or not prompt.is_whole or (together and index + 1 < len(self.modules)):
            return
        layers = slice(None) if together else slice(index, index + 1)
        scores = self.scores.read(layers, prompt.blocks[: gap.full])
        rest = prompt.length - gap.full * self.block_size
        indices, counts = choose(scores, gap, self.block_size, rest, self.options)
        kept = compact(self._pages_of(index)[0], prompt.blocks, gap, indices, counts)
        if together:
            self.kept[int(prompt.blocks[gap.full - 1])] = kept

    def _pages_of(self, layer: int) -> tuple[Pages, int]:
        """Return the pages that hold a layer's, and the layer's index in them."""
        return (self.pages[0], layer) if self.options.budget == "model" else (self.pages[layer], 0)

"""What the layers of one engine share in a process, and what a step asks of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from moekv.integrations.vllm.compaction import Kept, choose, compact
from moekv.integrations.vllm.options import Gap, ServingOptions
from moekv.integrations.vllm.pages import Pages
from moekv.integrations.vllm.rating import Rated, Rotation

if TYPE_CHECKING:
    from moekv.integrations.vllm.heads import HeadStep


@dataclass(frozen=True)
class Prompt:
    """A part of a prompt that a step computes, of a request whose blocks will be freed.

    Attributes
    ----------
    rows : slice
        Of the step's queries.
    end : int
        Tokens of the prompt that have come then.
    blocks : Tensor [n]
        Of the request, up to there.
    gap : Gap
    rated : Rated
    """

    rows: slice
    end: int
    blocks: Tensor
    gap: Gap
    rated: Rated

    @property
    def is_whole(self) -> bool:
        """Whether all of it has come."""
        return self.end == self.rated.length


@dataclass(frozen=True)
class Step:
    """What there is to do beside vLLM's own attention, or instead.

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
    """vLLM's own metadata, and what moekv does in the step."""

    step: Step | None = None
    worker: Worker | None = None


@dataclass
class Worker:
    """What the layers of one engine share.

    Attributes
    ----------
    options : ServingOptions
    rotation : Rotation
    modules : list of nn.Module
        vLLM's attention layers, in the model's order.
    block_size : int
    isa : str
        Of vLLM's attention.
    rated : dict of Rated
        Prompts that are being computed, by the first block of their requests.
    kept : dict of Kept
        What heads hold that hold different numbers of blocks, by the first block of their requests,
        which stays theirs as long as they live.
    """

    options: ServingOptions
    rotation: Rotation
    modules: list[Any]
    block_size: int
    isa: str
    rated: dict[int, Rated] = field(default_factory=dict)
    kept: dict[int, Kept] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: Any, options: ServingOptions, names: list[str], block_size: int, isa: str
    ) -> Worker:
        """Make that of an engine, from the names of its layers."""
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

    def forget(self, blocks: list[int]) -> None:
        """Let go of requests that have ended, by blocks that another has been given."""
        for block in blocks:
            self.rated.pop(block, None)
            self.kept.pop(block, None)

    def rate(self, prompt: Prompt, layer: Any, queries: Tensor) -> None:
        """Rate a layer's pairs, and move those that stay once the prompt has been rated.

        Parameters
        ----------
        prompt : Prompt
        layer : nn.Module
            vLLM's attention layer.
        queries : Tensor [N, Hq, D]
            Of the step.
        """
        index = self.layers[layer.layer_name]
        together = self.options.budget == "model"
        pages = self.pages[0 if together else index]
        own = pages.of(prompt.blocks)[index if together else 0]
        keys, values = pages.read_all(own, prompt.end)
        prompt.rated.take(
            index,
            queries[prompt.rows],
            keys,
            values,
            self.rotation,
            scaling=layer.impl.scale,
            softcap=layer.impl.logits_soft_cap,
        )
        if not prompt.is_whole or (together and index + 1 < len(self.modules)):
            return
        rated, gap = prompt.rated, prompt.gap
        scores = rated.all_scores() if together else rated.scores[index]
        rest = rated.length - gap.full * self.block_size
        indices, counts = choose(scores, gap, self.block_size, rest, self.options)
        kept = compact(pages, prompt.blocks, gap, indices, counts)
        if together:
            self.kept[int(prompt.blocks[0])] = kept
        if index + 1 == len(self.modules):
            del self.rated[int(prompt.blocks[0])]

"""State that the layers of one engine share in a process, and their work in a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from moekv.integrations.vllm.compaction import Kept, choose, compact
from moekv.integrations.vllm.options import Gap, ServingOptions
from moekv.integrations.vllm.pages import Pages, share_storage
from moekv.integrations.vllm.rating import LastQueries, Rotation, Scores, rate
from moekv.ops.reference.expected_attention import REACH

if TYPE_CHECKING:
    from moekv.integrations.vllm.heads import Compressed, HeadStep


@dataclass(frozen=True)
class Part:
    """A part of a request that a step computes, whose pairs are rated.

    Attributes
    ----------
    rows : slice
        Of the step's queries.
    end : int
        Tokens of the request that have come then.
    ahead : int
        Tokens of its prompt that are still to come.
    blocks : Tensor [n]
        Of the request, up to there.
    gap : Gap or None
        What leaves then. None: nothing does.
    held : Compressed or None
        What has left before. None: nothing has.
    before : LastQueries
        Of the part before this one.
    after : LastQueries or None
        Those of this one, to be filled in. None: nobody will ask.
    """

    rows: slice
    end: int
    ahead: int
    blocks: Tensor
    gap: Gap | None
    held: Compressed | None
    before: LastQueries
    after: LastQueries | None


@dataclass(frozen=True)
class Step:
    """Work beside vLLM's own attention, or in place of it.

    Attributes
    ----------
    parts : list of Part
    heads : HeadStep or None
        Requests whose heads hold different numbers of blocks.
    only_heads : bool
        Whether there are no other requests.
    """

    parts: list[Part]
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
        What heads hold that hold different numbers of blocks, by the last of the blocks that were
        compressed, which is their request's alone as long as it lives.
    last : dict of LastQueries
        By the block in which a part of a request ends.
    """

    options: ServingOptions
    rotation: Rotation
    modules: list[Any]
    block_size: int
    isa: str
    kept: dict[int, Kept] = field(default_factory=dict)
    last: dict[int, LastQueries] = field(default_factory=dict)

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
        """Of all layers together, if they share a storage; else of each."""
        caches = [module.kv_cache for module in self.modules]
        if self.options.budget == "model" or share_storage(caches):
            return [Pages(caches, self.isa)]
        return [Pages([cache], self.isa) for cache in caches]

    @cached_property
    def scores(self) -> list[Scores]:
        """Of the pairs in each of these."""
        return [Scores(len(pages.all), self.block_size) for pages in self.pages]

    def forget(self, blocks: list[int]) -> None:
        """Drop what is recorded of blocks that a step overwrites."""
        for block in blocks:
            self.last.pop(block, None)
            self.kept.pop(block, None)

    def before(self, block: int, begin: int) -> LastQueries:
        """Return the last queries before a part of a request, none if they are not known."""
        last = self.last.get(block)
        if last is None or last.end != begin:
            return LastQueries(begin)
        if self.options.interval is not None:  # nobody else asks
            del self.last[block]
        return last

    def rate(self, part: Part, layer: Any, queries: Tensor) -> None:
        """Rate a layer's pairs, or remember who will ask for them.

        Parameters
        ----------
        part : Part
        layer : nn.Module
            vLLM's attention layer.
        queries : Tensor [N, Hq, D]
            Of the step.
        """
        index = self.layers[layer.layer_name]
        seen = [*part.before.queries.get(index, ()), queries[part.rows]]
        if part.after is not None and part.after.unrated:
            part.after.queries[index] = [*seen[:-1], seen[-1].clone()]
            return
        asking = torch.cat(seen)
        count = part.before.unrated + len(seen[-1])
        which, row = self._pages_of(index)
        tables = self.pages[which].of(part.blocks)[row]
        scores = torch.cat(
            [
                rate(
                    asking[:, heads],
                    count,
                    *self.pages[which].read_all(*held),
                    part.ahead,
                    self.rotation,
                    scaling=layer.impl.scale,
                    softcap=layer.impl.logits_soft_cap,
                )
                for heads, held in self._held(part, row, tables, asking.shape[1])
            ]
        )
        self.scores[which].write(tables, part.end - count, scores)
        if part.after is not None:
            part.after.queries[index] = [asking[-REACH:].clone()]

    def _held(
        self, part: Part, row: int, tables: Tensor, num_queries: int
    ) -> Iterator[tuple[slice, tuple[Tensor, int]]]:
        """Yield pages and number of the pairs that heads hold, and which queries ask for them."""
        every = slice(0, num_queries)
        if part.held is None:
            yield every, (tables, part.end)
            return
        gap, kept = part.held.gap, part.held.kept
        if kept is None:
            yield every, (tables[:, gap.start :], part.end - gap.start * self.block_size)
            return
        group = num_queries // len(tables)
        for head, count in enumerate(kept.counts[row].tolist()):
            pages = torch.cat([kept.pages[row, head, :count], tables[head, gap.full :]])[None]
            length = part.end - (gap.full - count) * self.block_size
            yield slice(head * group, (head + 1) * group), (pages, length)

    def compress(self, part: Part, layer: Any) -> None:
        """Move the retained pairs, once all have been rated: a layer's, or at the last, all."""
        index = self.layers[layer.layer_name]
        together = self.options.budget == "model"
        gap = part.gap
        if gap is None or (together and index + 1 < len(self.modules)):
            return
        which, row = self._pages_of(index)
        layers = slice(None) if together else slice(row, row + 1)
        pages, scores = self.pages[which], self.scores[which]
        blocks = pages.of(part.blocks[: gap.full])[layers]
        start, source = None, blocks
        if part.held is not None:
            source = blocks[..., part.held.gap.start :]
            if part.held.kept is not None:
                source, start = part.held.kept.before(blocks[..., part.held.gap.full :])
                start *= self.block_size
        rest = part.end - gap.full * self.block_size
        rated = scores.read(source.flatten(0, 1))
        indices, counts = choose(rated, gap, self.block_size, rest, self.options, start)
        kept = compact(pages, scores, source, blocks[..., gap.start :], indices, counts)
        if together:
            self.kept[int(part.blocks[gap.full - 1])] = kept

    def _pages_of(self, layer: int) -> tuple[int, int]:
        """Return in which of the pages a layer's are, and which of theirs they are."""
        return (0, layer) if len(self.pages) == 1 else (layer, 0)

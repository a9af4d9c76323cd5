"""The scheduler's side: blocks of a prompt are given back once it has been computed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from moekv.integrations.vllm.options import ServingOptions


class CompressingManager(FullAttentionManager):
    """Gives the middle of a prompt back, see ``ServingOptions.gap``.

    Called with each allocation for a request. Tokens keep their places in the block table, in which
    null blocks stand for those that have left.
    """

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the gap if the whole prompt has been computed, and so compressed."""
        if num_prompt_tokens is None or processed_computed_tokens < num_prompt_tokens:
            return
        gap = self.kv_cache_spec.options.gap(num_prompt_tokens, self.block_size)
        if gap is not None:
            self._remove_blocks_in_range(request_id, gap.kept, gap.full)


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """The KV cache of a layer whose prompts are compressed."""

    options: ServingOptions

    @property
    def prefix_cacheable(self) -> bool:
        """No: pairs move within blocks, which are then no longer those of their tokens."""
        return False

    @classmethod
    def of(cls, spec: FullAttentionSpec, options: ServingOptions) -> CompressedSpec:
        """Take over vLLM's spec."""
        given = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
        return cls(**{**given, "options": options})

    @classmethod
    def merge(cls, specs: list[Any]) -> CompressedSpec:
        """Merge the specs of a group of layers, which share their options."""
        return cls.of(FullAttentionSpec.merge(specs), specs[0].options)


def register() -> None:
    """Tell vLLM which manager such a spec has; again does no harm."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CompressedSpec, CompressingManager, FullAttentionSpec)

"""The scheduler's side: blocks of a prompt are freed once it has been computed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from moekv.integrations.vllm.metrics import Metrics
from moekv.integrations.vllm.options import Gap, ServingOptions, own_ratio


class CompressingManager(FullAttentionManager):
    """Frees the first blocks of a prompt, see ``ServingOptions.gap``.

    Called with each allocation for a request. Tokens keep their places in the block table, in which
    null blocks stand for those that have left. These stay in the prefix cache until they are taken;
    the blocks in which pairs move are never in it, nor are those of an answer, which has been given
    from fewer pairs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._caches: bool = kwargs["enable_caching"]
        self.enable_caching = True  # so that vLLM shows the requests
        self._gaps: dict[str, Gap | None] = {}
        self._metrics = Metrics.of()

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Record a request that has been given blocks, and cache those that others may reuse."""
        prompt, name = request.num_prompt_tokens, request.request_id
        if name not in self._gaps:
            asked = request.sampling_params and request.sampling_params.extra_args
            options = self.kv_cache_spec.options
            self._gaps[name] = options.gap(prompt, self.block_size, own_ratio(asked))
        if num_tokens >= prompt:
            # Preempted from here on, it comes back with a part of its answer, and is computed anew:
            # vLLM would look for both in the cache.
            request.skip_reading_prefix_cache = True
        if self._caches:
            gap = self._gaps[name]
            end = prompt // self.block_size if gap is None else gap.start
            super().cache_blocks(request, min(num_tokens, end * self.block_size), *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Find no blocks in which pairs will move: ``max_length`` tokens of a prompt and one."""
        spec = kwargs["kv_cache_spec"]
        gap = spec.options.gap(max_length + 1, spec.block_size)
        if gap is not None:
            max_length = min(max_length, gap.start * spec.block_size)
        return super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the gap if the whole prompt has been computed, and so compressed."""
        if num_prompt_tokens is None or processed_computed_tokens < num_prompt_tokens:
            return
        gap = self._gaps[request_id]
        if gap is None or self.req_to_blocks[request_id][0].is_null:
            return
        self._remove_blocks_in_range(request_id, 0, gap.start)
        self._metrics.compressed(num_prompt_tokens, gap, self.block_size)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Forget a request that has ended, or was preempted."""
        self._gaps.pop(request_id, None)
        blocks: list[Any] = super().pop_blocks_for_free(request_id)
        return blocks


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """The KV cache of a layer whose prompts are compressed."""

    options: ServingOptions

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
    """Register the manager of such a spec with vLLM. Idempotent."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CompressedSpec, CompressingManager, FullAttentionSpec)

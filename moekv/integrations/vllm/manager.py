"""The scheduler's side: blocks of a prompt are freed once it has been computed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from moekv.integrations.vllm.metrics import Metrics
from moekv.integrations.vllm.options import ServingOptions, own_ratio


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
        self._ratios: dict[str, float | None] = {}
        self._freed: dict[str, int] = {}
        self._whole: set[str] = set()
        self._metrics = Metrics.of()

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Record a request that has been given blocks, and cache those that others may reuse."""
        prompt, name = request.num_prompt_tokens, request.request_id
        if name not in self._ratios:
            asked = request.sampling_params and request.sampling_params.extra_args
            self._ratios[name] = own_ratio(asked)
        if num_tokens >= prompt:
            # Preempted from here on, it comes back with a part of its answer, and is computed anew:
            # vLLM would look for both in the cache.
            request.skip_reading_prefix_cache = True
        if self._caches:
            gap = self.kv_cache_spec.options.gap(prompt, self.block_size, self._ratios[name])
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

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Ask of a request that is to be admitted no more than it will hold at once."""
        options = self.kv_cache_spec.options
        gap = options.gap(num_tokens, self.block_size)
        if apply_admission_cap and options.interval is not None and gap is not None:
            most = gap.kept * self.block_size + options.interval
            num_tokens = min(num_tokens, most + 2 * self.block_size)  # filled in part
        blocks: int = super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)
        return blocks

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the gap of what has been computed, and so compressed."""
        if num_prompt_tokens is None or request_id not in self._ratios:
            return
        options, own = self.kv_cache_spec.options, self._ratios[request_id]
        prompt, computed = num_prompt_tokens, processed_computed_tokens
        gap = options.gap(prompt, self.block_size, own, computed)
        before = self._freed.get(request_id, 0)
        if gap is not None and gap.start > before:
            self._remove_blocks_in_range(request_id, before, gap.start)
            self._freed[request_id] = gap.start
            self._metrics.freed(gap.start - before)
        if computed >= prompt and request_id not in self._whole:
            self._whole.add(request_id)
            if (gap := options.gap(prompt, self.block_size, own)) is not None:
                self._metrics.compressed(prompt, prompt - gap.start * self.block_size)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Forget a request that has ended, or was preempted."""
        self._ratios.pop(request_id, None)
        self._freed.pop(request_id, None)
        self._whole.discard(request_id)
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

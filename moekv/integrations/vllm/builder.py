"""Metadata of a step: which requests are scored, compressed, or read compressed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from moekv.integrations.vllm.heads import Compressed, HeadStep
from moekv.integrations.vllm.options import Gap, ServingOptions
from moekv.integrations.vllm.rating import LastQueries
from moekv.integrations.vllm.refusals import say
from moekv.integrations.vllm.requests import Request, Requests
from moekv.integrations.vllm.worker import Part, Step, StepMetadata, Worker


class CompressingBuilder(CPUAttentionMetadataBuilder):
    """vLLM's builder, which finds requests whose prompts are to be compressed, or have been."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        options = ServingOptions.read(vllm_config.additional_config)
        self.worker: Worker | None = None
        if options is not None:
            self.worker = Worker.of(vllm_config, options, layer_names, self.block_size, self.isa)
            if Requests.current is None:
                raise RuntimeError(
                    "moekv: expected its entry point in vllm.logits_processors, got none: install "
                    "moekv anew"
                )
            self.requests = Requests.current
            self.caches_prefixes = vllm_config.cache_config.enable_prefix_caching
            say(vllm_config, options)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """Build the metadata of a step, with the compressed length of compressed requests."""
        given = common_attn_metadata
        if self.worker is None:
            return super().build(common_prefix_len, given, fast_build)
        parts, compressed = self._sort(self.worker, given)
        seq_lens, table = given.seq_lens.clone(), given.block_table_tensor.clone()
        heads = None
        if compressed and self.worker.options.budget == "model":
            heads = HeadStep.of(compressed, self.worker.pages[0], self._attention())
            for each in compressed:  # what vLLM answers for them is overwritten
                seq_lens[each.row] = each.rows.stop - each.rows.start
        else:
            for each in compressed:
                _close_gap(each, self.block_size, seq_lens, table)
        made = super().build(
            common_prefix_len,
            given.replace(seq_lens=seq_lens, block_table_tensor=table),
            fast_build,
        )
        step = None
        if parts or heads is not None:
            only_heads = heads is not None and len(compressed) == given.num_reqs
            step = Step(parts, heads, only_heads)
        return StepMetadata(**vars(made), step=step, worker=self.worker)

    def _sort(self, worker: Worker, given: Any) -> tuple[list[Part], list[Compressed]]:
        """Find what is to be rated, and the requests that have been compressed."""
        size, table, options = self.block_size, given.block_table_tensor, worker.options
        ends, starts = given.seq_lens.tolist(), given.query_start_loc.tolist()
        rows = []
        for row in range(given.num_reqs):
            own, end = slice(starts[row], starts[row + 1]), ends[row]
            begin = end - (own.stop - own.start)
            if begin == end:
                continue
            blocks = table[row, : -(-end // size)]
            worker.forget(blocks[-(-begin // size) :].tolist())
            rows.append((row, own, begin, end, blocks))
        parts, compressed = [], []
        for row, own, begin, end, blocks in rows:
            length, ratio = self._request(row)
            if (point := options.last_point(length, end)) > begin and point != end:
                raise RuntimeError(
                    f"moekv: expected a step that ends after {point} tokens of a request, as its "
                    f"prompt of {length} does or an interval, got one up to {end}: vLLM did not "
                    "take moekv's scheduler"
                )
            held = None
            if (gap := options.gap(length, size, ratio, begin)) is not None:
                kept = worker.kept.get(int(blocks[gap.full - 1]))
                held = Compressed(row, own, end, blocks, gap, kept)
                compressed.append(held)
            leaves = options.gap(length, size, ratio, end) if point == end else None
            if options.interval is not None:
                is_rated = (options.compression_ratio if ratio is None else ratio) > 0
            else:
                gap = options.gap(length, size, ratio)
                is_rated = begin < length and (gap is not None or self.caches_prefixes)
            if not is_rated:
                continue
            blocks = blocks.clone()
            before = worker.before(int(blocks[(begin - 1) // size]), begin)
            after = None
            if options.next_point(length, end) is not None:
                after = LastQueries(end)
                if begin >= length and point != end:
                    after.unrated = before.unrated + end - begin
            ahead = max(0, length - end)
            parts.append(Part(own, end, ahead, blocks, leaves, held, before, after))
        for part in parts:
            if part.after is not None:
                worker.last[int(part.blocks[-1])] = part.after
        return parts, compressed

    def _request(self, row: int) -> Request:
        """Return what is known of a row's request."""
        request = self.requests.rows.get(row)
        if request is None:
            raise RuntimeError("moekv: expected vLLM to tell the tokens of each prompt, got none")
        return request

    def _attention(self) -> dict[str, Any]:
        """Return what vLLM's plan of an attention depends on."""
        return {
            "group": self.num_heads // self.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "isa": self.isa,
            "kv_cache_dtype": self.kv_cache_dtype,
        }


def _close_gap(each: Compressed, block_size: int, seq_lens: Tensor, table: Tensor) -> None:
    """Leave the blocks that have been freed out of a request's table."""
    gap: Gap = each.gap
    behind = table[each.row, gap.start :].clone()
    table[each.row, : len(behind)] = behind
    seq_lens[each.row] -= gap.start * block_size

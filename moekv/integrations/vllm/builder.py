"""What a step means for each request: rated, compressed, or read where it is compressed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from moekv.integrations.vllm.heads import Compressed, HeadStep
from moekv.integrations.vllm.options import Gap, ServingOptions
from moekv.integrations.vllm.rating import Rated
from moekv.integrations.vllm.refusals import say
from moekv.integrations.vllm.worker import Prompt, Step, StepMetadata, Worker


class CompressingBuilder(CPUAttentionMetadataBuilder):
    """vLLM's, which looks for requests whose prompts are to be compressed, or have been."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        options = ServingOptions.read(vllm_config.additional_config)
        self.worker: Worker | None = None
        if options is not None:
            self.worker = Worker.of(vllm_config, options, layer_names, self.block_size, self.isa)
            # Has vLLM tell how long prompts are: this is a window behind them, which nothing fills.
            vllm_config.model_config.model_arch_config.rswa_window = 1 << 30
            say(vllm_config, options)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """Make the metadata of a step, in which compressed requests look as short as they are."""
        given = common_attn_metadata
        if self.worker is None:
            return super().build(common_prefix_len, given, fast_build)
        prompts, compressed = self._sort(self.worker, given)
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
        if prompts or heads is not None:
            step = Step(prompts, heads, only_heads=len(compressed) == given.num_reqs)
        return StepMetadata(**vars(made), step=step, worker=self.worker)

    def _sort(self, worker: Worker, given: Any) -> tuple[list[Prompt], list[Compressed]]:
        """Find the requests whose prompts are computed, and those in which they are compressed."""
        if given.rswa_prefix_lens is None:
            raise RuntimeError("moekv: expected vLLM to tell the lengths of prompts, got none")
        lengths, ends = given.rswa_prefix_lens.tolist(), given.seq_lens.tolist()
        starts = given.query_start_loc.tolist()
        prompts, compressed = [], []
        for row in range(given.num_reqs):
            rows = slice(starts[row], starts[row + 1])
            length, end, count = lengths[row], ends[row], rows.stop - rows.start
            gap = worker.options.gap(length, self.block_size) if count else None
            if gap is None:
                continue
            begin = end - count
            blocks = given.block_table_tensor[row, : -(-end // self.block_size)]
            first = int(blocks[0])
            if begin >= length:
                kept = worker.kept.get(first)
                compressed.append(Compressed(row, rows, end, blocks, gap, kept))
                continue
            if begin == 0:
                worker.forget(blocks.tolist())
                worker.rated[first] = Rated(length)
            elif first not in worker.rated:
                raise RuntimeError(
                    "moekv: expected a prompt that is computed here from its beginning, got one of "
                    f"{length} tokens from the {begin}th on"
                )
            end = min(end, length)  # of one that was preempted, some of the answer comes, too
            rows = slice(rows.start, rows.start + end - begin)
            blocks = blocks[: -(-end // self.block_size)].clone()
            prompts.append(Prompt(rows, end, blocks, gap, worker.rated[first]))
        return prompts, compressed

    def _attention(self) -> dict[str, Any]:
        """Say what vLLM's plan of an attention depends on."""
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
    behind = table[each.row, gap.full :].clone()
    table[each.row, gap.kept : gap.kept + len(behind)] = behind
    seq_lens[each.row] -= (gap.full - gap.kept) * block_size

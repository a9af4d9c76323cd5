"""Attention where heads hold different numbers of blocks.

Each KV head of a request is a sequence of its own, of one KV head, with a table of pages and a
length. vLLM's own kernel reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm import envs

from moekv.integrations.vllm.compaction import Kept
from moekv.integrations.vllm.options import Gap
from moekv.integrations.vllm.pages import Pages


@dataclass(frozen=True)
class Compressed:
    """A request whose prompt has been compressed, in a step.

    Attributes
    ----------
    row : int
        Of the step's requests.
    rows : slice
        Of the step's queries.
    end : int
        Tokens that have come then.
    blocks : Tensor [n]
        Of the request; those in the gap are no longer its own.
    gap : Gap
    kept : Kept or None
        What heads hold that hold different numbers of blocks.
    """

    row: int
    rows: slice
    end: int
    blocks: Tensor
    gap: Gap
    kept: Kept | None


@dataclass(frozen=True)
class HeadStep:
    """A step of requests whose heads hold different numbers of blocks. R requests, L layers.

    Attributes
    ----------
    rows : list of slice
        The requests' queries.
    tables : Tensor [L, R * H, W], int32
        Pages of each head.
    lengths : Tensor [L, R * H], int32
        Pairs of each head.
    starts : Tensor [R * H + 1], int32
        Where each head's queries begin.
    plans : list of L Tensor
        vLLM's, of the work's division.
    pages : Pages
    """

    rows: list[slice]
    tables: Tensor
    lengths: Tensor
    starts: Tensor
    plans: list[Tensor]
    pages: Pages

    @classmethod
    def of(
        cls, requests: Sequence[Compressed], pages: Pages, attention: dict[str, Any]
    ) -> HeadStep:
        """Put the heads of some requests together.

        Raises
        ------
        RuntimeError
            A request's prompt was computed elsewhere.
        """
        size, num_heads = pages.block_size, pages.num_heads
        num_layers = len(pages.first)
        parts, lengths = [], []
        for each in requests:
            if each.kept is None:
                raise RuntimeError(
                    "moekv: expected a request whose prompt was compressed in this process, got "
                    "another"
                )
            counts, behind = each.kept.counts, pages.of(each.blocks[each.gap.full :])
            width = each.kept.pages.shape[2]
            table = torch.zeros(num_layers, num_heads, width + behind.shape[2], dtype=torch.int64)
            table[..., :width] = each.kept.pages
            table.scatter_(2, counts[..., None] + torch.arange(behind.shape[2]), behind)
            parts.append(table)
            lengths.append(counts * size + (each.end - each.gap.full * size))
        widest = max(part.shape[2] for part in parts)
        tables = torch.zeros(num_layers, len(parts), num_heads, widest, dtype=torch.int32)
        for i, part in enumerate(parts):
            tables[:, i, :, : part.shape[2]] = part
        counts = torch.tensor([each.rows.stop - each.rows.start for each in requests])
        starts = torch.zeros(len(parts) * num_heads + 1, dtype=torch.int32)
        starts[1:] = counts.repeat_interleave(num_heads).cumsum(0)
        of_heads = torch.stack(lengths, 1).flatten(1).int()
        group = attention.pop("group")
        plans = [
            vllm_ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(parts) * num_heads,
                num_heads=group,
                num_kv_heads=1,
                seq_lens=of_layer,
                query_start_loc=starts,
                causal=True,
                sliding_window_size=-1,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                **attention,
            )
            for of_layer in of_heads
        ]
        rows = [each.rows for each in requests]
        return cls(rows, tables.flatten(1, 2), of_heads, starts, plans, pages)

    def attend(self, index: int, layer: Any, queries: Tensor, output: Tensor) -> None:
        """Answer the requests' queries.

        Parameters
        ----------
        index : int
            Of the layer.
        layer : nn.Module
            vLLM's attention layer.
        queries, output : Tensor [N, Hq, D]
            Of the step; rows of other requests are left alone.
        """
        num_heads = self.pages.num_heads
        asked = torch.cat([_by_head(queries[rows], num_heads) for rows in self.rows])
        answers = torch.empty_like(asked)
        keys, values = self.pages.all.chunk(2, dim=2)
        vllm_ops.cpu_attention_with_kv_cache(
            query=asked,
            key_cache=keys,
            value_cache=values,
            output=answers,
            query_start_loc=self.starts,
            seq_lens=self.lengths[index],
            scale=layer.impl.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.tables[index],
            softcap=layer.impl.logits_soft_cap,
            scheduler_metadata=self.plans[index],
            s_aux=None,
            dynamic_causal=None,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=layer.impl.kv_cache_dtype,
        )
        begin = 0
        for rows in self.rows:
            end = begin + (rows.stop - rows.start) * num_heads
            output[rows] = _by_token(answers[begin:end], num_heads)
            begin = end


def _by_head(queries: Tensor, num_heads: int) -> Tensor:
    """Order queries [N, Hq, D] by KV head: [H * N, Hq / H, D]."""
    count, _, dim = queries.shape
    return queries.reshape(count, num_heads, -1, dim).transpose(0, 1).flatten(0, 1)


def _by_token(answers: Tensor, num_heads: int) -> Tensor:
    """Order what :func:`_by_head` gave by token again: [N, Hq, D]."""
    _, group, dim = answers.shape
    return answers.view(num_heads, -1, group, dim).transpose(0, 1).flatten(1, 2)

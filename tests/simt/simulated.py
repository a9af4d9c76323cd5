"""The simulated CUDA kernels behind the signatures of the ops, on CPU tensors.

What csrc/ops does for real tensors, for tensors that this copies to the simulated device and back.
Nothing is validated here: that is the ops' part, and tested with them.
"""

import contextlib
import ctypes
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moekv.ops import pair_layout
from moekv.ops.reference.expected_attention import rotated

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Device:
    """The kernels of one built module, executed in the order that ``seed`` draws.

    ``residents``: blocks at once, at most; a GPU has hundreds. With 0 the launches are checked, and
    nothing is executed.
    """

    def __init__(self, kernels: ModuleType, seed: int = 0, *, residents: int | None = None) -> None:
        self.kernels = kernels
        self.seed = seed
        self.residents = kernels.RESIDENTS if residents is None else residents

    def op(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self, name)
        return function

    @contextlib.contextmanager
    def _memory(self):
        memory = Memory(self.kernels)
        yield memory
        memory.copy_back()

    def _launch(self, name: str, params: Any, memory: "Memory") -> None:
        workspace_bytes = getattr(self.kernels, f"{name}_workspace_bytes", None)
        if workspace_bytes:
            params.workspace = memory.scratch(workspace_bytes(params))
        getattr(self.kernels, name)(params, self.seed, self.residents)

    def gating_topk(
        self,
        logits: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        importance: Tensor | None = None,
        *,
        k: int,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits = with_dense_rows(logits)
        num_tokens, num_experts = logits.shape
        weights = torch.empty(num_tokens, k)
        experts = torch.empty(num_tokens, k, dtype=torch.int32)
        prob_sum = torch.empty(num_experts)
        load = torch.empty(num_experts, dtype=torch.int64)
        entropy = torch.empty(())
        with self._memory() as memory:
            params = self.kernels.GatingTopkParams()
            params.logits = memory.input(logits)
            params.bias = memory.input(bias)
            params.mask = memory.input(mask)
            params.importance = memory.input(importance)
            params.entropy = memory.output(entropy)
            params.weights = memory.output(weights)
            params.experts = memory.output(experts)
            params.prob_sum = memory.output(prob_sum)
            params.load = memory.output(load)
            params.num_tokens = num_tokens
            params.num_experts = num_experts
            params.k = k
            params.logits_stride = logits.stride(0)
            params.inv_temperature = 1 / temperature
            params.dtype = DTYPES[logits.dtype]
            self._launch("gating_topk", params, memory)
        return weights, experts, prob_sum, load, entropy

    def expert_scores(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor,
        start: Tensor | None = None,
        *,
        kinds: Sequence[int],
        scaling: float,
        softcap: float = 0.0,
        pool: int = 1,
        lag: int = 128,
    ) -> Tensor:
        keys, values, queries = (with_dense_rows(x) for x in (keys, values, queries))
        scores = torch.empty(len(kinds), *keys.shape[:3])
        if scores.numel() == 0:
            return scores
        with self._memory() as memory:
            params = self.kernels.ExpertScoresParams()
            params.keys = memory.input(keys)
            params.values = memory.input(values)
            params.queries = memory.input(queries)
            params.start = memory.input(start)
            out = [0] * 4
            for kind, address in zip(kinds, memory.output_slices(scores), strict=True):
                out[kind] = address
            params.scores = out
            params.batch, params.num_kv_heads, params.num_keys, params.key_dim = keys.shape
            _, params.num_query_heads, params.num_queries, _ = queries.shape
            params.value_dim = values.shape[3]
            params.key_stride = keys.stride()[:3]
            params.value_stride = values.stride()[:3]
            params.query_stride = queries.stride()[:3]
            params.pool, params.lag = pool, lag
            params.scaling, params.softcap = scaling, softcap
            params.dtype = DTYPES[keys.dtype]
            self._launch("expert_scores", params, memory)
        return scores

    def expected_attention(
        self,
        queries: Tensor,
        keys: Tensor,
        start: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *,
        scaling: float = 1.0,
        softcap: float = 0.0,
    ) -> Tensor:
        if cos is not None and sin is not None:  # as the op does before it calls a CUDA kernel
            queries = rotated(queries, cos, sin).to(keys.dtype)
        queries, keys = with_dense_rows(queries), with_dense_rows(keys)
        scores = torch.empty(keys.shape[:3])
        if scores.numel() == 0:
            return scores
        with self._memory() as memory:
            params = self.kernels.ExpectedAttentionParams()
            params.queries = memory.input(queries)
            params.keys = memory.input(keys)
            params.start = memory.input(start)
            params.scores = memory.output(scores)
            params.batch, params.num_kv_heads, params.num_keys, params.head_dim = keys.shape
            params.num_query_heads = queries.shape[1]
            params.query_stride = queries.stride()[:3]
            params.key_stride = keys.stride()[:3]
            params.scaling, params.softcap = scaling, softcap
            params.dtype = DTYPES[keys.dtype]
            self._launch("expected_attention", params, memory)
        return scores

    def project_tokens(
        self, hidden_states: Tensor, weight: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        hidden_states, weight = with_dense_rows(hidden_states), with_dense_rows(weight)
        projected = torch.empty(*hidden_states.shape[:2], len(weight))
        standout = torch.empty(hidden_states.shape[:2])
        if standout.numel() == 0:
            return projected, standout
        with self._memory() as memory:
            params = self.kernels.ProjectTokensParams()
            params.hidden_states = memory.input(hidden_states)
            params.weight = memory.input(weight)
            params.mask = memory.input(None if mask is None else mask.contiguous())
            params.projected = memory.output(projected)
            params.standout = memory.output(standout)
            params.batch, params.num_tokens, params.num_channels = hidden_states.shape
            params.num_projections = len(weight)
            params.stride = hidden_states.stride()[:2]
            params.weight_stride = weight.stride(0)
            params.dtype = DTYPES[hidden_states.dtype]
            self._launch("project_tokens", params, memory)
        return projected, standout

    def mix_scores(
        self,
        scores: Tensor,
        weights: Tensor,
        experts: Tensor,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        scores, weights, experts = (with_dense_rows(x) for x in (scores, weights, experts))
        mixed = torch.empty(scores.shape[1:])
        with self._memory() as memory:
            params = self.kernels.MixScoresParams()
            params.scores = memory.input(scores)
            params.weights = memory.input(weights)
            params.experts = memory.input(experts)
            params.gain = memory.input(gain)
            params.offset = memory.input(offset)
            params.mixed = memory.output(mixed)
            params.num_experts, params.batch, params.num_kv_heads, params.num_keys = scores.shape
            params.k = weights.shape[-1]
            params.score_stride = scores.stride()[:3]
            for name, tensor in (("weight_stride", weights), ("expert_stride", experts)):
                strides = list(tensor.stride())
                setattr(
                    params, name, strides[:3] if tensor.dim() == 4 else [strides[0], 0, strides[1]]
                )
            self._launch("mix_scores", params, memory)
        return mixed

    def select_kept(
        self,
        scores: Tensor,
        start: Tensor | None = None,
        *,
        total: Sequence[int],
        sinks: int = 0,
        window: int = 0,
        floor: int = 1,
    ) -> tuple[Tensor, Tensor]:
        scores = with_dense_rows(scores)
        groups, rows, num_keys = scores.shape
        indices = torch.empty(sum(total), dtype=torch.int32)
        offsets = torch.empty(groups * rows + 1, dtype=torch.int32)
        totals = torch.tensor(list(total), dtype=torch.int64)  # stays on the host
        with self._memory() as memory:
            params = self.kernels.SelectKeptParams()
            params.scores = memory.input(scores)
            params.start = memory.input(None if start is None else start.contiguous())
            params.total = totals.data_ptr()
            params.indices = memory.output(indices)
            params.offsets = memory.output(offsets)
            params.groups, params.rows, params.num_keys = groups, rows, num_keys
            params.score_stride = scores.stride()[:2]
            params.sinks, params.window, params.floor = sinks, window, floor
            params.dtype = DTYPES[scores.dtype]
            self._launch("select_kept", params, memory)
        return indices, offsets

    def kv_compact_(
        self,
        keys: Tensor,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor | None = None,
        *,
        packed: bool = False,
    ) -> None:
        with self._memory() as memory:
            params = self.kernels.KvCompactParams()
            params.keys = memory.inout(keys)
            params.values = memory.inout(values)
            params.indices = memory.input(indices.contiguous())
            params.offsets = memory.input(offsets)
            params.batch, params.num_kv_heads, params.num_keys, _ = keys.shape
            params.num_kept = indices.shape[2] if offsets is None else 0
            params.num_indices = indices.numel()
            params.key_bytes = keys.shape[3] * keys.element_size()
            params.value_bytes = values.shape[3] * values.element_size()
            params.key_stride = [x * keys.element_size() for x in keys.stride()[:3]]
            params.value_stride = [x * values.element_size() for x in values.stride()[:3]]
            params.packed = packed
            self._launch("kv_compact", params, memory)

    def quantize_pairs(
        self, keys: Tensor, values: Tensor, *, pairs: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = with_dense_rows(keys), with_dense_rows(values)
        num_pairs, key_dim = keys.shape
        value_dim = values.shape[1]
        layout = pair_layout(pairs, key_dim, value_dim)
        key_codes = torch.empty(num_pairs, layout.key_codes, dtype=torch.uint8)
        value_codes = torch.empty(num_pairs, layout.value_codes, dtype=torch.uint8)
        scales = torch.empty(num_pairs, layout.num_scales, dtype=torch.float16)
        if num_pairs == 0:
            return key_codes, value_codes, scales
        with self._memory() as memory:
            params = self.kernels.QuantizePairsParams()
            params.keys, params.values = memory.input(keys), memory.input(values)
            params.key_codes = memory.output(key_codes)
            params.value_codes = memory.output(value_codes)
            params.scales = memory.output(scales)
            params.num_pairs, params.key_dim, params.value_dim = num_pairs, key_dim, value_dim
            params.key_stride, params.value_stride = keys.stride(0), values.stride(0)
            params.key_bits, params.value_bits = layout.key_bits, layout.value_bits
            params.dtype = DTYPES[keys.dtype]
            self._launch("quantize_pairs", params, memory)
        return key_codes, value_codes, scales

    def ragged_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        begin: Tensor,
        end: Tensor,
        tail_keys: Tensor | None = None,
        tail_values: Tensor | None = None,
        mask: Tensor | None = None,
        scales: Tensor | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
        *,
        scaling: float,
        softcap: float = 0.0,
        pairs: str = "16",
    ) -> Tensor:
        query, keys, values = (with_dense_rows(x) for x in (query, keys, values))
        begin, end = begin.contiguous(), end.contiguous()
        batch, num_query_heads, num_queries, key_dim = query.shape
        key_bits, value_bits = bits_of(pairs)
        value_dim = values.shape[1] * (2 if value_bits == 4 else 1)
        output = query.new_empty(batch, num_queries, num_query_heads, value_dim)
        with self._memory() as memory:
            params = self.kernels.RaggedAttentionParams()
            params.query = memory.input(query)
            params.keys = memory.input(keys)
            params.values = memory.input(values)
            params.key_bits, params.value_bits = key_bits, value_bits
            if scales is not None:
                scales = with_dense_rows(scales)
                params.scales, params.scale_stride = memory.input(scales), scales.stride(0)
            params.bias = memory.input(bias)
            params.sinks = memory.input(sinks)
            params.begin = memory.input(begin.contiguous())
            params.end = memory.input(end.contiguous())
            params.output = memory.output(output)
            params.batch, params.num_kv_heads = begin.shape
            params.num_query_heads, params.num_queries = num_query_heads, num_queries
            params.key_dim, params.value_dim = key_dim, value_dim
            params.num_stored = keys.shape[0]
            params.query_stride = query.stride()[:3]
            params.key_stride, params.value_stride = keys.stride(0), values.stride(0)
            if tail_keys is not None and tail_values is not None:
                tail_keys, tail_values = with_dense_rows(tail_keys), with_dense_rows(tail_values)
                params.tail_keys = memory.input(tail_keys)
                params.tail_values = memory.input(tail_values)
                params.num_tail = tail_keys.shape[2]
                params.tail_key_stride = tail_keys.stride()[:3]
                params.tail_value_stride = tail_values.stride()[:3]
            if mask is not None:
                params.mask = memory.input(mask)
                params.mask_stride = [
                    step if size > 1 else 0
                    for step, size in zip(mask.stride(), mask.shape, strict=True)
                ]
            params.scaling, params.softcap = scaling, softcap
            params.dtype = DTYPES[query.dtype]
            self._launch("ragged_attention", params, memory)
        return output


def bits_of(pairs: str) -> tuple[int, int]:
    """Bits of a key's channel and of a value's; 16: those of the query's dtype."""
    return (16, 16) if pairs == "16" else (int(pairs[1]), int(pairs[3]))


def with_dense_rows(tensor: Tensor) -> Tensor:
    """What the ops make of a tensor whose last dimension has gaps."""
    dense = tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    return tensor if dense else tensor.contiguous()


# Storages of more than this are touched only where their tensor is.
SPARSE_BYTES = 2**28


def storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def placed(memory: Any, tensor: Tensor) -> Tensor:
    """Return what lies in the device's memory where ``tensor`` has been placed, as a view."""
    storage = (ctypes.c_char * storage_bytes(tensor)).from_address(memory.address)
    flat = torch.frombuffer(storage, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Memory:
    """Device memory of a call. Every tensor's whole storage lies in a block of exactly its size."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels
        self._held: list[Any] = []
        self._outputs: list[tuple[Any, Tensor]] = []

    def _place(self, tensor: Tensor) -> tuple[Any, int]:
        memory = self._kernels.Memory(storage_bytes(tensor))
        self._held.append(memory)
        return memory, memory.address + tensor.storage_offset() * tensor.element_size()

    def input(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if tensor.dim() == 1:  # no parameter says how far apart a vector's elements are
            tensor = tensor.contiguous()
        memory, address = self._place(tensor)
        if storage_bytes(tensor) <= SPARSE_BYTES:
            memory.write(tensor.untyped_storage().data_ptr())
            return address
        placed(memory, tensor).copy_(tensor)
        for index in itertools.product(*map(range, tensor.shape[:-1])):
            row = tensor[index]
            begin = row.storage_offset() * row.element_size()
            memory.mark_written(begin, row.numel() * row.element_size())
        return address

    def output(self, tensor: Tensor) -> int:
        memory, address = self._place(tensor)
        self._outputs.append((memory, tensor))
        return address

    def output_slices(self, tensor: Tensor) -> list[int]:
        """Addresses of tensor[0], tensor[1], ..."""
        base = self.output(tensor)
        return [base + i * tensor.stride(0) * tensor.element_size() for i in range(len(tensor))]

    def inout(self, tensor: Tensor) -> int:
        address = self.input(tensor)
        self._outputs.append((self._held[-1], tensor))
        return address

    def scratch(self, num_bytes: int) -> int:
        self._held.append(self._kernels.Memory(num_bytes))
        address: int = self._held[-1].address
        return address

    def copy_back(self) -> None:
        for memory, tensor in self._outputs:
            if storage_bytes(tensor) <= SPARSE_BYTES:
                memory.read(tensor.untyped_storage().data_ptr())
            else:
                tensor.copy_(placed(memory, tensor))

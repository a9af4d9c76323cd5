"""What the ops expect of their arguments, as ``csrc/ops`` checks it for the native kernels.

The references check so, and the fake implementations of the native ops, which add what the kernels
alone refuse: ``native``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MAX_EXPERTS = 256
_MAX_HEAD_DIM = 1024  # of the references
_NUM_SCORE_KINDS = 4
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MOST = 2**31 - 1
"""Kernels count positions in 32 bits."""

_MOST_ROWS = _MOST - 65535
"""Stored rows and tail of ``ragged_attention``, whose kernels step beyond the last."""

_FACTORS = 1e-18, 1e18
"""Factors, their inverses and their quotients are normal numbers of float32 within these bounds."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Expect:
    """The expectations of one op; every error names what was expected and what came.

    Messages are formatted where they are needed: that costs nothing otherwise, and can be traced
    where sizes are symbols.
    """

    def __init__(self, op: str, like: Tensor) -> None:
        self.op = op
        self.like = like

    def __call__(self, condition: bool, expected: str, *values: object) -> None:
        if not condition:
            raise RuntimeError(f"moekv::{self.op}: expected {expected.format(*values)}")

    def rank(self, name: str, tensor: Tensor, rank: int, dims: str) -> None:
        self(tensor.dim() == rank, "{} {}, got {}", name, dims, list(tensor.shape))

    def shape(self, name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
        """``shape`` holds a size or, where any will do, the name of a dimension."""
        fits = tensor.dim() == len(shape) and all(
            isinstance(want, str) or size == want
            for size, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            dims = ", ".join(map(str, shape))
            self(False, "{} [{}], got {}", name, dims, list(tensor.shape))

    def dtype(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if dtype == torch.float32 and self.like.dtype == torch.float64:
            return  # in higher precision, what goes with it may have either
        if tensor.dtype != dtype:
            self(False, "{} of dtype {}, got {}", name, _name(dtype), _name(tensor.dtype))

    def floating(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in _FLOATS:
            got = _name(tensor.dtype)
            self(False, "{} of dtype float32, float16 or bfloat16, got {}", name, got)

    def device(self, name: str, tensor: Tensor) -> None:
        self(tensor.device == self.like.device, "{} on the device of the first argument", name)

    def tensor(
        self, name: str, tensor: Tensor | None, dtype: torch.dtype, shape: Sequence[int | str]
    ) -> None:
        if tensor is not None:
            self.shape(name, tensor, shape)
            self.dtype(name, tensor, dtype)
            self.device(name, tensor)

    def most(self, what: str, count: int) -> None:
        self(count <= _MOST, "at most 2^31 - 1 {}, got {}", what, count)

    def factor(self, name: str, value: float) -> None:
        least, most = _FACTORS
        self(least <= value <= most, "{} between 1e-18 and 1e18, got {}", name, value)

    def logits(self, scaling: float, softcap: float) -> None:
        self.factor("scaling", scaling)
        if softcap != 0:
            self.factor("a softcap of 0 or", softcap)


def native(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor is not float64, which the references alone take."""
    if tensor.dtype == torch.float64:
        expect = _Expect(op, tensor)
        expect(False, "{} of dtype float32, float16 or bfloat16, got float64", name)


def native_rows(op: str, name: str, tensor: Tensor) -> None:
    """Check that the last dimension is dense, where no copy would do."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        expect = _Expect(op, tensor)
        expect(False, "{} with a dense last dimension, got stride {}", name, tensor.stride(-1))


def gating_topk(
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    importance: Tensor | None,
    k: int,
    temperature: float,
) -> None:
    """Check the arguments of ``gating_topk``."""
    expect = _Expect("gating_topk", logits)
    expect.rank("logits", logits, 2, "[num_tokens, num_experts]")
    expect.floating("logits", logits)
    num_tokens, num_experts = logits.shape
    expect(1 <= num_experts <= _MAX_EXPERTS, "1 to {} experts, got {}", _MAX_EXPERTS, num_experts)
    expect(1 <= k <= num_experts, "k between 1 and num_experts = {}, got {}", num_experts, k)
    expect.factor("temperature", temperature)
    expect.tensor("bias", bias, torch.float32, [num_experts])
    expect.tensor("mask", mask, torch.bool, [num_tokens])
    expect.tensor("importance", importance, torch.float32, [num_tokens])


def expert_scores(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    start: Tensor | None,
    kinds: Sequence[int],
    scaling: float,
    softcap: float,
    pool: int,
    lag: int,
) -> None:
    """Check the arguments of ``expert_scores``."""
    expect = _Expect("expert_scores", keys)
    expect.rank("keys", keys, 4, "[batch, num_kv_heads, num_keys, head_dim]")
    expect.rank("values", values, 4, "[batch, num_kv_heads, num_keys, value_dim]")
    expect.rank("queries", queries, 4, "[batch, num_query_heads, num_queries, head_dim]")
    expect.floating("keys", keys)
    batch, num_kv_heads, num_keys, key_dim = keys.shape
    _, num_query_heads, num_queries, _ = queries.shape
    value_dim = values.shape[3]
    expect.tensor("values", values, keys.dtype, [batch, num_kv_heads, num_keys, "value_dim"])
    expect.tensor(
        "queries", queries, keys.dtype, [batch, "num_query_heads", "num_queries", key_dim]
    )
    expect(
        num_kv_heads >= 1 and num_query_heads % num_kv_heads == 0,
        "num_query_heads to be a multiple of num_kv_heads = {}, got {}",
        num_kv_heads,
        num_query_heads,
    )
    expect(
        1 <= key_dim <= _MAX_HEAD_DIM and 1 <= value_dim <= _MAX_HEAD_DIM,
        "head dims of 1 to {}, got {} for keys and {} for values",
        _MAX_HEAD_DIM,
        key_dim,
        value_dim,
    )
    expect(
        num_queries <= num_keys,
        "queries of at most num_keys = {} positions, got {}",
        num_keys,
        num_queries,
    )
    expect.most("positions", num_keys)
    expect.tensor("start", start, torch.int32, [batch])
    expect.logits(scaling, softcap)
    expect(pool >= 1 and pool % 2 == 1, "an odd pool >= 1, got {}", pool)
    expect(lag >= 1, "lag >= 1, got {}", lag)
    for i, kind in enumerate(kinds):
        in_range = 0 <= kind < _NUM_SCORE_KINDS
        expect(in_range, "kinds of 0 to {}, got {}", _NUM_SCORE_KINDS - 1, kind)
        expect(kind not in kinds[:i], "distinct kinds, got {} twice", kind)
    if 0 in kinds or 1 in kinds:
        expect(
            num_query_heads >= 1 and (num_queries >= 1 or num_keys == 0),
            "at least one query for MASS and ATTENTION, got {}",
            list(queries.shape),
        )


def expected_attention(
    queries: Tensor, keys: Tensor, start: Tensor | None, scaling: float, softcap: float
) -> None:
    """Check the arguments of ``expected_attention``."""
    expect = _Expect("expected_attention", queries)
    expect.rank("queries", queries, 4, "[batch, num_query_heads, num_keys, head_dim]")
    expect.rank("keys", keys, 4, "[batch, num_kv_heads, num_keys, head_dim]")
    expect.floating("queries", queries)
    batch, num_query_heads, num_keys, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    expect.tensor("keys", keys, queries.dtype, [batch, "num_kv_heads", num_keys, head_dim])
    expect(
        num_kv_heads >= 1 and num_query_heads >= 1 and num_query_heads % num_kv_heads == 0,
        "num_query_heads to be a multiple of num_kv_heads = {}, got {}",
        num_kv_heads,
        num_query_heads,
    )
    expect(1 <= head_dim <= _MAX_HEAD_DIM, "a head dim of 1 to {}, got {}", _MAX_HEAD_DIM, head_dim)
    expect.most("positions", num_keys)
    expect.tensor("start", start, torch.int32, [batch])
    expect.logits(scaling, softcap)


def project_tokens(hidden_states: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    """Check the arguments of ``project_tokens``."""
    expect = _Expect("project_tokens", hidden_states)
    expect.rank("hidden_states", hidden_states, 3, "[batch, num_tokens, hidden_size]")
    expect.floating("hidden_states", hidden_states)
    hidden_size = hidden_states.shape[2]
    expect.tensor("weight", weight, hidden_states.dtype, ["num_projections", hidden_size])
    expect.tensor("mask", mask, torch.bool, hidden_states.shape[:2])


def mix_scores(
    scores: Tensor, weights: Tensor, experts: Tensor, gain: Tensor | None, offset: Tensor | None
) -> None:
    """Check the arguments of ``mix_scores``."""
    expect = _Expect("mix_scores", scores)
    expect.rank("scores", scores, 4, "[num_experts, batch, num_kv_heads, num_keys]")
    expect.floating("scores", scores)
    num_experts, batch, num_kv_heads, num_keys = scores.shape
    expect(1 <= num_experts <= _MAX_EXPERTS, "1 to {} experts, got {}", _MAX_EXPERTS, num_experts)
    for name, gate, dtype in (
        ("weights", weights, torch.float32),
        ("experts", experts, torch.int32),
    ):
        expect(
            gate.shape[:-1] in ((batch, num_keys), (batch, num_kv_heads, num_keys)),
            "{} [{}, {}, k] or [{}, {}, {}, k], got {}",
            name,
            batch,
            num_keys,
            batch,
            num_kv_heads,
            num_keys,
            list(gate.shape),
        )
        expect.dtype(name, gate, dtype)
        expect.device(name, gate)
    expect(
        weights.shape == experts.shape,
        "weights and experts of one shape, got {} and {}",
        list(weights.shape),
        list(experts.shape),
    )
    for name, tensor in (("gain", gain), ("offset", offset)):
        expect.tensor(name, tensor, torch.float32, [num_experts, batch, num_kv_heads])


def select_kept(
    scores: Tensor, start: Tensor | None, total: Sequence[int], sinks: int, window: int, floor: int
) -> None:
    """Check the arguments of ``select_kept``."""
    expect = _Expect("select_kept", scores)
    expect.rank("scores", scores, 3, "[groups, rows, num_keys]")
    expect.floating("scores", scores)
    groups, rows, num_keys = scores.shape
    expect.most("positions", num_keys)
    expect.most("rows in a group", rows)
    expect(len(total) == groups, "{} totals, one per group, got {}", groups, len(total))
    for name, value in (("sinks", sinks), ("window", window), ("floor", floor)):
        expect(value >= 0, "{} >= 0, got {}", name, value)
    for g, kept in enumerate(total):
        expect(
            rows <= kept <= rows * num_keys,
            "total[{}] between {} (one pair per row) and {} (all), got {}",
            g,
            rows,
            rows * num_keys,
            kept,
        )
    expect.most("kept pairs", sum(total))
    expect.tensor("start", start, torch.int32, [groups, rows])


def kv_compact_(
    keys: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, packed: bool
) -> None:
    """Check the arguments of ``kv_compact_``."""
    expect = _Expect("kv_compact_", keys)
    expect.rank("keys", keys, 4, "[batch, num_kv_heads, num_keys, head_dim]")
    expect.rank("values", values, 4, "[batch, num_kv_heads, num_keys, value_dim]")
    expect.floating("keys", keys)
    batch, num_kv_heads, num_keys, _ = keys.shape
    expect.tensor("values", values, keys.dtype, [batch, num_kv_heads, num_keys, "value_dim"])
    expect.most("positions", num_keys)
    for name, tensor in (("keys", keys), ("values", values)):
        expect(not packed or tensor.is_contiguous(), "contiguous {} with packed=True", name)
    if indices.dtype != torch.int32:
        expect(False, "indices of dtype int32, got {}", _name(indices.dtype))
    expect.device("indices", indices)
    expect.most("indices", indices.numel())
    if offsets is None:
        expect.shape("indices", indices, [batch, num_kv_heads, "num_kept"])
    else:
        expect.rank("indices", indices, 1, "[num_indices] where there are offsets")
        expect.tensor("offsets", offsets, torch.int32, [batch * num_kv_heads + 1])


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    tail_keys: Tensor | None,
    tail_values: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    softcap: float,
) -> None:
    """Check the arguments of ``ragged_attention``."""
    expect = _Expect("ragged_attention", query)
    expect.floating("query", query)
    expect.rank("query", query, 4, "[batch, num_query_heads, num_queries, head_dim]")
    expect.rank("keys", keys, 2, "[num_stored, head_dim]")
    expect.rank("values", values, 2, "[num_stored, value_dim]")
    expect.rank("begin", begin, 2, "[batch, num_kv_heads]")
    batch, num_query_heads, num_queries, key_dim = query.shape
    num_stored, value_dim = values.shape
    num_kv_heads = begin.shape[1]
    expect.tensor("keys", keys, query.dtype, ["num_stored", key_dim])
    expect.tensor("values", values, query.dtype, [keys.shape[0], "value_dim"])
    num_tail = tail_keys.shape[2] if tail_keys is not None and tail_keys.dim() == 4 else 0
    expect(
        num_stored <= _MOST_ROWS - num_tail,
        "at most {} stored rows and tail positions, got {} and {}",
        _MOST_ROWS,
        num_stored,
        num_tail,
    )
    expect.logits(scaling, softcap)
    expect(
        begin.shape[0] == batch and num_kv_heads >= 1 and num_query_heads % num_kv_heads == 0,
        "begin [{}, num_kv_heads], num_kv_heads dividing {}, got {}",
        batch,
        num_query_heads,
        list(begin.shape),
    )
    expect(
        end.shape == begin.shape,
        "end like begin {}, got {}",
        list(begin.shape),
        list(end.shape),
    )
    for name, tensor in (("begin", begin), ("end", end)):
        if tensor.dtype != torch.int32:
            expect(False, "{} of dtype int32, got {}", name, _name(tensor.dtype))
        expect.device(name, tensor)
    expect(
        (tail_keys is None) == (tail_values is None),
        "tail_keys and tail_values together, got one of them",
    )
    expect(mask is None or tail_keys is not None, "mask only with a tail")
    if tail_keys is None:
        return
    expect.rank("tail_keys", tail_keys, 4, "[batch, num_kv_heads, num_tail, head_dim]")
    heads = [batch, num_kv_heads, num_tail]
    expect.tensor("tail_keys", tail_keys, query.dtype, [*heads, key_dim])
    expect.tensor("tail_values", tail_values, query.dtype, [*heads, value_dim])
    expect(
        num_tail >= num_queries,
        "a tail of at least the {} queries themselves, got {} positions",
        num_queries,
        num_tail,
    )
    if mask is not None:
        expect.rank("mask", mask, 4, "[batch, num_query_heads, num_queries, num_tail]")
        expect.tensor("mask", mask, torch.bool, ["batch", "heads", "queries", "tail"])
        whole = [batch, num_query_heads, num_queries, num_tail]
        expect(
            all(size in (1, full) for size, full in zip(mask.shape, whole, strict=True)),
            "mask broadcastable to {}, got {}",
            whole,
            list(mask.shape),
        )

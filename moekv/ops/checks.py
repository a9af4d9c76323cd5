"""What the ops expect of their arguments, as ``csrc/ops`` checks it for the native kernels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MAX_EXPERTS = 256
_MAX_HEAD_DIM = 1024  # of the references
_NUM_SCORE_KINDS = 4
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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

    def logits(self, scaling: float, softcap: float) -> None:
        self(0 < scaling < math.inf, "scaling > 0, got {}", scaling)
        self(0 <= softcap < math.inf, "softcap >= 0, got {}", softcap)


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
    expect(temperature > 0, "temperature > 0, got {}", temperature)
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
    expect.tensor("start", start, torch.int32, [groups, rows])


def kv_compact_(
    keys: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, packed: bool
) -> None:
    """Check the arguments of ``kv_compact_``."""
    expect = _Expect("kv_compact_", keys)
    expect.rank("keys", keys, 4, "[batch, num_kv_heads, num_keys, head_dim]")
    batch, num_kv_heads, num_keys, _ = keys.shape
    expect.shape("values", values, [batch, num_kv_heads, num_keys, "value_dim"])
    expect.device("values", values)
    if packed:
        for name, tensor in (("keys", keys), ("values", values)):
            expect(tensor.is_contiguous(), "contiguous {} with packed=True", name)
    expect.dtype("indices", indices, torch.int32)
    expect.device("indices", indices)
    if offsets is None:
        expect.shape("indices", indices, [batch, num_kv_heads, "num_kept"])
    else:
        expect.rank("indices", indices, 1, "[num_indices] where there are offsets")
        expect.tensor("offsets", offsets, torch.int32, [batch * num_kv_heads + 1])

"""Validation of the ops' arguments, in the words of ``csrc/ops``.

References and fake implementations call these functions; the latter add, as ``native``, what only
the kernels refuse.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moekv.ops.expect import Expect, dtype_name
from moekv.ops.formats import MAX_HEAD_DIM

_MAX_EXPERTS = 256
_MAX_HEAD_DIM = 1024  # of the references
_NUM_SCORE_KINDS = 4


def native(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor is not float64, which only the references take."""
    if tensor.dtype == torch.float64:
        expect = Expect(op, tensor)
        expect(False, "{} of dtype float32, float16 or bfloat16, got float64", name)


def native_heads(op: str, *pairs: Tensor) -> None:
    """Check that keys or values [..., D] are not of heads that only the references take."""
    expect = Expect(op, pairs[0])
    for tensor in pairs:
        channels = tensor.shape[-1]
        expect(channels <= MAX_HEAD_DIM, "head dims of 1 to {}, got {}", MAX_HEAD_DIM, channels)


def native_rows(op: str, name: str, tensor: Tensor) -> None:
    """Check that the last dimension is dense, where no copy would do."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        expect = Expect(op, tensor)
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
    expect = Expect("gating_topk", logits)
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
    expect = Expect("expert_scores", keys)
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
    queries: Tensor,
    keys: Tensor,
    start: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scaling: float,
    softcap: float,
) -> None:
    """Check the arguments of ``expected_attention``."""
    expect = Expect("expected_attention", queries)
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
    given = "cos" if cos is not None else "sin"
    expect((cos is None) == (sin is None), "cos and sin or neither, got {} alone", given)
    for name, turn in (("cos", cos), ("sin", sin)):
        if turn is None:
            continue
        fits = turn.dim() == 3 and turn.shape[0] in (1, batch) and turn.shape[1] == num_keys
        fits = fits and turn.shape[2] % 2 == 0 and turn.shape[2] <= head_dim
        expect(
            fits,
            name + " [{} or 1, {}, an even number of up to {} channels], got {}",
            batch,
            num_keys,
            head_dim,
            list(turn.shape),
        )
        expect.tensor(name, turn, torch.float32, list(turn.shape))
    if cos is not None and sin is not None:
        same = cos.shape == sin.shape
        expect(same, "cos and sin of one shape, got {} and {}", list(cos.shape), list(sin.shape))


def project_tokens(hidden_states: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    """Check the arguments of ``project_tokens``."""
    expect = Expect("project_tokens", hidden_states)
    expect.rank("hidden_states", hidden_states, 3, "[batch, num_tokens, hidden_size]")
    expect.floating("hidden_states", hidden_states)
    hidden_size = hidden_states.shape[2]
    expect.tensor("weight", weight, hidden_states.dtype, ["num_projections", hidden_size])
    expect.tensor("mask", mask, torch.bool, hidden_states.shape[:2])


def mix_scores(
    scores: Tensor, weights: Tensor, experts: Tensor, gain: Tensor | None, offset: Tensor | None
) -> None:
    """Check the arguments of ``mix_scores``."""
    expect = Expect("mix_scores", scores)
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
    expect = Expect("select_kept", scores)
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
    expect = Expect("kv_compact_", keys)
    expect.rank("keys", keys, 4, "[batch, num_kv_heads, num_keys, head_dim]")
    expect.rank("values", values, 4, "[batch, num_kv_heads, num_keys, value_dim]")
    expect.floating("keys", keys)
    batch, num_kv_heads, num_keys, _ = keys.shape
    expect.tensor("values", values, keys.dtype, [batch, num_kv_heads, num_keys, "value_dim"])
    expect.most("positions", num_keys)
    for name, tensor in (("keys", keys), ("values", values)):
        expect(not packed or tensor.is_contiguous(), "contiguous {} with packed=True", name)
    if indices.dtype != torch.int32:
        expect(False, "indices of dtype int32, got {}", dtype_name(indices.dtype))
    expect.device("indices", indices)
    expect.most("indices", indices.numel())
    if offsets is None:
        expect.shape("indices", indices, [batch, num_kv_heads, "num_kept"])
    else:
        expect.rank("indices", indices, 1, "[num_indices] where there are offsets")
        expect.tensor("offsets", offsets, torch.int32, [batch * num_kv_heads + 1])

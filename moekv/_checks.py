"""What the ops expect of their arguments, as ``csrc/ops`` checks it for the native kernels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MAX_EXPERTS = 256
_MAX_HEAD_DIM = 256
_NUM_SCORE_KINDS = 4
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Expect:
    """The expectations of one op; every error names what was expected and what came."""

    def __init__(self, op: str, like: Tensor) -> None:
        self.op = op
        self.like = like

    def __call__(self, condition: bool, expected: str) -> None:
        if not condition:
            raise RuntimeError(f"moekv::{self.op}: expected {expected}")

    def rank(self, name: str, tensor: Tensor, rank: int, dims: str) -> None:
        self(tensor.dim() == rank, f"{name} {dims}, got {list(tensor.shape)}")

    def shape(self, name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
        """``shape`` holds a size or, where any will do, the name of a dimension."""
        fits = tensor.dim() == len(shape) and all(
            isinstance(want, str) or size == want
            for size, want in zip(tensor.shape, shape, strict=True)
        )
        self(fits, f"{name} [{', '.join(map(str, shape))}], got {list(tensor.shape)}")

    def dtype(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if dtype == torch.float32 and self.like.dtype == torch.float64:
            return  # in higher precision, what goes with it may have either
        names = [str(x).removeprefix("torch.") for x in (dtype, tensor.dtype)]
        self(tensor.dtype == dtype, f"{name} of dtype {names[0]}, got {names[1]}")

    def floating(self, name: str, tensor: Tensor) -> None:
        got = str(tensor.dtype).removeprefix("torch.")
        self(tensor.dtype in _FLOATS, f"{name} of dtype float32, float16 or bfloat16, got {got}")

    def device(self, name: str, tensor: Tensor) -> None:
        self(tensor.device == self.like.device, f"{name} on the device of the first argument")

    def tensor(
        self, name: str, tensor: Tensor | None, dtype: torch.dtype, shape: Sequence[int | str]
    ) -> None:
        if tensor is not None:
            self.shape(name, tensor, shape)
            self.dtype(name, tensor, dtype)
            self.device(name, tensor)


def gating_topk(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, k: int, temperature: float
) -> None:
    expect = _Expect("gating_topk", logits)
    expect.rank("logits", logits, 2, "[num_tokens, num_experts]")
    expect.floating("logits", logits)
    num_tokens, num_experts = logits.shape
    expect(1 <= num_experts <= _MAX_EXPERTS, f"1 to {_MAX_EXPERTS} experts, got {num_experts}")
    expect(1 <= k <= num_experts, f"k between 1 and num_experts = {num_experts}, got {k}")
    expect(temperature > 0, f"temperature > 0, got {temperature}")
    expect.tensor("bias", bias, torch.float32, [num_experts])
    expect.tensor("mask", mask, torch.bool, [num_tokens])


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
        f"num_query_heads to be a multiple of num_kv_heads = {num_kv_heads}, got {num_query_heads}",
    )
    expect(
        1 <= key_dim <= _MAX_HEAD_DIM and 1 <= value_dim <= _MAX_HEAD_DIM,
        f"head dims of 1 to {_MAX_HEAD_DIM}, got {key_dim} for keys and {value_dim} for values",
    )
    expect(
        num_queries <= num_keys,
        f"queries of at most num_keys = {num_keys} positions, got {num_queries}",
    )
    expect.tensor("start", start, torch.int32, [batch])
    expect(0 < scaling < math.inf, f"scaling > 0, got {scaling}")
    expect(0 <= softcap < math.inf, f"softcap >= 0, got {softcap}")
    expect(pool >= 1 and pool % 2 == 1, f"an odd pool >= 1, got {pool}")
    expect(lag >= 1, f"lag >= 1, got {lag}")
    for i, kind in enumerate(kinds):
        in_range = 0 <= kind < _NUM_SCORE_KINDS
        expect(in_range, f"kinds of 0 to {_NUM_SCORE_KINDS - 1}, got {kind}")
        expect(kind not in kinds[:i], f"distinct kinds, got {kind} twice")
    if 0 in kinds or 1 in kinds:
        expect(
            num_query_heads >= 1 and (num_queries >= 1 or num_keys == 0),
            f"at least one query for MASS and ATTENTION, got {list(queries.shape)}",
        )


def mix_scores(
    scores: Tensor, weights: Tensor, experts: Tensor, gain: Tensor | None, offset: Tensor | None
) -> None:
    expect = _Expect("mix_scores", scores)
    expect.rank("scores", scores, 4, "[num_experts, batch, num_kv_heads, num_keys]")
    expect.floating("scores", scores)
    num_experts, batch, num_kv_heads, num_keys = scores.shape
    expect(1 <= num_experts <= _MAX_EXPERTS, f"1 to {_MAX_EXPERTS} experts, got {num_experts}")
    for name, gate, dtype in (
        ("weights", weights, torch.float32),
        ("experts", experts, torch.int32),
    ):
        expect(
            gate.shape[:-1] in ((batch, num_keys), (batch, num_kv_heads, num_keys)),
            f"{name} [{batch}, {num_keys}, k] or [{batch}, {num_kv_heads}, {num_keys}, k], "
            f"got {list(gate.shape)}",
        )
        expect.dtype(name, gate, dtype)
        expect.device(name, gate)
    expect(
        weights.shape == experts.shape,
        f"weights and experts of one shape, got {list(weights.shape)} and {list(experts.shape)}",
    )
    for name, tensor in (("gain", gain), ("offset", offset)):
        expect.tensor(name, tensor, torch.float32, [num_experts, batch, num_kv_heads])


def select_kept(
    scores: Tensor, start: Tensor | None, total: Sequence[int], sinks: int, window: int, floor: int
) -> None:
    expect = _Expect("select_kept", scores)
    expect.rank("scores", scores, 3, "[groups, rows, num_keys]")
    expect.floating("scores", scores)
    groups, rows, num_keys = scores.shape
    expect(len(total) == groups, f"{groups} totals, one per group, got {len(total)}")
    for name, value in (("sinks", sinks), ("window", window), ("floor", floor)):
        expect(value >= 0, f"{name} >= 0, got {value}")
    for g, kept in enumerate(total):
        expect(
            rows <= kept <= rows * num_keys,
            f"total[{g}] between {rows} (one pair per row) and {rows * num_keys} (all), got {kept}",
        )
    expect.tensor("start", start, torch.int32, [groups, rows])


def kv_compact_(
    keys: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, packed: bool
) -> None:
    expect = _Expect("kv_compact_", keys)
    expect.rank("keys", keys, 4, "[batch, num_kv_heads, num_keys, head_dim]")
    batch, num_kv_heads, num_keys, _ = keys.shape
    expect.shape("values", values, [batch, num_kv_heads, num_keys, "value_dim"])
    expect.device("values", values)
    if packed:
        for name, tensor in (("keys", keys), ("values", values)):
            expect(tensor.is_contiguous(), f"contiguous {name} with packed=True")
    expect.dtype("indices", indices, torch.int32)
    expect.device("indices", indices)
    if offsets is None:
        expect.shape("indices", indices, [batch, num_kv_heads, "num_kept"])
    else:
        expect.rank("indices", indices, 1, "[num_indices] where there are offsets")
        expect.tensor("offsets", offsets, torch.int32, [batch * num_kv_heads + 1])

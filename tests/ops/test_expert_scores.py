import math
from typing import Any

import op_cases
import pytest
import torch
from memory import peak_mib
from targets import on_any_number_of_threads, refuses
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moekv import ops
from moekv.ops import ScoreKind, reference
from moekv.ops.reference.expert_scores import _attention

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = list(ScoreKind)


def scores_of(target, keys, values, queries, start=None, *, kinds=ALL, scaling=1.0, **options):
    return target.op("expert_scores")(
        keys, values, queries, start, kinds=list(map(int, kinds)), scaling=scaling, **options
    )


def pairs(target, *shape: int, seed: int = 0, num_queries: int = 4) -> list[Tensor]:
    """Keys, values and queries of two heads per KV head."""
    batch, num_kv_heads, num_keys, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, length, head_dim, generator=generator).to(target.device)
        for heads, length in (
            (num_kv_heads, num_keys),
            (num_kv_heads, num_keys),
            (2 * num_kv_heads, num_queries),
        )
    ]


@pytest.mark.parametrize("case", op_cases.EXPERT_SCORES, ids=str)
def test_matches_reference(target, case):
    op_cases.check_expert_scores(target.op("expert_scores"), case, target.device)


@pytest.mark.parametrize("num_keys", [1, 31, 200])
def test_mass_sums_to_one(target, num_keys):
    inputs = pairs(target, 3, 2, num_keys, 24, num_queries=min(num_keys, 9))
    start = torch.tensor([0, num_keys - 1, num_keys // 2], dtype=torch.int32, device=target.device)
    mass = scores_of(target, *inputs, start, kinds=[ScoreKind.MASS])
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))


def test_large_logits_do_not_overflow(target):
    keys, values, queries = pairs(target, 1, 2, 90, 16)
    scores = scores_of(target, keys * 100, values, queries * 100, kinds=[0, 1])
    expected = reference.expert_scores(
        *(x.double() for x in (keys * 100, values, queries * 100)), kinds=[0, 1], scaling=1.0
    )
    assert scores.isfinite().all()
    # Where one key takes everything, the rest is at the floor.
    torch.testing.assert_close(scores[0].double(), expected[0], rtol=0, atol=2e-2)
    assert scores[1].min() == pytest.approx(math.log(1e-20))


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("pool", [1, 5])
def test_padded_row_scores_as_it_does_alone(target, pool, dtype):
    inputs = [x.to(dtype) for x in pairs(target, 3, 2, 150, 32, num_queries=9)]
    start = [0, 37, 145]
    tensor = torch.tensor(start, dtype=torch.int32, device=target.device)
    scores = scores_of(target, *inputs, tensor, pool=pool, lag=16)
    for b, first in enumerate(start):
        keys, values, queries = (x[b : b + 1] for x in inputs)
        queries = queries[:, :, -min(9, 150 - first) :]
        alone = scores_of(
            target, keys[:, :, first:], values[:, :, first:], queries, pool=pool, lag=16
        )
        torch.testing.assert_close(scores[:, b, :, first:], alone[:, 0], rtol=1e-5, atol=1e-5)
        assert (scores[0, b, :, :first] == 0).all()
        assert (scores[1:, b, :, :first] == -torch.inf).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 6e4])
def test_padding_is_never_read(target, garbage):
    keys, values, queries = pairs(target, 2, 2, 100, 16, num_queries=8)
    start = torch.tensor([96, 30], dtype=torch.int32, device=target.device)
    clean = scores_of(target, keys, values, queries, start, pool=3, lag=8)
    for b, first in enumerate(start.tolist()):
        keys[b, :, :first] = garbage
        values[b, :, :first] = garbage
        queries[b, :, : max(0, 8 - (100 - first))] = garbage
    assert torch.equal(scores_of(target, keys, values, queries, start, pool=3, lag=8), clean)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("position", [0, 3, -1])
def test_not_finite_stays_in_its_head(target, poison, which, position):
    inputs = pairs(target, 2, 3, 70, 16)
    clean = scores_of(target, *inputs, lag=16)
    head = 1 if which < 2 else 3  # query heads 2 and 3 belong to KV head 1
    inputs[which][1, head, position, 5] = poison
    scores = scores_of(target, *inputs, lag=16)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(scores[:, others], clean[:, others])
    # The other kinds of the head itself do not see what they do not read.
    unaffected = {0: [], 1: [0, 1, 2], 2: [2, 3]}[which]
    assert torch.equal(scores[unaffected], clean[unaffected])


def test_nan_shows(target):
    """A score that cannot be computed is NaN, never a plausible number."""
    inputs = pairs(target, 1, 1, 70, 16)
    inputs[0][0, 0, 20, 5] = math.nan
    assert scores_of(target, *inputs, lag=16)[:, 0, 0, 20].isnan().all()


def test_zero_keys(target):
    keys, values, queries = pairs(target, 1, 2, 40, 16)
    keys[:, :, 10] = 0
    keys[:, 1] = 0
    diversity = scores_of(target, keys, values, queries, kinds=[ScoreKind.DIVERSITY])[0]
    assert (diversity[:, 0, 10] == 0).all()
    assert (diversity[:, 1] == 0).all()


def test_constant_channels(target):
    """Channels that do not vary have no range; what is left is scaled by 1e-6."""
    keys, values, queries = (torch.ones_like(x) for x in pairs(target, 1, 2, 40, 16))
    lag = scores_of(target, keys, values, queries, kinds=[ScoreKind.LAG], lag=8)
    torch.testing.assert_close(lag, torch.zeros_like(lag), rtol=0, atol=1e-6)
    keys[:, :, 3, 0] = 2  # far out of a range of width 0: all the weight of its partition
    lag = scores_of(target, keys, values, queries, kinds=[ScoreKind.LAG], lag=8)[0]
    expected = torch.tensor([math.log(0.5)] * 8)
    expected[3] = math.log((8 + 1) / 2)
    torch.testing.assert_close(lag[0, 0, :8].cpu(), expected)


def test_order_of_kinds(target):
    inputs = pairs(target, 1, 2, 50, 16)
    scores = scores_of(target, *inputs)
    for kinds in ([2, 0], [3, 1, 2], [1]):
        some = scores_of(target, *inputs, kinds=kinds)
        torch.testing.assert_close(some, scores[kinds], rtol=1e-6, atol=1e-6)


def test_threads_change_nothing(native):
    case = op_cases.ExpertScores((2, 2, 3000, 64), start=(0, 700), num_queries=33, pool=5)
    inputs, options = case.inputs(native.device)
    on_any_number_of_threads(lambda: native.op("expert_scores")(*inputs, **options))


def test_memory_is_linear_in_the_keys(native):
    """The [W, T] matrix would take 128 MiB in bf16 here."""
    if native.device != "cpu":
        pytest.skip("measures the memory of the process")
    keys, values = (torch.ones(1, 8, 32768, 128, dtype=torch.bfloat16) for _ in range(2))
    queries = torch.ones(1, 32, 64, 128, dtype=torch.bfloat16)
    scores_of(native, keys[:, :, :64], values[:, :, :64], queries)
    output_mib = 4
    assert peak_mib(lambda: scores_of(native, keys, values, queries)) - output_mib < 32


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
def test_opcheck(native, dtype):
    case = op_cases.ExpertScores((2, 2, 40, 16), start=(0, 7), pool=3, dtype=dtype)
    inputs, options = case.inputs(native.device)
    torch.library.opcheck(torch.ops.moekv.expert_scores, inputs, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [30.0, 1e3, 1e4])
def test_mass_sums_to_1_however_large_the_logits(target, size, dtype):
    """The largest is subtracted before logits are scaled, and both passes round alike."""
    generator = torch.Generator().manual_seed(1)
    keys = (torch.randn(1, 2, 400, 64, generator=generator) * size).to(target.device, dtype)
    for queries in (keys[:, :, -8:], keys[:, :, -1:].expand(-1, -1, 8, -1)):
        mass = scores_of(target, keys, keys, queries, kinds=[0], scaling=0.1234)
        torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), atol=1e-5, rtol=0)
    alone = keys[:, :, :1]
    mass = scores_of(target, alone, alone, alone, kinds=[0], scaling=0.1234)
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pool", [3, 65, 385, 801, 10**6 + 1])
def test_wide_pools_keep_what_little_is_left(target, pool):
    """No running difference: where nearly all attention has left the pool, the rest is exact."""
    keys = torch.zeros(1, 2, 900, 8)
    keys[..., 0] = -40 - torch.arange(900) / 100.0
    keys[:, :, 450] = 0
    queries, start = torch.eye(8)[0].expand(1, 2, 4, 8), torch.tensor([7]).int()
    mass = reference.expert_scores(
        keys.double(), keys.double(), queries.double(), start, kinds=[0], scaling=1.0
    )[0, 0, :, 7:]
    attention = mass * 4 / (893 - torch.arange(893)).clamp(max=4)
    reach = min(pool // 2, 893)
    means = [attention[:, max(t - reach, 0) : t + reach + 1].mean(-1) for t in range(893)]
    got = target.op("expert_scores")(
        keys.to(target.device),
        keys.to(target.device),
        queries.to(target.device),
        start.to(target.device),
        kinds=[1],
        scaling=1.0,
        pool=pool,
    )[0, 0, :, 7:].cpu()
    expected = torch.stack(means, -1).clamp(min=1e-20).log()
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=0)


class Written(TorchDispatchMode):
    """Counts the numbers that operations hand out."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **kwargs or {})
        self.count += sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


def test_a_wide_pool_costs_no_more_than_a_narrow_one():
    """Counted, not timed: sums run along the text once, however many places each one covers."""
    counts = {}
    for length in (4096, 8192):
        attention, start = torch.rand(1, 2, length), torch.zeros(1, 1, 1).int()
        for pool in (3, 65, 1025):
            with Written() as written:
                _attention(attention, start, 4, pool)
            counts[length, pool] = written.count
        assert counts[length, 1025] < 1.5 * counts[length, 3]
        assert counts[length, 65] < 1.1 * counts[length, 3]
    assert counts[8192, 1025] < 2.1 * counts[4096, 1025]


GOOD = {
    "keys": torch.zeros(2, 2, 9, 8),
    "values": torch.zeros(2, 2, 9, 6),
    "queries": torch.zeros(2, 4, 3, 8),
    "start": None,
    "kinds": [0, 1, 2, 3],
    "scaling": 1.0,
}
BAD = {
    "keys": ({"keys": torch.zeros(2, 9, 8)}, r"keys \[batch, num_kv_heads, .* got \[2, 9, 8\]"),
    "values": ({"values": torch.zeros(9, 6)}, r"values \[batch, num_kv_heads, .* got \[9, 6\]"),
    "queries": ({"queries": torch.zeros(8)}, r"queries \[batch, num_query_heads, .* got \[8\]"),
    "keys dtype": ({"keys": torch.zeros(2, 2, 9, 8).int()}, "keys of dtype .*, got int32"),
    "values dtype": ({"values": torch.zeros(2, 2, 9, 6).half()}, "values of dtype .* got float16"),
    "queries dtype": (
        {"queries": torch.zeros(2, 4, 3, 8).half()},
        "queries of dtype float32, got float16",
    ),
    "values shape": (
        {"values": torch.zeros(2, 2, 8, 6)},
        r"values \[2, 2, 9, value_dim\], got \[2, 2, 8, 6\]",
    ),
    "queries dim": (
        {"queries": torch.zeros(2, 4, 3, 7)},
        r"queries \[2, num_query_heads, num_queries, 8\], got \[2, 4, 3, 7\]",
    ),
    "heads": (
        {"queries": torch.zeros(2, 3, 3, 8)},
        "num_query_heads to be a multiple of num_kv_heads = 2, got 3",
    ),
    "head dim": (
        {"keys": torch.zeros(2, 2, 9, 1025), "queries": torch.zeros(2, 4, 3, 1025)},
        "head dims of 1 to (256|1024), got 1025 for keys and 6 for values",
    ),
    "value dim": (
        {"values": torch.zeros(2, 2, 9, 0)},
        "head dims of 1 to (256|1024), got 8 .* and 0",
    ),
    "window": ({"queries": torch.zeros(2, 4, 10, 8)}, "at most num_keys = 9 positions, got 10"),
    "no queries": ({"queries": torch.zeros(2, 4, 0, 8)}, "at least one query for MASS and ATTENT"),
    "start shape": ({"start": torch.zeros(3).int()}, r"start \[2\], got \[3\]"),
    "start dtype": ({"start": torch.zeros(2).long()}, "start of dtype int32, got int64"),
    "kind": ({"kinds": [0, 4]}, "kinds of 0 to 3, got 4"),
    "negative kind": ({"kinds": [-1]}, "kinds of 0 to 3, got -1"),
    "same kind": ({"kinds": [1, 2, 1]}, "distinct kinds, got 1 twice"),
    "scaling": ({"scaling": 0.0}, "scaling between 1e-18 and 1e18, got 0"),
    "scaling nan": ({"scaling": math.nan}, "scaling between 1e-18 and 1e18, got nan"),
    "scaling inf": ({"scaling": math.inf}, "scaling between .*, got inf"),
    "scaling beyond float32": ({"scaling": 1e60}, r"scaling between .*, got 1e\+60"),
    "softcap nan": ({"softcap": math.nan}, "a softcap of 0 or between .*, got nan"),
    "softcap": ({"softcap": -1.0}, "a softcap of 0 or between .*, got -1"),
    "softcap inf": ({"softcap": math.inf}, "a softcap of 0 or between .*, got inf"),
    "pool": ({"pool": 2}, "an odd pool >= 1, got 2"),
    "no pool": ({"pool": -1}, "an odd pool >= 1, got -1"),
    "lag": ({"lag": 0}, "lag >= 1, got 0"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input(target, change, message):
    refuses(target, "expert_scores", GOOD | change, message)


def test_wrapper_takes_kinds_by_name(target):
    keys, values, queries = pairs(target, 1, 2, 20, 8)
    kinds = (ScoreKind.LAG, ScoreKind.MASS)
    got = ops.expert_scores(keys, values, queries, kinds=kinds, scaling=0.5, backend=target.backend)
    assert torch.equal(got, scores_of(target, keys, values, queries, kinds=[3, 0], scaling=0.5))

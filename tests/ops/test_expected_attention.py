import math
from fractions import Fraction

import op_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory import peak_mib
from targets import NATIVE_TARGETS, on_any_number_of_threads, refuses
from torch import Tensor

from moekv import ops
from moekv.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

REACH = 4


def sample(length: int) -> dict[int, float]:
    """How many keys of a row each of those stands for that stand for all."""
    if length <= 64:
        return dict.fromkeys(range(length), 1.0)
    weights = dict.fromkeys(range(4), 1.0)
    size = Fraction(length - 4, 60)
    for part in range(60):
        place = 4 + math.floor((part + Fraction(part * 40503, 65536) % 1) * size)
        weights[place] = weights.get(place, 0.0) + float(size)
    return weights


def plain_scores(
    queries: Tensor, keys: Tensor, *, scaling: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """Score the pairs of one row [H, T], query by query, in fp64."""
    queries, keys = queries.cpu().double(), keys.cpu().double()
    num_heads, length, _ = keys.shape
    group = len(queries) // num_heads
    weights = torch.zeros(length, dtype=torch.float64)
    for place, weight in sample(length).items():
        weights[place] = weight
    squares = torch.zeros(num_heads, length, dtype=torch.float64)
    for head in range(num_heads):
        for query in queries[head * group : (head + 1) * group]:
            for i in range(length):
                logits = keys[head] @ query[i] * scaling
                if softcap:
                    logits = softcap * (logits / softcap).tanh()
                near = torch.zeros(length, dtype=torch.float64)
                near[i : i + REACH + 1] = 1
                terms = weights if length <= 64 else weights + near
                seen = logits[terms > 0]
                total = (seen + terms[terms > 0].log()).logsumexp(0)
                squares[head] += near * ((logits - total).exp() ** 2) / group
    return squares.clamp(min=1e-36).log() / 2


def pairs(target, *shape: int, group: int = 2, seed: int = 0) -> list[Tensor]:
    batch, num_kv_heads, num_keys, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, num_keys, head_dim, generator=generator).to(target.device)
        for heads in (num_kv_heads * group, num_kv_heads)
    ]


def check(op, queries: Tensor, keys: Tensor, start: Tensor | None, **options: float) -> None:
    scores = op(queries, keys, start, **options).cpu()
    for b in range(len(keys)):
        first = min(max(int(start[b]), 0), keys.shape[2]) if start is not None else 0
        assert (scores[b, :, :first] == 0).all()
        wanted = plain_scores(queries[b, :, first:], keys[b, :, first:], **options)
        torch.testing.assert_close(scores[b, :, first:].double(), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", op_cases.EXPECTED_ATTENTION, ids=str)
def test_matches_reference(target, case):
    op_cases.check_expected_attention(target.op("expected_attention"), case, target.device)


@pytest.mark.parametrize(
    "case",
    [
        *(op_cases.ExpectedAttention((1, 2, t, 16), 1) for t in (1, 3, 5, 63, 64, 65, 66)),
        op_cases.ExpectedAttention((1, 1, 150, 80), 3),
        op_cases.ExpectedAttention((3, 2, 90, 33), 4, (0, 30, 90), layout="bthd"),
        op_cases.ExpectedAttention((1, 1, 100, 64), 8, dtype=op_cases.BF16),
        op_cases.ExpectedAttention((2, 1, 100, 31), 2, (3, 99), softcap=2.0, dtype=op_cases.FP16),
        op_cases.ExpectedAttention((1, 1, 300, 32), 2, softcap=5.0),
    ],
    ids=str,
)
def test_query_by_query(target, case):
    inputs, options = case.inputs(target.device)
    check(target.op("expected_attention"), *inputs, **options)


@pytest.mark.parametrize("case", op_cases.TURNED, ids=str)
def test_rotates_queries_first(target, case):
    if target.device != "cpu":
        pytest.skip("queries are rotated before the kernel")
    op_cases.check_expected_attention(target.op("expected_attention"), case, target.device)


@pytest.mark.parametrize("turned", [2, 20, 40])
def test_a_rotation_is_a_product_of_complex_numbers(target, turned):
    case = op_cases.ExpectedAttention((2, 1, 90, 40), 3, (0, 9), turned=turned, own_turns=True)
    (queries, keys, start, cos, sin), options = case.inputs(target.device)
    # Both halves have the same angles in a rotation; cosines and sines of each need not.
    cos, sin = (x[..., : turned // 2].repeat(1, 1, 2) for x in (cos, sin))
    given = queries, keys, start, cos.contiguous(), sin.contiguous()
    got = ops.expected_attention(*given, backend=target.backend, **options)
    half = turned // 2
    number = torch.complex(queries[..., :half].double(), queries[..., half:turned].double())
    number = number * torch.complex(cos[..., :half].double(), sin[..., :half].double())[:, None]
    plain = torch.cat([number.real, number.imag, queries[..., turned:].double()], -1).float()
    check(lambda *_, **__: got, plain, keys, start, **options)


def test_the_rotation_of_padding_is_not_read(target):
    case = op_cases.ExpectedAttention((2, 1, 90, 16), 2, (0, 30), turned=16, own_turns=True)
    (*inputs, cos, sin), options = case.inputs(target.device)
    clean = ops.expected_attention(*inputs, cos, sin, backend=target.backend, **options)
    cos[1, :30] = sin[1, :30] = math.nan
    got = ops.expected_attention(*inputs, cos, sin, backend=target.backend, **options)
    assert torch.equal(got, clean)


def test_rotations_that_do_not_fit(target):
    case = op_cases.ExpectedAttention((2, 1, 30, 16), turned=8)
    (queries, keys, start, cos, sin), _ = case.inputs(target.device)

    def refused(message: str, *turn: Tensor | None) -> None:
        with pytest.raises(RuntimeError, match=message):
            ops.expected_attention(queries, keys, start, *turn, backend=target.backend)

    refused("cos and sin or neither, got cos alone", cos, None)
    refused("cos and sin or neither, got sin alone", None, sin)
    refused(r"cos \[2 or 1, 30, an even number of up to 16 channels\], got", cos[:, 1:], sin)
    refused("sin .*, got ", cos, sin[..., :7])
    refused("cos .*, got ", torch.cat([cos] * 3, -1), torch.cat([sin] * 3, -1))
    refused("cos .*, got ", cos.expand(3, -1, -1), sin)
    refused("cos and sin of one shape", cos, sin.expand(2, -1, -1))
    refused("cos of dtype float32, got bfloat16", cos.bfloat16(), sin)


@given(st.data())
def test_any_shape(data):
    batch, num_kv_heads = (data.draw(st.integers(1, 2), label=x) for x in ("batch", "heads"))
    num_keys, head_dim = (data.draw(st.integers(1, n), label="size") for n in (90, 40))
    start = data.draw(st.lists(st.integers(-1, num_keys), min_size=batch, max_size=batch))
    case = op_cases.ExpectedAttention(
        (batch, num_kv_heads, num_keys, head_dim),
        group=data.draw(st.integers(1, 4)),
        start=tuple(start),
        softcap=data.draw(st.sampled_from([0.0, 3.0])),
        dtype=data.draw(st.sampled_from(op_cases.FLOAT_DTYPES)),
        layout=data.draw(st.sampled_from(["dense", "bthd", "gaps"])),
    )
    for native in NATIVE_TARGETS:
        inputs, options = case.inputs(native.device)
        check(native.op("expected_attention"), *inputs, **options)


@pytest.mark.parametrize("length", [*range(65, 75), 100, 1000, 4097, 131_072, 2**31 - 1])
def test_a_sample_stands_for_all_keys(length):
    """Each key once in its part, the weights those of all of them together."""
    places, weights = reference.sample_places(torch.tensor(length))
    assert weights.sum().item() == pytest.approx(length, rel=1e-5)
    assert places[:4].tolist() == list(range(4))
    assert (places.diff() >= 0).all() and places[-1] < length
    part = (places[4:] - 4) * 60 // (length - 4)
    assert (part - torch.arange(60)).abs().max() <= 1
    assert sample(length).keys() == set(places.tolist())


@pytest.mark.parametrize("length", [65, 66, 1031, 70_000])
def test_sampled_places_are_the_ones_that_count(target, length):
    """A key that takes all the attention takes it where it is in the sample, and nowhere else."""
    keys = torch.zeros(1, 1, length, 1, device=target.device)
    queries = torch.ones_like(keys)
    places = list(sample(length))
    another = next(i for i in range(length // 2, length) if i not in places)
    for place, counts in ((places[30], True), (places[-1], True), (another, False)):
        row = keys.clone()
        row[..., place, 0] = 40
        score = target.op("expected_attention")(queries, row)[0, 0, place // 2 - 5]
        assert (score < -30) == counts


def test_what_a_token_asked_for_ranks_first(target):
    """A query that looks at the key behind its own raises that pair above all others."""
    queries, keys = (x.zero_() if i == 0 else x for i, x in enumerate(pairs(target, 1, 1, 200, 64)))
    keys = torch.nn.functional.normalize(keys, dim=-1)
    queries[0, :, 120] = 300 * keys[0, 0, 121]
    assert target.op("expected_attention")(queries, keys, scaling=0.1).argmax() == 121


def test_large_logits_do_not_overflow(target):
    queries, keys = pairs(target, 1, 2, 300, 16)
    scores = target.op("expected_attention")(queries * 100, keys * 100)
    assert scores.isfinite().all() and scores.max() <= 0.5 * math.log(5) + 1e-3
    assert scores.min() == pytest.approx(0.5 * math.log(1e-36))


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("length", [40, 150, 600])
def test_padded_row_scores_as_it_does_alone(target, dtype, length):
    queries, keys = (x.to(dtype) for x in pairs(target, 3, 2, length, 32, group=3))
    start = [0, 37, length - 1]
    tensor = torch.tensor(start, dtype=torch.int32, device=target.device)
    scores = target.op("expected_attention")(queries, keys, tensor)
    for b, first in enumerate(start):
        alone = target.op("expected_attention")(
            queries[b : b + 1, :, first:], keys[b : b + 1, :, first:]
        )
        if target.backend == "torch":
            torch.testing.assert_close(scores[b, :, first:], alone[0], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(scores[b, :, first:], alone[0])


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 6e4])
def test_padding_is_never_read(target, garbage):
    queries, keys = pairs(target, 3, 2, 300, 16)
    start = torch.tensor([290, 30, 300], dtype=torch.int32, device=target.device)
    clean = target.op("expected_attention")(queries, keys, start)
    for b, first in enumerate(start.tolist()):
        queries[b, :, :first] = garbage
        keys[b, :, :first] = garbage
        assert (clean[b, :, :first] == 0).all()
    assert torch.equal(target.op("expected_attention")(queries, keys, start), clean)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("position", [0, 3, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_finite_stays_in_its_head(target, poison, which, position, dtype):
    inputs = [x.to(dtype) for x in pairs(target, 2, 3, 260, 16)]
    clean = target.op("expected_attention")(*inputs)
    head = 3 if which == 0 else 1  # query heads 2 and 3 belong to KV head 1
    inputs[which][1, head, position, 5] = poison
    scores = target.op("expected_attention")(*inputs)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(scores[others], clean[others])


def test_nan_shows(target):
    """A score that cannot be computed is NaN, never a plausible number."""
    queries, keys = pairs(target, 1, 1, 200, 16)
    keys[0, 0, 100, 5] = math.nan
    assert target.op("expected_attention")(queries, keys)[0, 0, 100].isnan()
    queries, keys = pairs(target, 1, 1, 200, 16)
    queries[0, 1, 100, 5] = math.nan
    scores = target.op("expected_attention")(queries, keys)[0, 0]
    assert scores[100:105].isnan().all() and scores.isnan().sum() == 5


def test_threads_change_nothing(native):
    case = op_cases.ExpectedAttention((2, 2, 3000, 64), 3, (0, 700), dtype=op_cases.BF16)
    inputs, options = case.inputs(native.device)
    on_any_number_of_threads(lambda: native.op("expected_attention")(*inputs, **options))


def test_memory_does_not_grow_with_the_keys(native):
    """The logits of all queries on the sample would take 64 MiB here."""
    if native.device != "cpu":
        pytest.skip("measures the memory of the process")
    queries = torch.ones(1, 8, 32768, 64, dtype=torch.bfloat16)
    keys = torch.ones(1, 2, 32768, 64, dtype=torch.bfloat16)
    op = native.op("expected_attention")
    op(queries[:, :, :100], keys[:, :, :100])
    assert peak_mib(lambda: op(queries, keys)) < 8


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
def test_opcheck(native, dtype):
    case = op_cases.ExpectedAttention((2, 2, 70, 16), start=(0, 3), dtype=dtype)
    inputs, options = case.inputs(native.device)
    torch.library.opcheck(torch.ops.moekv.expected_attention, inputs, options)


def test_opcheck_with_a_rotation(native):
    if native.device != "cpu":
        pytest.skip("queries are rotated before the kernel")
    case = op_cases.ExpectedAttention((2, 2, 70, 16), start=(0, 3), turned=10)
    inputs, options = case.inputs()
    torch.library.opcheck(torch.ops.moekv.expected_attention, inputs, options)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_compiles_as_one_graph(target, dynamic):
    def half(queries: Tensor, keys: Tensor, start: Tensor | None) -> Tensor:
        keys = keys / 2
        return ops.expected_attention(queries, keys, start, backend=target.backend).sigmoid()

    torch.compiler.reset()
    # Of PyTorch's own operations alone: to trace them is enough, to compile them takes minutes.
    backend = "aot_eager" if target.backend == "torch" else "inductor"
    compiled = torch.compile(half, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (40, 77, 90):
        inputs, _ = op_cases.ExpectedAttention((2, 2, length, 16), start=(0, 9)).inputs(
            target.device
        )
        torch.testing.assert_close(compiled(*inputs), half(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [30.0, 1e3, 1e4])
def test_large_logits(target, size, dtype):
    """A single token gets all attention; five that are equal share it, whatever their size."""
    token = (torch.full((1, 1, 1, 64), size) + torch.arange(64) * size / 77).to(dtype)
    for count in (1, 5, 64):
        tokens = token.expand(1, 1, count, 64).contiguous().to(target.device)
        got = target.op("expected_attention")(tokens, tokens, scaling=0.1234).cpu()
        shares = torch.arange(1, count + 1).clamp(max=5).sqrt() / count
        torch.testing.assert_close(got[0, 0], shares.log(), atol=1e-5, rtol=0)


GOOD = {"queries": torch.zeros(2, 4, 9, 8), "keys": torch.zeros(2, 2, 9, 8)}
BAD = {
    "queries": ({"queries": torch.zeros(4, 9, 8)}, r"queries \[batch, .* got \[4, 9, 8\]"),
    "keys": ({"keys": torch.zeros(2, 9, 8)}, r"keys \[batch, num_kv_heads, .* got \[2, 9, 8\]"),
    "queries dtype": ({"queries": torch.zeros(2, 4, 9, 8).int()}, "queries of dtype .* got int32"),
    "keys dtype": ({"keys": torch.zeros(2, 2, 9, 8).half()}, "keys of dtype float32, got float16"),
    "batch": (
        {"keys": torch.zeros(1, 2, 9, 8)},
        r"keys \[2, num_kv_heads, 9, 8\], got \[1, 2, 9, 8\]",
    ),
    "length": ({"keys": torch.zeros(2, 2, 8, 8)}, r"keys \[2, num_kv_heads, 9, 8\], got .* 8, 8\]"),
    "dim": ({"keys": torch.zeros(2, 2, 9, 7)}, r"keys \[2, num_kv_heads, 9, 8\], got .* 9, 7\]"),
    "heads": (
        {"keys": torch.zeros(2, 3, 9, 8)},
        "num_query_heads to be a multiple of num_kv_heads = 3, got 4",
    ),
    "no heads": ({"keys": torch.zeros(2, 0, 9, 8)}, "a multiple of num_kv_heads = 0, got 4"),
    "no query heads": ({"queries": torch.zeros(2, 0, 9, 8)}, "of num_kv_heads = 2, got 0"),
    "head dim": (
        {"queries": torch.zeros(2, 4, 9, 1025), "keys": torch.zeros(2, 2, 9, 1025)},
        "a head dim of 1 to (256|1024), got 1025",
    ),
    "start shape": ({"start": torch.zeros(3).int()}, r"start \[2\], got \[3\]"),
    "start dtype": ({"start": torch.zeros(2).long()}, "start of dtype int32, got int64"),
    "scaling": ({"scaling": 0.0}, "scaling between 1e-18 and 1e18, got 0"),
    "scaling nan": ({"scaling": math.nan}, "scaling between 1e-18 and 1e18, got nan"),
    "softcap": ({"softcap": -1.0}, "softcap of 0 or between 1e-18 and 1e18, got -1"),
    "softcap inf": ({"softcap": math.inf}, "softcap of 0 or between 1e-18 and 1e18, got inf"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input(target, change, message):
    refuses(target, "expected_attention", GOOD | change, message)


def test_wrapper(target):
    case = op_cases.ExpectedAttention((2, 2, 80, 16), start=(0, 3), softcap=2.0)
    inputs, options = case.inputs(target.device)
    got = ops.expected_attention(*inputs, **options, backend=target.backend)
    assert torch.equal(got, target.op("expected_attention")(*inputs, **options))

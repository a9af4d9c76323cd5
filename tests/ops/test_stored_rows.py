"""ragged_attention over quantised rows, with biases and sinks, against fp64 of what they say."""

import itertools
import math

import pytest
import torch
from ragged_cases import CASES, DTYPES
from stored_rows import expected, make_rows
from targets import on_any_number_of_threads, refuses

from moekv import ops
from moekv.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    name: {**case, "stored": min(case.get("stored", 300), 300)} for name, case in CASES.items()
}
EVEN = {name for name in SMALL if name not in ("odd dims", "one dim")}


def run(target, case, **options):
    moved = {k: x.to(target.device) if isinstance(x, torch.Tensor) else x for k, x in case.items()}
    return target.op("ragged_attention")(**moved, **options).cpu()


def value_dim(name):
    return CASES[name].get("value_dim") or CASES[name].get("dim", 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("pairs", ops.PAIRS)
def test_matches_attention_over_what_the_rows_say(target, pairs, name, dtype):
    if "4" in pairs and name not in EVEN:
        pytest.skip("an odd head dim")
    options = {"scaling": CASES[name].get("dim", 64) ** -0.5}
    for bias, sinks, softcap in ((False, False, 0.0), (True, True, 5.0), (True, False, 0.0)):
        case = make_rows(pairs, dtype, bias, sinks, **SMALL[name])
        options["softcap"] = softcap
        want = expected(case, value_dim(name), **options)
        got = run(target, case, **options)
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got.double(), want, atol=DTYPES[dtype], rtol=DTYPES[dtype])


@pytest.mark.parametrize("dim", [48, 64])
@pytest.mark.parametrize("pairs", ops.PAIRS)
def test_masks_hide_the_tail_alone(target, pairs, dim):
    case = make_rows(
        pairs, torch.float32, True, True, batch=2, heads=2, group=3, queries=4, tail=9, dim=dim
    )
    case["mask"] = torch.rand(2, 6, 4, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    want = expected(case, dim, scaling=0.1)
    torch.testing.assert_close(run(target, case, scaling=0.1).double(), want, atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("pairs", ops.PAIRS)
def test_strides(target, pairs, dim):
    case = make_rows(pairs, torch.float32, True, True, queries=3, tail=6, dim=dim, stored=90)
    want = run(target, case, scaling=0.25)
    strided = dict(case)
    strided["keys"] = torch.cat([case["keys"], case["keys"]], 1)[:, : case["keys"].shape[1]]
    strided["values"] = case["values"].T.contiguous().T
    strided["bias"] = case["bias"].repeat_interleave(2)[::2]
    strided["sinks"] = case["sinks"].repeat_interleave(2)[::2]
    if pairs != "16":
        strided["scales"] = torch.cat([case["scales"]] * 2, 1)[:, : case["scales"].shape[1]]
    torch.testing.assert_close(run(target, strided, scaling=0.25), want)
    if pairs != "16":
        strided["scales"] = case["scales"].T.contiguous().T
        torch.testing.assert_close(run(target, strided, scaling=0.25), want)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pairs", ops.PAIRS)
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("dim", [48, 64])
def test_a_pair_that_is_no_number_is_loud_unless_it_is_hidden(target, dim, part, pairs, bad):
    """Nor does it reach the heads that do not hold it."""
    shape = {"heads": 2, "group": 2, "queries": 2, "tail": 2, "dim": dim, "stored": 150}
    case = make_rows("16", torch.float32, True, False, **shape)
    case["begin"], case["end"] = torch.tensor([[0, 70]]).int(), torch.tensor([[70, 150]]).int()
    case["bias"][77] = 0.5
    clean = run(target, quantised_again(case, pairs), scaling=0.1)
    case[part][77, 5] = bad
    got = run(target, quantised_again(case, pairs), scaling=0.1)
    assert torch.equal(got[:, :, :2], clean[:, :, :2])
    lost = ~got[:, :, 2:].isfinite()
    assert lost.all() if pairs != "16" else lost.any()
    case["bias"][77] = -math.inf
    hidden = run(target, quantised_again(case, pairs), scaling=0.1)
    case[part][77] = 0.0
    assert torch.equal(hidden, run(target, quantised_again(case, pairs), scaling=0.1))


def quantised_again(case, pairs):
    if pairs == "16":
        return case
    coded = reference.quantize_pairs(case["keys"], case["values"], pairs=pairs)
    return case | dict(zip(("keys", "values", "scales"), coded, strict=True)) | {"pairs": pairs}


@pytest.mark.parametrize("pairs", ops.PAIRS)
def test_all_hidden_is_zero_and_a_sink_takes_its_share(target, pairs):
    case = make_rows(pairs, torch.float32, True, False, tail=0, dim=32, stored=80)
    case["bias"].fill_(-math.inf)
    assert not run(target, case, scaling=0.1).any()
    assert not run(target, case | {"sinks": torch.zeros(8)}, scaling=0.1).any()
    case["bias"].fill_(0.25)
    plain = run(target, case, scaling=0.1)
    weak = run(target, case | {"sinks": torch.full((8,), -math.inf)}, scaling=0.1)
    assert torch.equal(weak, plain) and plain.any()
    strong = run(target, case | {"sinks": torch.full((8,), 1e4)}, scaling=0.1)
    assert not strong.any()
    broken = run(
        target, case | {"sinks": torch.tensor([0.0, 0, 0, 0, math.nan, 0, 0, 0])}, scaling=0.1
    )
    lost = broken.isnan()
    assert lost[0, 0, 4].all() and lost.sum() == 32


def test_large_biases_and_keys(target):
    for pairs, scale in itertools.product(ops.PAIRS, (1e4, 1e-4)):
        case = make_rows("16", torch.float32, True, True, dim=64, stored=200, tail=3)
        case["keys"] *= scale
        case["values"][:, 7] *= 1e4  # an outlier channel
        case["bias"] = torch.where(torch.arange(200) % 3 == 0, 100.0, case["bias"]).half()
        case = quantised_again(case, pairs)
        want = expected(case, 64, scaling=0.125 / scale)
        got = run(target, case, scaling=0.125 / scale)
        torch.testing.assert_close(
            got.double(), want, atol=2e-7 * float(want.abs().max()), rtol=2e-5
        )


@pytest.mark.parametrize("pairs", ops.PAIRS)
def test_a_channel_or_a_pair_may_dwarf_the_others(target, pairs):
    """Where queries and weights become whole numbers, these are fine enough for all the rest."""
    case = make_rows("16", torch.float32, False, False, queries=2, tail=0, dim=64, stored=333)
    case["query"][..., 9] *= 1e4
    case["keys"][:, 9] *= 1e-4  # as outlier channels are met: the products are of one size
    case["values"][::64] *= 1e5
    case = quantised_again(case, pairs)
    want = expected(case, 64, scaling=0.125)
    got = run(target, case, scaling=0.125)
    torch.testing.assert_close(got.double(), want, atol=2e-6 * float(want.abs().max()), rtol=2e-5)
    for tiny in (1e-27, 1e-30, 1e-42):
        faint = case | {"query": torch.full_like(case["query"], tiny)}
        want = expected(faint, 64, scaling=0.125)
        got = run(target, faint, scaling=0.125)
        torch.testing.assert_close(got.double(), want, atol=2e-6 * float(want.abs().max()), rtol=0)
    case["query"][0, -1, 0, 3] = math.nan
    lost = run(target, case, scaling=0.125).isnan()
    assert lost[0, 0, -1].all() and lost.sum() == 64


@pytest.mark.parametrize("pairs", ops.PAIRS)
def test_opcheck(native, pairs):
    case = make_rows(pairs, torch.float32, True, True, queries=2, tail=4, dim=32, stored=50)
    moved = {k: x.to(native.device) if k != "pairs" else x for k, x in case.items()}
    op = torch.ops.moekv.ragged_attention.default
    torch.library.opcheck(op, (), moved | {"scaling": 0.5, "softcap": 2.0})


@pytest.mark.parametrize("name", ["query", "bias", "sinks", "tail_values"])
def test_native_rows_have_no_gradient(native, name):
    case = make_rows("k8v4", torch.float32, True, True, dim=32, stored=50)
    moved = {k: x.to(native.device) if k != "pairs" else x for k, x in case.items()}
    moved[name].requires_grad_()
    output = ops.ragged_attention(**moved, scaling=0.5)
    with pytest.raises(NotImplementedError, match="moekv::ragged_attention has no backward"):
        output.sum().backward()


@pytest.mark.parametrize("pairs", ops.PAIRS)
def test_threads_change_nothing(native, pairs):
    case = make_rows(pairs, torch.bfloat16, True, True, heads=3, stored=5000, dim=128, tail=40)
    on_any_number_of_threads(lambda: run(native, case, scaling=0.1))


def test_reference_has_gradients():
    shape = {"heads": 2, "queries": 2, "tail": 3, "stored": 9, "dim": 4}
    case = make_rows("k8v4", torch.float64, False, False, **shape)
    case["bias"], case["sinks"] = torch.randn(9).double(), torch.randn(8).double()
    names = ("query", "tail_keys", "tail_values", "bias", "sinks")
    floats = [case.pop(name).requires_grad_() for name in names]

    def call(*tensors):
        return reference.ragged_attention(
            **case, **dict(zip(names, tensors, strict=True)), scaling=0.3
        )

    assert torch.autograd.gradcheck(call, floats)


BAD = {
    "format": (lambda c: {"pairs": "k4v8"}, "pairs to be one of 16, k8v8, k8v4, k4v4, got 'k4v8'"),
    "no scales": (lambda c: {"scales": None}, "scales with quantised pairs, got none"),
    "wide scales": (
        lambda c: {"scales": c["scales"].float()},
        "scales of dtype float16, got float32",
    ),
    "few scales": (lambda c: {"scales": c["scales"][:, :1]}, r"scales \[700, 3\], got \[700, 1\]"),
    "numbers": (lambda c: {"keys": c["keys"].float()}, "keys of dtype uint8, got float32"),
    "short codes": (lambda c: {"keys": c["keys"][:, 1:]}, r"keys \[num_stored, 16\]"),
    "rows": (lambda c: {"values": c["values"][1:]}, r"values \[700, 8\], got \[699, 8\]"),
    "16": (lambda c: {"pairs": "16"}, "scales only with quantised pairs"),
    "bias": (lambda c: {"bias": torch.zeros(3).half()}, r"bias \[700\], got \[3\]"),
    "wide bias": (lambda c: {"bias": torch.zeros(700)}, "bias of dtype float16, got float32"),
    "sinks": (lambda c: {"sinks": torch.zeros(3)}, r"sinks \[8\], got \[3\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(target, name):
    change, message = BAD[name]
    case = make_rows("k8v4", torch.float32, True, True, queries=2, tail=4, dim=16)
    refuses(target, "ragged_attention", {**case, **change(case), "scaling": 0.25}, message)


def test_an_odd_head_dim_has_no_4_bits(target):
    case = make_rows("k8v8", torch.float32, False, False, dim=15)
    case |= {"pairs": "k4v4", "scaling": 0.25}
    refuses(target, "ragged_attention", case, "an even head dim of keys in 4 bits, got 15")


def test_wrapper(target):
    case = make_rows("k8v4", torch.float32, True, True, dim=16)
    moved = {k: x.to(target.device) if k != "pairs" else x for k, x in case.items()}
    got = ops.ragged_attention(**moved, scaling=0.25, backend=target.backend)
    assert torch.equal(got.cpu(), run(target, case, scaling=0.25))

"""ragged_attention against attention computed head by head in fp64."""

import itertools
import math

import pytest
import torch
from ragged_cases import CASES, DTYPES, cast, make_case, oracle
from targets import on_any_number_of_threads, refuses

from moekv import ops
from moekv.ops import reference


def run(target, case, **options):
    """The op on the target's device, the result on the CPU."""
    moved = {name: tensor.to(target.device) for name, tensor in case.items()}
    return target.op("ragged_attention")(**moved, **options).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_matches_attention_head_by_head(target, name, dtype, softcap):
    case = cast(make_case(**CASES[name]), dtype)
    scaling = case["query"].shape[-1] ** -0.5
    expected = oracle(**case, scaling=scaling, softcap=softcap)
    got = run(target, case, scaling=scaling, softcap=softcap)
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, atol=DTYPES[dtype], rtol=DTYPES[dtype])


def test_reference_is_exact_in_double_precision():
    case = cast(make_case(batch=2, heads=3, queries=5, tail=8), torch.float64)
    got = reference.ragged_attention(**case, scaling=0.3, softcap=4.0)
    torch.testing.assert_close(got, oracle(**case, scaling=0.3, softcap=4.0))


def test_reference_has_gradients():
    case = cast(make_case(heads=2, queries=2, tail=3, stored=9, dim=3), torch.float64)
    floats = {name: x.requires_grad_() for name, x in case.items() if x.is_floating_point()}
    whole = {name: x for name, x in case.items() if name not in floats}
    mask = torch.tensor([True, False, True]).view(1, 1, 1, 3)

    def run(*tensors):
        moved = dict(zip(floats, tensors, strict=True)) | whole
        return reference.ragged_attention(**moved, mask=mask, scaling=0.3, softcap=4.0)

    assert torch.autograd.gradcheck(run, tuple(floats.values()))


@pytest.mark.parametrize("shape", [(2, 6, 4, 9), (2, 1, 4, 9), (1, 1, 4, 9), (2, 1, 1, 9)], ids=str)
def test_mask_hides_tail_positions_and_all_hidden_is_zero(target, shape):
    case = make_case(batch=2, heads=2, group=3, queries=4, tail=9, dim=16)
    case["end"][1] = case["begin"][1]  # nothing stored in the second row
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[-1, :, :1] = False
    expected = oracle(**case, mask=mask, scaling=0.25)
    got = run(target, {**case, "mask": mask}, scaling=0.25)
    torch.testing.assert_close(got.double(), expected, atol=4e-6, rtol=4e-6)
    assert (got[-1, 0] == 0).all()


def test_strided_inputs_equal_contiguous_ones(target):
    case = make_case(batch=2, heads=2, queries=3, tail=6, dim=16)
    case = {name: tensor.to(target.device) for name, tensor in case.items()}
    expected = run(target, case, scaling=0.25)
    strided = dict(case)
    strided["query"] = case["query"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["keys"] = torch.cat([case["keys"], case["keys"]], dim=1)[:, :16]
    strided["values"] = case["values"].T.contiguous().T  # the last dimension is not dense
    strided["tail_keys"] = torch.nn.functional.pad(case["tail_keys"], (0, 0, 0, 5))[:, :, :6]
    strided["tail_values"] = (
        case["tail_values"].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    )
    torch.testing.assert_close(run(target, strided, scaling=0.25), expected)


def test_threads_change_nothing(native):
    case = cast(make_case(heads=3, stored=5000, dim=128, tail=40), torch.bfloat16)
    on_any_number_of_threads(lambda: run(native, case, scaling=0.1))


def test_large_scores_do_not_overflow_and_nan_stays_in_its_head(target):
    case = make_case(heads=2, group=1, dim=8, tail=0)
    case["begin"], case["end"] = torch.tensor([[0, 300]]).int(), torch.tensor([[300, 700]]).int()
    case["query"] *= 1e4
    got = run(target, case, scaling=1.0)
    torch.testing.assert_close(got.double(), oracle(**case, scaling=1.0), atol=4e-6, rtol=4e-6)
    case["keys"][5, 3] = math.nan
    got = run(target, case, scaling=1.0)
    assert got[0, 0, 0].isnan().all() and got[0, 0, 1].isfinite().all()


@pytest.mark.parametrize("hidden", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [3, 16, 40])
def test_what_a_query_does_not_see_is_not_read(target, dim, dtype, hidden):
    """Behind a mask, later in the tail, or of another head: NaN is not even multiplied with 0."""
    case = cast(make_case(queries=3, tail=70, dim=dim), dtype)
    mask = torch.rand(1, 8, 3, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :, :, 5] = mask[:, :4, :, 6] = False
    clean = run(target, case | {"mask": mask}, scaling=0.25)
    for name, at in itertools.product(("tail_keys", "tail_values"), (5, 6, 7, 68, 69)):
        dirty = case | {"mask": mask, name: case[name].clone()}
        dirty[name][:, :, at] = hidden
        sees = mask[0, :, :, at].T & (at <= torch.arange(67, 70))[:, None]  # [Q, Hq]
        got = run(target, dirty, scaling=0.25)
        assert torch.equal(got[0][~sees], clean[0][~sees])
        assert name == "tail_keys" or not got[0][sees].isfinite().any()
    rows = torch.ones(len(case["keys"]), dtype=torch.bool)
    for begin, end in zip(case["begin"].flatten(), case["end"].flatten(), strict=True):
        rows[begin:end] = False
    assert rows.any()
    strange = {**case, "keys": case["keys"].clone(), "values": case["values"].clone()}
    strange["keys"][rows] = strange["values"][rows] = hidden
    assert torch.equal(run(target, strange | {"mask": mask}, scaling=0.25), clean)


def test_opcheck(native):
    case = make_case(batch=2, queries=2, tail=4, dim=8, stored=50)
    mask = torch.ones(2, 1, 2, 4, dtype=torch.bool)
    arguments = [tensor.to(native.device) for tensor in (*case.values(), mask)]
    torch.library.opcheck(
        torch.ops.moekv.ragged_attention.default, arguments, {"scaling": 0.5, "softcap": 2.0}
    )
    torch.library.opcheck(torch.ops.moekv.ragged_attention.default, arguments[:5], {"scaling": 0.5})


BAD = {
    "query": (lambda c: {"query": c["query"][0]}, r"expected query \[batch, num_query_heads, "),
    "dtype": (lambda c: {"query": c["query"].int()}, "expected query of dtype float32"),
    "keys": (lambda c: {"keys": c["keys"][:, :3]}, r"expected keys \[num_stored, 16\], got"),
    "key dtype": (
        lambda c: {"keys": c["keys"].half()},
        "keys of dtype float32, got float16",
    ),
    "values": (lambda c: {"values": c["values"][1:]}, r"expected values \[700, value_dim\]"),
    "begin": (lambda c: {"begin": c["begin"].expand(2, -1)}, r"expected begin \[1, num_kv_heads\]"),
    "heads": (lambda c: {"begin": c["begin"][:, [0, 1, 1]]}, "num_kv_heads dividing 8"),
    "end": (lambda c: {"end": c["end"][:, :1]}, r"expected end like begin \[1, 2\], got \[1, 1\]"),
    "long": (lambda c: {"end": c["end"].long()}, "expected end of dtype int32, got int64"),
    "range": (lambda c: {"end": c["end"] + 1000}, "expected 0 <= begin <= end <= 700 stored rows"),
    "order": (lambda c: {"begin": c["end"] + 1, "end": c["end"]}, "expected 0 <= begin <= end"),
    "one tail": (lambda c: {"tail_values": None}, "expected tail_keys and tail_values together"),
    "tail": (
        lambda c: {"tail_keys": c["tail_keys"][..., :3]},
        r"tail_keys \[1, 2, 4, 16\]",
    ),
    "short": (
        lambda c: {
            "tail_keys": c["tail_keys"][:, :, :1],
            "tail_values": c["tail_values"][:, :, :1],
        },
        "expected a tail of at least the 2 queries themselves, got 1 positions",
    ),
    "long tail": (
        lambda c: {
            name: c[name][:, :, :1].expand(-1, -1, 2**31 - 1000, -1)
            for name in ("tail_keys", "tail_values")
        },
        "expected at most 2147418112 stored rows and tail positions, got 700 and 2147482648",
    ),
    "mask": (lambda c: {"mask": torch.ones(1, 1, 2, 5).bool()}, "expected mask broadcastable to"),
    "scaling": (
        lambda c: {"scaling": math.nan},
        "expected scaling between 1e-18 and 1e18, got nan",
    ),
    "softcap": (lambda c: {"softcap": math.inf}, "expected a softcap of 0 or between .*, got inf"),
    "mask dtype": (lambda c: {"mask": torch.ones(1, 1, 2, 4)}, "expected mask of dtype bool"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(target, name):
    change, message = BAD[name]
    case = {**make_case(queries=2, tail=4, dim=16), "scaling": 0.25}
    case = {**case, **change(case)}
    if name not in ("range", "order"):
        refuses(target, "ragged_attention", case, message.removeprefix("expected "))
    elif target.device == "cpu":  # elsewhere the host would have to wait for the device
        with pytest.raises(RuntimeError, match="moekv::ragged_attention: " + message):
            target.op("ragged_attention")(**case)


def test_wrapper(target):
    case = {k: x.to(target.device) for k, x in make_case(dim=16).items()}
    got = ops.ragged_attention(**case, scaling=0.25, backend=target.backend)
    assert torch.equal(got.cpu(), run(target, case, scaling=0.25))

"""quantize_pairs: what codes say, how far it is from the pairs, and pairs that are no numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stored_rows import QUANTISED, decode, transform
from targets import on_any_number_of_threads, refuses

from moekv import ops
from moekv.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

DIMS = [(64, 64), (128, 80), (96, 112), (2, 2), (34, 66), (256, 128), (30, 6)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pairs_of(key_dim, value_dim, num=23, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    size = torch.rand(num, 1, generator=g) * 4 + 0.1
    keys = torch.randn(num, key_dim, generator=g) * size * scale
    values = torch.randn(num, value_dim, generator=g) * size * scale
    return keys + 2 * scale * torch.randn(key_dim, generator=g), values


def encode(target, keys, values, pairs):
    moved = keys.to(target.device), values.to(target.device)
    return [x.cpu() for x in target.op("quantize_pairs")(*moved, pairs=pairs)]


def farthest(rows, scales, bits):
    """How far a decoded row may be from its numbers, in the space of its codes."""
    if bits == 8:
        return scales[:, :1].double() / 2
    return scales[:, 1::2].double().repeat_interleave(32, 1)[:, : rows.shape[1]] / 2


def assert_close(rows, decoded, scales, bits):
    rows = rows.double()
    if bits == 4:
        rows, decoded = (x @ transform(x.shape[1]) / block(x.shape[1]) for x in (rows, decoded))
    slack = 1e-6 * rows.abs().amax(1, keepdim=True)
    assert ((rows - decoded).abs() <= farthest(rows, scales, bits) * (1 + 1e-6) + slack).all()


def block(dim):
    return int(transform(dim)[0].count_nonzero())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("pairs", QUANTISED)
def test_no_number_moves_by_more_than_half_a_step(target, pairs, dims, dtype):
    keys, values = (x.to(dtype) for x in pairs_of(*dims))
    key_codes, value_codes, scales = encode(target, keys, values, pairs)
    layout = ops.pair_layout(pairs, *dims)
    assert key_codes.dtype == value_codes.dtype == torch.uint8 and scales.dtype == torch.float16
    assert key_codes.shape == (23, layout.key_codes)
    assert value_codes.shape == (23, layout.value_codes)
    assert scales.shape == (23, layout.num_scales)
    assert all(x.is_contiguous() for x in (key_codes, value_codes, scales))
    bits = layout.key_bits, layout.value_bits
    decoded = decode(key_codes, value_codes, scales, pairs, *dims)
    split = scales.split([layout.key_scales, layout.value_scales], 1)
    for rows, got, s, width in zip((keys, values), decoded, split, bits, strict=True):
        assert_close(rows, got, s, width)


@pytest.mark.parametrize("dims", [(15, 7), (1, 1), (33, 65)], ids=str)
def test_8_bits_take_any_head_dim_and_4_an_even_one(target, dims):
    keys, values = pairs_of(*dims)
    codes = encode(target, keys, values, "k8v8")
    got = decode(*codes, "k8v8", *dims)
    assert_close(keys, got[0], codes[2][:, :1], 8)
    for pairs, name in (("k8v4", "values"), ("k4v4", "keys")):
        message = f"an even head dim of {name} in 4 bits, got {dims[name == 'values']}"
        arguments = {"keys": keys, "values": values, "pairs": pairs}
        refuses(target, "quantize_pairs", arguments, message)


@pytest.mark.parametrize("pairs", QUANTISED)
def test_dequantize_pairs_says_what_the_codes_say(pairs):
    for dims in DIMS:
        coded = reference.quantize_pairs(*pairs_of(*dims), pairs=pairs)
        want = decode(*coded, pairs, *dims)
        options = {"pairs": pairs, "head_dim": dims[0], "value_dim": dims[1]}
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (DTYPES[1], 1e-2)):
            got = ops.dequantize_pairs(*coded, **options, dtype=dtype)
            for a, b in zip(got, want, strict=True):
                assert a.dtype == dtype
                torch.testing.assert_close(a.double(), b, atol=tolerance * 10, rtol=tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pairs", QUANTISED)
def test_what_is_no_number_stays_in_its_pair(target, pairs, bad):
    keys, values = pairs_of(64, 96)
    clean = encode(target, keys, values, pairs)
    layout = ops.pair_layout(pairs, 64, 96)
    keys[3, 9] = bad
    values[5, 50] = values[22, 0] = bad
    key_codes, value_codes, scales = encode(target, keys, values, pairs)
    lost = torch.zeros_like(scales, dtype=torch.bool)
    lost[3, : layout.key_scales] = True
    lost[5, layout.key_scales :] = lost[22, layout.key_scales :] = True
    assert torch.equal(scales.isnan(), lost)
    assert torch.equal(scales[~lost], clean[2][~lost])
    assert not key_codes[3].any() and not value_codes[[5, 22]].any()
    others = torch.arange(23) != 3
    assert torch.equal(key_codes[others], clean[0][others])
    options = {"pairs": pairs, "head_dim": 64, "value_dim": 96, "dtype": torch.float32}
    k, v = ops.dequantize_pairs(key_codes, value_codes, scales, **options)
    assert k[3].isnan().all() and v[[5, 22]].isnan().all()
    assert k[others].isfinite().all()


@pytest.mark.parametrize("pairs", QUANTISED)
def test_large_numbers_fit_as_long_as_they_are_float16(target, pairs):
    """The transform adds all channels up, and must not leave float16 by that."""
    for dim in (64, 128, 256):
        keys = torch.full((4, dim), 65504.0)
        keys[1] *= -1
        keys[2, ::2] *= -1
        keys[3] = torch.randn(dim, generator=torch.Generator().manual_seed(0))
        keys[3, dim // 2] = 1e4
        coded = encode(target, keys, keys, pairs)
        assert coded[2].isfinite().all()
        options = {"pairs": pairs, "head_dim": dim, "value_dim": dim, "dtype": torch.float32}
        for got in ops.dequantize_pairs(*coded, **options):
            assert ((got - keys).norm(dim=1) <= 0.1 * keys.norm(dim=1)).all()
    for wide in (1e7, 3e38):
        keys = torch.tensor([[wide] * 32, [1.0] * 32])
        scales = encode(target, keys, keys, pairs)[2]
        assert scales[0].isnan().all() and scales[1].isfinite().all()


@pytest.mark.parametrize("pairs", QUANTISED)
def test_small_numbers(target, pairs):
    coded = encode(target, torch.zeros(3, 64), torch.zeros(3, 64), pairs)
    assert not any(x.any() for x in coded)
    for scale in (1e-3, 1e-6, 1e-9, 1e-40):
        keys, values = pairs_of(64, 64, scale=scale)
        coded = encode(target, keys, values, pairs)
        options = {"pairs": pairs, "head_dim": 64, "value_dim": 64, "dtype": torch.float64}
        k, v = ops.dequantize_pairs(*coded, **options)
        # Half of a step, which is at least the smallest float16, of up to 64 channels.
        allowed = 0.5 * 64 * 2**-24 + 0.4 * keys.abs().max()
        assert (k - keys).abs().max() <= allowed and (v - values).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", QUANTISED)
def test_native_codes_are_the_references(native, pairs, dtype):
    """To the bit: sums are formed in one order, and quotients rounded once."""
    for dims in DIMS:
        keys, values = (x.to(dtype) for x in pairs_of(*dims))
        got = encode(native, keys, values, pairs)
        assert all(map(torch.equal, got, reference.quantize_pairs(keys, values, pairs=pairs)))


def test_opcheck(native):
    keys, values = (x.to(native.device) for x in pairs_of(64, 48))
    for pairs in QUANTISED:
        op = torch.ops.moekv.quantize_pairs.default
        torch.library.opcheck(op, (keys, values), {"pairs": pairs})


def test_codes_have_no_gradient(target):
    keys, values = (x.to(target.device).requires_grad_() for x in pairs_of(8, 8))
    _, _, scales = ops.quantize_pairs(keys, values, pairs="k8v4", backend=target.backend)
    with pytest.raises(NotImplementedError, match="moekv::quantize_pairs has no backward"):
        scales.sum().backward()


def test_threads_change_nothing(native):
    keys, values = (x.to(native.device) for x in pairs_of(64, 96, num=1000))
    on_any_number_of_threads(lambda: encode(native, keys, values, "k8v4"))


def test_strides(target):
    keys, values = pairs_of(64, 96)
    want = encode(target, keys, values, "k8v4")
    apart = torch.cat([keys, keys], 1)[:, :64], values.T.contiguous().T
    assert all(map(torch.equal, encode(target, *apart, "k8v4"), want))
    assert all(
        map(torch.equal, encode(target, keys[::2], values[::2], "k8v4"), (x[::2] for x in want))
    )


@given(
    st.sampled_from(QUANTISED),
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.data(),
)
def test_properties(pairs, num, half_key_dim, half_value_dim, data):
    dims = 2 * half_key_dim, 2 * half_value_dim
    keys, values = pairs_of(*dims, num=num, seed=data.draw(st.integers(0, 1000)))
    coded = reference.quantize_pairs(keys, values, pairs=pairs)
    layout = ops.pair_layout(pairs, *dims)
    assert sum(x.nbytes for x in coded) == num * layout.num_bytes
    decoded = decode(*coded, pairs, *dims)
    split = coded[2].split([layout.key_scales, layout.value_scales], 1)
    assert_close(keys, decoded[0], split[0], layout.key_bits)
    assert_close(values, decoded[1], split[1], layout.value_bits)


BAD = {
    "16": ({"pairs": "16"}, "pairs to be one of k8v8, k8v4, k4v4, got '16'"),
    "rank": ({"keys": torch.zeros(2, 3, 4)}, r"keys \[num_pairs, head_dim\], got \[2, 3, 4\]"),
    "rows": ({"values": torch.zeros(5, 4)}, r"values \[3, value_dim\], got \[5, 4\]"),
    "no channels": (
        {"values": torch.zeros(3, 0)},
        "head dims of 1 to 1024, got 0 for values",
    ),
    "dtype": ({"values": torch.zeros(3, 4).half()}, "values of dtype float32, got float16"),
    "whole": ({"keys": torch.zeros(3, 4).int()}, "keys of dtype float32, float16 or bfloat16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(target, name):
    change, message = BAD[name]
    good = {"keys": torch.zeros(3, 4), "values": torch.zeros(3, 4), "pairs": "k8v4"}
    refuses(target, "quantize_pairs", good | change, message)


def test_layout_refuses_what_the_op_refuses():
    with pytest.raises(ValueError, match="expected pairs to be one of k8v8, k8v4, k4v4, got '16'"):
        ops.pair_layout("16", 64, 64)
    with pytest.raises(ValueError, match="expected an even head dim of values in 4 bits, got 7"):
        ops.pair_layout("k8v4", 64, 7)


def test_dequantize_refuses_codes_of_another_format():
    coded = reference.quantize_pairs(*pairs_of(64, 64), pairs="k8v4")
    options = {"head_dim": 64, "value_dim": 64, "dtype": torch.float32}
    with pytest.raises(RuntimeError, match=r"expected value_codes \[23, 64\], got \[23, 32\]"):
        ops.dequantize_pairs(*coded, pairs="k8v8", **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, None])
def test_dequantize_refuses_dtypes_without_fractions(dtype):
    coded = reference.quantize_pairs(*pairs_of(64, 64), pairs="k8v8")
    with pytest.raises(RuntimeError, match="expected dtype float32, float16 or bfloat16, got"):
        ops.dequantize_pairs(*coded, pairs="k8v8", head_dim=64, value_dim=64, dtype=dtype)


def test_wrapper(target):
    keys, values = (x.to(target.device) for x in pairs_of(64, 32))
    got = ops.quantize_pairs(keys, values, pairs="k8v4", backend=target.backend)
    assert all(map(torch.equal, (x.cpu() for x in got), encode(target, keys, values, "k8v4")))

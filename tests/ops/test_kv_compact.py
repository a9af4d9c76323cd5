import math

import op_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from targets import NATIVE_TARGETS, on_any_number_of_threads, refuses
from torch import Tensor

from moekv import ops
from moekv.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("case", op_cases.KV_COMPACT, ids=str)
def test_matches_gather(target, case):
    op_cases.check_kv_compact_(target.op("kv_compact_"), case, target.device)


@st.composite
def cases(draw):
    shape = tuple(draw(st.integers(1, n)) for n in (2, 3, 40, 20))
    rows = shape[0] * shape[1]
    count = st.integers(0, shape[2])
    ragged = rows > 1 and draw(st.booleans())
    return op_cases.KvCompact(
        shape,
        tuple(draw(count) for _ in range(rows if ragged else 1)),
        value_dim=draw(st.integers(1, 20)),
        packed=(packed := draw(st.booleans())),
        dtype=draw(st.sampled_from(op_cases.FLOAT_DTYPES)),
        layout="dense" if packed else draw(st.sampled_from(["dense", "bthd", "static"])),
    )


@given(cases())
def test_any_shape(case):
    for target in NATIVE_TARGETS:
        op_cases.check_kv_compact_(target.op("kv_compact_"), case, target.device)


def test_takes_what_select_kept_gives(target):
    scores = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).to(target.device)
    keys = torch.randn(2, 3, 50, 8, device=target.device)
    values = torch.randn(2, 3, 50, 4, device=target.device)
    for total in (60, 150):
        indices, offsets = target.op("select_kept")(scores, total=[total, total])
        k, v = keys.clone(), values.clone()
        target.op("kv_compact_")(k, v, indices, offsets, packed=True)
        row = torch.repeat_interleave(torch.arange(6), offsets.cpu().long().diff())
        flat = (row * 50 + indices.cpu()).to(target.device)
        assert torch.equal(k.view(-1, 8)[: 2 * total], keys.view(-1, 8)[flat])
        assert torch.equal(v.view(-1, 4)[: 2 * total], values.view(-1, 4)[flat])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dim", [32, 28])
def test_caches_beyond_those_of_the_processor(native, dim, packed):
    """Where positions are multiples of 64 bytes they are stored past its caches, else as ever."""
    keys, values = (torch.randn(2, 150_000, d)[None] for d in (dim, 32))
    assert keys.nbytes + values.nbytes > 64 * 2**20
    kept = torch.rand(2, 150_000, generator=torch.Generator().manual_seed(0)) < 0.4
    offsets = int32(0, int(kept[0].sum()), int(kept.sum()))
    expected = [x[0][kept] for x in (keys, values)]
    native.op("kv_compact_")(keys, values, kept.nonzero()[:, 1].int(), offsets, packed=packed)
    for moved, rows in zip((keys, values), expected, strict=True):
        if packed:
            assert torch.equal(moved.flatten(0, 2)[: len(rows)], rows)
        else:
            for head, want in zip(moved[0], rows.split(offsets.diff().tolist()), strict=True):
                assert torch.equal(head[: len(want)], want)


def test_bits_move_as_they_are(target):
    keys = torch.full((1, 1, 4, 3), math.nan, device=target.device)
    keys.view(torch.int32)[0, 0, 3] = torch.tensor([0x7FC12345, -1, 0x7F800001])
    values = torch.full_like(keys, -0.0)
    target.op("kv_compact_")(keys, values, int32(3).view(1, 1, 1).to(target.device))
    assert keys.view(torch.int32)[0, 0, 0].tolist() == [0x7FC12345, -1, 0x7F800001]
    assert values[0, 0, 0].signbit().all()


@pytest.mark.parametrize("packed", [False, True])
def test_threads_change_nothing(native, packed):
    case = op_cases.KvCompact((1, 4, 5000, 64), (4999, 17, 2500, 5000), packed=packed)
    (keys, values, indices, offsets), _ = case.inputs(native.device)

    def run() -> list[Tensor]:
        moved = [keys.clone(), values.clone()]
        native.op("kv_compact_")(*moved, indices, offsets, packed=packed)
        return moved

    on_any_number_of_threads(run)


@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(native, ragged):
    case = op_cases.KvCompact((1, 2, 9, 4), (3, 9) if ragged else (5,), dtype=op_cases.BF16)
    inputs, options = case.inputs(native.device)
    torch.library.opcheck(torch.ops.moekv.kv_compact_, inputs, options)


GOOD = {
    "keys": torch.zeros(1, 2, 5, 4),
    "values": torch.zeros(1, 2, 5, 3),
    "indices": int32(0, 2, 1, 4).view(1, 2, 2),
}
BAD = {
    "keys": ({"keys": torch.zeros(2, 5, 4)}, r"keys \[batch, num_kv_heads, .* got \[2, 5, 4\]"),
    "values": (
        {"values": torch.zeros(1, 2, 6, 3)},
        r"values \[1, 2, 5, value_dim\], got",
    ),
    "int8": ({"keys": torch.zeros(1, 2, 5, 4).char()}, "keys of dtype .*, got int8"),
    "bool": ({"keys": torch.zeros(1, 2, 5, 4).bool()}, "keys of dtype .*, got bool"),
    "two dtypes": ({"values": torch.zeros(1, 2, 5, 3).half()}, "values of dtype float32, got .*16"),
    "indices dtype": ({"indices": int32(0, 1).view(1, 2, 1).long()}, "indices of dtype int32"),
    "indices rows": ({"indices": int32(0, 1, 2).view(1, 3, 1)}, r"indices \[1, 2, num_kept\]"),
    "indices flat": ({"indices": int32(0, 1)}, r"indices \[1, 2, num_kept\].*got \[2\]"),
    "indices not flat": ({"offsets": int32(0, 1, 2)}, r"indices \[num_indices\] where there are"),
    "offsets": (
        {"indices": int32(0, 1), "offsets": int32(0, 2)},
        r"offsets \[3\], got \[2\]",
    ),
    "offsets dtype": (
        {"indices": int32(0, 1), "offsets": int32(0, 1, 2).long()},
        "offsets of dtype int32, got int64",
    ),
    "packed keys": (
        {"keys": torch.zeros(1, 5, 2, 4).transpose(1, 2), "packed": True},
        "contiguous keys with packed=True",
    ),
    "packed values": (
        {"values": torch.zeros(1, 5, 2, 3).transpose(1, 2), "packed": True},
        "contiguous values with packed=True",
    ),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input(target, change, message):
    refuses(target, "kv_compact_", GOOD | change, message)


BAD_INDICES = {
    "too large": (int32(0, 2, 1, 5).view(1, 2, 2), None),
    "negative": (int32(0, 2, -1, 4).view(1, 2, 2), None),
    "extreme": (int32(0, 2, -(2**31), 2**31 - 1).view(1, 2, 2), None),
    "descending": (int32(0, 2, 4, 1).view(1, 2, 2), None),
    "twice": (int32(0, 2, 4, 4).view(1, 2, 2), None),
    "ragged, too large": (int32(1, 3, 5), int32(0, 2, 3)),
    "ragged, negative": (int32(1, 3, -1), int32(0, 2, 3)),
    "ragged, descending": (int32(3, 1, 2), int32(0, 2, 3)),
    "ragged, last row": (int32(1, 3, 3), int32(0, 1, 3)),
    "offsets from 1": (int32(1, 3, 2), int32(1, 2, 3)),
    "offsets descend": (int32(1, 3, 2), int32(0, 4, 3)),
    "offsets below 0": (int32(1, 3, 2), int32(0, -1, 3)),
    "offsets end early": (int32(0, 1, 3), int32(0, 1, 2)),
    "offsets end late": (int32(0, 1, 3), int32(0, 2, 4)),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indices, offsets", BAD_INDICES.values(), ids=BAD_INDICES)
def test_bad_indices_move_nothing(target, indices, offsets, packed):
    keys = torch.randn(1, 2, 5, 4, device=target.device)
    values = torch.randn(1, 2, 5, 3, device=target.device)
    before = keys.clone(), values.clone()
    indices, offsets = (x if x is None else x.to(target.device) for x in (indices, offsets))
    if target.device != "cpu":
        pytest.skip("to raise, the host would have to wait for the device")
    with pytest.raises(RuntimeError, match="moekv::kv_compact_: expected .*(indices|offsets)"):
        target.op("kv_compact_")(keys, values, indices, offsets, packed=packed)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


def test_index_out_of_range_on_cuda_is_not_moved(target):
    if target.device == "cpu":
        pytest.skip("raises there")
    keys = torch.randn(1, 2, 5, 4, device=target.device)
    values = torch.randn(1, 2, 5, 3, device=target.device)
    before = keys.clone(), values.clone()
    indices = int32(1, 5, -1, 4).view(1, 2, 2).to(target.device)
    target.op("kv_compact_")(keys, values, indices)
    for new, old in zip((keys, values), before, strict=True):
        assert torch.equal(new[0, 0, 0], old[0, 0, 1])
        assert torch.equal(new[0, 1, 1], old[0, 1, 4])
        assert torch.equal(new[0, 0, 1], old[0, 0, 1])
        assert torch.equal(new[0, 1, 0], old[0, 1, 0])


def test_storage_that_overlaps(native):
    """Nothing can be moved within memory that holds several pairs."""
    keys = torch.zeros(1, 1, 5, 4).expand(1, 2, 5, 4)
    with pytest.raises(RuntimeError, match="moekv::kv_compact_: expected keys .*overlap"):
        native.op("kv_compact_")(keys, torch.zeros(1, 2, 5, 4), GOOD["indices"])
    both = torch.zeros(1, 2, 5, 4)
    with pytest.raises(RuntimeError, match="moekv::kv_compact_: expected keys and values in sep"):
        native.op("kv_compact_")(both, both, GOOD["indices"])
    with pytest.raises(RuntimeError, match="moekv::kv_compact_: expected values .*dense"):
        native.op("kv_compact_")(both, torch.zeros(1, 2, 4, 5).mT, GOOD["indices"])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_memory_that_is_shared_is_refused_by_each_backend(backend):
    """Pairs would be moved twice, or moved by numbers that have been moved themselves."""
    indices = int32(1, 3, 4).view(1, 1, 3)
    wide, heads = torch.randn(1, 1, 5, 12), torch.randn(1, 2, 5, 4)
    rows = torch.arange(40, dtype=torch.float32).as_strided((1, 1, 5, 4), (20, 20, 2, 1))
    one, other = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    for keys, values in (
        (one, one),
        (wide[..., :8], wide[..., 4:]),
        (heads[:, :1], heads.flatten()[10:30].view(1, 1, 5, 4)),
        (rows, one),
        (one, torch.randn(1, 1, 1, 4).expand(1, 1, 5, 4)),
    ):
        before = keys.clone(), values.clone()
        with pytest.raises(RuntimeError, match="moekv::kv_compact_: expected .*overlap"):
            ops.kv_compact_(keys, values, indices, backend=backend)
        assert torch.equal(keys, before[0]) and torch.equal(values, before[1])
    shared = one.view(torch.int32).flatten()
    for more in ((shared[:3].view(1, 1, 3),), (int32(1, 3), shared[:2])):
        with pytest.raises(RuntimeError, match="moekv::kv_compact_: expected .*in memory apart"):
            ops.kv_compact_(one, other, *more, backend=backend)


def test_wrapper(target):
    case = op_cases.KvCompact((1, 2, 30, 8), (11, 30), packed=True)

    def op(*inputs, **options):
        return ops.kv_compact_(*inputs, **options, backend=target.backend)

    op_cases.check_kv_compact_(op, case, target.device)


def test_reference_takes_any_strides():
    keys = torch.randn(1, 2, 4, 5).mT
    expected = keys[:, :, [1, 3]].clone()
    reference.kv_compact_(keys, torch.randn(1, 2, 5, 4), int32(1, 3, 1, 3).view(1, 2, 2))
    assert torch.equal(keys[:, :, :2], expected)

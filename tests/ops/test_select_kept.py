import math

import op_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from targets import NATIVE_TARGETS, TARGETS, on_any_number_of_threads, refuses
from torch import Tensor

from moekv import ops
from moekv.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", op_cases.SELECT_KEPT, ids=str)
def test_matches_reference(target, case):
    op_cases.check_select_kept(target.op("select_kept"), case, target.device)


@st.composite
def inputs_and_options(draw):
    groups, rows, num_keys = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 70)),
    )
    dtype = draw(st.sampled_from(op_cases.FLOAT_DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (groups, rows, num_keys)
    scores = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        scores = scores.round()
    for value in draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0]))):
        scores[torch.rand(shape, generator=generator) < 0.15] = value
    start = None
    if draw(st.booleans()):
        start = torch.randint(num_keys + 1, (groups, rows), generator=generator).int()
    small = st.integers(0, num_keys + 3)
    return (scores.to(dtype), start), {
        "total": [draw(st.integers(rows, rows * num_keys)) for _ in range(groups)],
        "sinks": draw(small),
        "window": draw(small),
        "floor": draw(small),
    }


def check_properties(
    scores: Tensor,
    start: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    *,
    total: list[int],
    sinks: int,
    window: int,
    floor: int,
) -> None:
    """What must hold of any selection, without a second implementation of it."""
    groups, rows, num_keys = scores.shape
    first = torch.zeros(groups, rows).int() if start is None else start
    assert offsets[0] == 0 and offsets[-1] == sum(total) == len(indices)
    counts = offsets.diff().view(groups, rows)
    assert counts.sum(1).tolist() == total
    kept = torch.zeros(groups * rows, num_keys, dtype=torch.bool)
    for r, row in enumerate(indices.tensor_split(offsets[1:-1].long())):
        assert (row.diff() > 0).all()
        kept[r, row.long()] = True
    kept = kept.view(scores.shape)
    position = torch.arange(num_keys)
    for g in range(groups):
        share = total[g] // rows
        sinks_here = min(sinks, share)
        window_here = min(window, share - sinks_here)
        assert (counts[g] >= min(floor, share)).all()
        free = []  # (rank of the worst that was kept for its score, of the best that was not)
        for r in range(rows):
            real = position >= first[g, r]
            always = real & (
                (position < first[g, r] + sinks_here) | (position >= num_keys - window_here)
            )
            assert kept[g, r][always].all()
            free.append(real & ~always)
            assert (counts[g, r] >= min(floor, share)).item()
        # Above the floor, no number that was left is better than one that was kept.
        free = torch.stack(free)
        number = ~scores[g].isnan()
        above = (counts[g] > min(floor, share))[:, None]
        chosen = scores[g][kept[g] & free & above & number]
        left = scores[g][~kept[g] & free & number]
        if len(chosen) and len(left):
            assert chosen.min() >= left.max()
        # NaN only where no number is left, padding only where nothing else is.
        if (kept[g] & free & above & ~number).any():
            assert not len(left)
        padding = position < first[g][:, None]
        if (kept[g] & padding & above).any():
            assert not (~kept[g] & ~padding).any()


def select(target, scores, start, options) -> list[Tensor]:
    start = None if start is None else start.to(target.device)
    result = target.op("select_kept")(scores.to(target.device), start, **options)
    return [x.cpu() for x in result]


@given(inputs_and_options())
def test_properties(inputs_options):
    inputs, options = inputs_options
    for target in TARGETS:
        check_properties(*inputs, *select(target, *inputs, options), **options)


@given(inputs_and_options())
def test_agrees_with_reference(inputs_options):
    inputs, options = inputs_options
    expected_indices, expected_offsets = reference.select_kept(*inputs, **options)
    for target in NATIVE_TARGETS:
        indices, offsets = select(target, *inputs, options)
        assert torch.equal(offsets, expected_offsets)
        assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
def test_every_kind_of_number(target, dtype):
    """All 16-bit patterns, which are all the sizes that a number can have."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    scores = bits.view(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype)
    scores = scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))]
    scores = scores.to(target.device)[None, None]
    for total in (1, 100, 32768, 65000, 65535):
        got = target.op("select_kept")(scores, total=[total])
        expected = reference.select_kept(scores, total=[total])
        assert torch.equal(got[0], expected[0])


def test_neighbouring_numbers(target):
    """Scores that differ in their last bits alone."""
    bits = torch.randperm(5000, generator=torch.Generator().manual_seed(0)).int() + 0x3F800000
    for sign in (1, -1):
        scores = (sign * bits.view(torch.float32)).to(target.device)[None, None]
        indices, _ = target.op("select_kept")(scores, total=[1234])
        best = scores[0, 0].topk(1234).indices.sort().values
        assert torch.equal(indices.long(), best)


def test_both_zeros_are_equal(target):
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1.0], device=target.device)[None, None]
    indices, _ = target.op("select_kept")(scores, total=[2])
    assert indices.tolist() == [0, 1]


def test_infinity_is_a_number_and_nan_is_below(target):
    nan, inf = math.nan, math.inf
    scores = torch.tensor([nan, -inf, nan, 1.0, inf], device=target.device)[None, None]
    for total, kept in ((1, [4]), (2, [3, 4]), (3, [1, 3, 4]), (4, [0, 1, 3, 4])):
        assert target.op("select_kept")(scores, total=[total])[0].tolist() == kept


def test_padding_comes_last(target):
    scores = torch.tensor([9.0, 8.0, math.nan, -math.inf], device=target.device).expand(1, 2, 4)
    start = torch.tensor([[2, 3]], dtype=torch.int32, device=target.device)
    for total, kept in (
        (2, [3, 3]),
        (3, [2, 3, 3]),
        (4, [0, 2, 3, 3]),
        (7, [0, 1, 2, 3, 0, 1, 3]),
    ):
        indices, _ = target.op("select_kept")(scores, start, total=[total])
        assert indices.tolist() == kept


def test_one_group_does_not_see_another(target):
    case = op_cases.SelectKept((4, 3, 50), (70,), 2, 3, padding=True)
    (scores, start), options = case.inputs(target.device)
    indices, offsets = target.op("select_kept")(scores, start, **options)
    for g in range(4):
        alone = target.op("select_kept")(
            scores[g : g + 1], start[g : g + 1], **(options | {"total": [70]})
        )
        assert torch.equal(indices[70 * g : 70 * (g + 1)], alone[0])
        assert torch.equal(offsets[3 * g : 3 * g + 4] - 70 * g, alone[1])


@pytest.mark.parametrize("shape, total", [((1, 1, 100_003), 50_001), ((2, 8, 9001), 30_000)])
def test_threads_change_nothing(native, shape, total):
    case = op_cases.SelectKept(shape, (total,), 4, 64, values="ties")
    inputs, options = case.inputs(native.device)
    on_any_number_of_threads(lambda: native.op("select_kept")(*inputs, **options))


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
def test_opcheck(native, dtype):
    case = op_cases.SelectKept((2, 3, 20), (20, 31), 1, 2, 3, padding=True, dtype=dtype)
    inputs, options = case.inputs(native.device)
    torch.library.opcheck(torch.ops.moekv.select_kept, inputs, options)


GOOD = {"scores": torch.zeros(2, 3, 9), "start": None, "total": [3, 27]}
BAD = {
    "scores": ({"scores": torch.zeros(2, 9)}, r"scores \[groups, rows, num_keys\], got \[2, 9\]"),
    "scores dtype": ({"scores": torch.zeros(2, 3, 9).int()}, "scores of dtype .*, got int32"),
    "totals": ({"total": [9]}, "2 totals, one per group, got 1"),
    "total": ({"total": [3, 28]}, r"total\[1\] between 3 \(.*\) and 27 \(all\), got 28"),
    "less than rows": ({"total": [2, 9]}, r"total\[0\] between 3 \(.*\) and 27 \(all\), got 2"),
    "no rows": ({"scores": torch.zeros(2, 0, 9)}, r"total\[0\] between 0 .* got 3"),
    "no keys": ({"scores": torch.zeros(2, 3, 0)}, r"total\[0\] between 3 .* got 3"),
    "sinks": ({"sinks": -1}, "sinks >= 0, got -1"),
    "window": ({"window": -1}, "window >= 0, got -1"),
    "floor": ({"floor": -1}, "floor >= 0, got -1"),
    "start": ({"start": torch.zeros(6).int()}, r"start \[2, 3\], got \[6\]"),
    "start dtype": ({"start": torch.zeros(2, 3)}, "start of dtype int32, got float32"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input(target, change, message):
    refuses(target, "select_kept", GOOD | change, message)


def test_wrapper_takes_one_total_for_all_groups(target):
    case = op_cases.SelectKept((4, 3, 50), (70,))
    (scores, _), options = case.inputs(target.device)
    got = ops.select_kept(scores, total=70, backend=target.backend)
    expected = ops.select_kept(scores, total=(70,) * 4, backend=target.backend)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.offsets, expected.offsets)
    assert len(got.indices) == 280

"""The CUDA kernels, simulated, against ``moekv.ops.reference``, and under many schedules."""

import dataclasses
from types import ModuleType
from typing import Any

import op_cases
import pytest
import ragged_cases as ragged
import simulated
import torch
from stored_rows import QUANTISED, expected, make_rows

from moekv.ops import PAIRS, reference

CASES = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name, (_, cases) in op_cases.CHECKS.items()
    for case in cases
]
NUM_SCHEDULES = 10

# A few inputs per op that take every path and fit in several blocks.
SCHEDULED: list[tuple[str, Any]] = [
    ("gating_topk", op_cases.GatingTopk(300, 60, 4, torch.bfloat16, bias=True, mask=True)),
    ("gating_topk", op_cases.GatingTopk(600, 7, 2, mask=True)),
    ("gating_topk", op_cases.GatingTopk(600, 9, 3, mask=True, importance=True)),
    ("expert_scores", op_cases.ExpertScores((1, 2, 75, 80), pool=3, start=(9,), num_queries=5)),
    ("expert_scores", op_cases.ExpertScores((1, 1, 270, 32), dtype=torch.bfloat16, pool=5)),
    ("expected_attention", op_cases.ExpectedAttention((1, 2, 150, 72), dtype=op_cases.BF16)),
    ("expected_attention", op_cases.ExpectedAttention((2, 1, 140, 20), 3, (0, 9), softcap=3.0)),
    ("project_tokens", op_cases.ProjectTokens((2, 150, 300), 3, op_cases.BF16, mask=True)),
    ("mix_scores", op_cases.MixScores((4, 2, 5, 300), 2)),
    ("select_kept", op_cases.SelectKept((2, 2, 90), (70,), 2, 3, 4, True, "special")),
    ("select_kept", op_cases.SelectKept((1, 2, 4500), (3000,), 4, 16, values="ties")),
    ("kv_compact_", op_cases.KvCompact((1, 2, 400, 80), (150, 400), packed=True)),
    ("kv_compact_", op_cases.KvCompact((2, 2, 37, 20), (20,), dtype=torch.float16)),
    # Deep fragments, of which a warp holds fewer rows.
    ("expert_scores", op_cases.ExpertScores((1, 1, 100, 136), dtype=torch.float16, kinds=(0,))),
]


def run(kernels: ModuleType, name: str, case: Any, seed: int) -> list[torch.Tensor]:
    inputs, options = case.inputs()
    result = simulated.Device(kernels, seed).op(name)(*inputs, **options)
    if result is None:
        return inputs[:2]
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_as_the_reference(kernels: ModuleType, name: str, case: Any) -> None:
    check, _ = op_cases.CHECKS[name]
    seed = case.generator().initial_seed()  # every case its own schedule
    check(simulated.Device(kernels, seed).op(name), case)


@pytest.mark.parametrize(("name", "case"), SCHEDULED, ids=str)
def test_every_schedule_gives_the_same_bits(kernels: ModuleType, name: str, case: Any) -> None:
    op_cases.CHECKS[name][0](simulated.Device(kernels).op(name), case)
    first = run(kernels, name, case, 0)
    for seed in range(1, NUM_SCHEDULES):
        for got, want in zip(run(kernels, name, case, seed), first, strict=True):
            # As integers, for NaN is not equal to itself.
            assert torch.equal(got[None].view(torch.uint8), want[None].view(torch.uint8)), (
                f"seed {seed}"
            )


# The case of many queries launches thousands of blocks: one dtype is enough.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in ragged.CASES
        for dtype in op_cases.FLOAT_DTYPES
        if dtype == torch.bfloat16 or name != "many queries"
    ],
    ids=str,
)
def test_ragged_attention(kernels: ModuleType, name: str, dtype: torch.dtype) -> None:
    case = ragged.cast(ragged.make_case(**ragged.CASES[name]), dtype)
    options = {"scaling": case["query"].shape[-1] ** -0.5, "softcap": 5.0}
    got = simulated.Device(kernels, len(name)).ragged_attention(**case, **options)
    assert got.dtype == dtype and got.is_contiguous()
    tolerance = ragged.DTYPES[dtype]
    expected = ragged.oracle(**case, **options)
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 4, 9), (2, 1, 4, 9), (1, 1, 4, 9)], ids=str)
def test_ragged_attention_with_a_mask(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = ragged.make_case(batch=2, heads=2, group=3, queries=4, tail=9, dim=16)
    case = ragged.cast(case, dtype)
    case["end"][1] = case["begin"][1]  # nothing stored in the second row
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[-1, :, :1] = False
    mask[..., 4] = False
    hidden = case["tail_values"].clone()
    hidden[:, :, 4] = torch.nan
    device = simulated.Device(kernels)
    got = device.ragged_attention(**case | {"tail_values": hidden}, mask=mask, scaling=0.25)
    expected = ragged.oracle(**case, mask=mask, scaling=0.25)
    tolerance = ragged.DTYPES[dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    assert (got[-1, 0] == 0).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dim", [40, 200])
def test_values_that_some_queries_do_not_see(kernels: ModuleType, dim: int, value: float) -> None:
    """Products with a weight of zero would be NaN; other queries and heads stay as they are."""
    case = ragged.make_case(heads=2, group=5, queries=3, tail=8, dim=dim, stored=70)
    case = ragged.cast(case, torch.bfloat16)
    case["tail_values"][:, 1, -2, ::3] = value
    got = simulated.Device(kernels).ragged_attention(**case, scaling=0.1)
    expected = ragged.oracle(**case, scaling=0.1)
    torch.testing.assert_close(got.double(), expected, atol=1.6e-2, rtol=1.6e-2, equal_nan=True)
    assert got[:, 0].isfinite().all() and not got[:, 1].isfinite().all()


@pytest.mark.parametrize(
    ("group", "dtype"),  # up to four queries, and more
    [(2, torch.float32), (5, torch.float32), (2, torch.bfloat16), (5, torch.bfloat16)],
    ids=str,
)
def test_ragged_attention_schedules(few_blocks: ModuleType, group: int, dtype: torch.dtype) -> None:
    case = ragged.cast(ragged.make_case(heads=3, group=group, dim=24, stored=300, tail=3), dtype)
    first = simulated.Device(few_blocks).ragged_attention(**case, scaling=0.2)
    expected = ragged.oracle(**case, scaling=0.2)
    tolerance = ragged.DTYPES[dtype]
    torch.testing.assert_close(first.double(), expected, atol=tolerance, rtol=tolerance)
    for seed in range(1, NUM_SCHEDULES):
        got = simulated.Device(few_blocks, seed).ragged_attention(**case, scaling=0.2)
        assert torch.equal(got, first), f"seed {seed}"


@pytest.mark.parametrize(("group", "dtype"), [(4, torch.float32), (5, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_ragged_attention_on_misaligned_storage(
    kernels: ModuleType, offset: int, group: int, dtype: torch.dtype
) -> None:
    case = ragged.make_case(heads=2, group=group, dim=64, stored=100, tail=3)
    case = ragged.cast(case, dtype)
    expected = simulated.Device(kernels).ragged_attention(**case, scaling=0.1)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = tensor.new_zeros(tensor.numel() + offset)
        return room[offset:].view(tensor.shape).copy_(tensor)

    floats = [name for name, tensor in case.items() if tensor.is_floating_point()]
    for name in floats:  # each alone makes its own accesses narrower
        moved = case | {name: shifted(case[name])}
        got = simulated.Device(kernels).ragged_attention(**moved, scaling=0.1)
        torch.testing.assert_close(got, expected)


# Grouped queries, tails, many queries, dims of which a group of codes is not whole, wide ones.
STORED = (
    *(
        "three heads of three",
        "no tail",
        "nothing stored",
        "odd dims",
        "wide values",
        "a long tail",
    ),
    *("one dim", "one of all"),
)
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("pairs", PAIRS)
def test_stored_rows(kernels: ModuleType, pairs: str, name: str, dtype: torch.dtype) -> None:
    """Quantised rows, biases and sinks, against fp64 of what they say."""
    shape = {**ragged.CASES[name]}
    shape["stored"] = min(shape.get("stored", 300), 300)
    if pairs != "16" and dtype == torch.float32:
        pytest.skip("refused")
    if "4" in pairs and name in ("odd dims", "one dim"):
        pytest.skip("an odd head dim")
    value_dim = shape.get("value_dim") or shape.get("dim", 64)
    options = {"scaling": shape.get("dim", 64) ** -0.5}
    kinds = ((True, True, 5.0), (False, False, 0.0), (True, False, 0.0))
    # What the others add is the same in every dtype.
    for bias, sinks, softcap in kinds[: 3 if dtype == torch.bfloat16 else 1]:
        case = make_rows(pairs, dtype, bias, sinks, **shape)
        options["softcap"] = softcap
        got = simulated.Device(kernels, len(name)).ragged_attention(**case, **options)
        want = expected(case, value_dim, **options)
        assert got.dtype == dtype and got.is_contiguous()
        tolerance = ragged.DTYPES[dtype]
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dim", [34, 80, 96])
@pytest.mark.parametrize("pairs", QUANTISED)
def test_quantised_rows_of_uneven_dims(kernels: ModuleType, pairs: str, dim: int) -> None:
    """Groups of codes that are not whole, and rows that do not begin at multiples of 16 bytes."""
    case = make_rows(pairs, torch.float16, True, False, dim=dim, stored=150, tail=3, queries=2)
    got = simulated.Device(kernels).ragged_attention(**case, scaling=dim**-0.5)
    want = expected(case, dim, scaling=dim**-0.5)
    torch.testing.assert_close(got.double(), want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("pairs", QUANTISED)
def test_masks_and_strides_of_quantised_rows(kernels: ModuleType, pairs: str) -> None:
    shape = {"batch": 2, "heads": 2, "group": 3, "queries": 4, "tail": 9, "dim": 48}
    case = make_rows(pairs, torch.float16, True, True, stored=200, **shape)
    case["mask"] = torch.rand(2, 6, 4, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    want = expected(case, 48, scaling=0.1)
    got = simulated.Device(kernels).ragged_attention(**case, scaling=0.1)
    torch.testing.assert_close(got.double(), want, atol=2e-3, rtol=2e-3)
    for name in ("keys", "values", "scales"):
        case[name] = torch.cat([case[name]] * 2, 1)[:, : case[name].shape[1]]
    apart = simulated.Device(kernels).ragged_attention(**case, scaling=0.1)
    assert torch.equal(apart, got)


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_a_pair_that_is_no_number_is_loud_unless_it_is_hidden(
    kernels: ModuleType, pairs: str, part: str
) -> None:
    shape = {"heads": 2, "group": 3, "queries": 2, "tail": 2, "dim": 48, "stored": 150}
    case = make_rows("16", torch.float16, True, False, **shape)
    case["begin"], case["end"] = torch.tensor([[0, 70]]).int(), torch.tensor([[70, 150]]).int()

    def run() -> torch.Tensor:
        coded = case
        if pairs != "16":
            rows = reference.quantize_pairs(case["keys"], case["values"], pairs=pairs)
            coded = case | dict(zip(("keys", "values", "scales"), rows, strict=True))
            coded["pairs"] = pairs
        return simulated.Device(kernels).ragged_attention(**coded, scaling=0.1)

    case["bias"][77] = 0.5
    clean = run()
    case[part][77, 5] = torch.nan
    got = run()
    assert torch.equal(got[:, :, :3], clean[:, :, :3])
    assert not got[:, :, 3:].isfinite().all()
    case["bias"][77] = -torch.inf
    hidden = run()
    case[part][77] = 0.0
    # Beside what is no number, weights are not rounded.
    torch.testing.assert_close(hidden, run(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("pairs", PAIRS)
def test_all_hidden_is_zero_and_a_sink_takes_its_share(kernels: ModuleType, pairs: str) -> None:
    device = simulated.Device(kernels)
    case = make_rows(pairs, torch.float16, True, False, tail=0, dim=32, stored=80)
    case["bias"].fill_(-torch.inf)
    assert not device.ragged_attention(**case, scaling=0.1).any()
    assert not device.ragged_attention(**case, sinks=torch.zeros(8), scaling=0.1).any()
    case["bias"].fill_(0.25)
    plain = device.ragged_attention(**case, scaling=0.1)
    weak = device.ragged_attention(**case, sinks=torch.full((8,), -torch.inf), scaling=0.1)
    assert torch.equal(weak, plain) and plain.any()
    strong = device.ragged_attention(**case, sinks=torch.full((8,), 1e4), scaling=0.1)
    assert not strong.any()


def test_quantised_rows_under_every_schedule(few_blocks: ModuleType) -> None:
    case = make_rows("k4v4", torch.bfloat16, True, True, heads=3, dim=32, stored=600, tail=3)
    first = simulated.Device(few_blocks).ragged_attention(**case, scaling=0.2)
    want = expected(case, 32, scaling=0.2)
    torch.testing.assert_close(first.double(), want, atol=1.6e-2, rtol=1.6e-2)
    for seed in range(1, NUM_SCHEDULES):
        got = simulated.Device(few_blocks, seed).ragged_attention(**case, scaling=0.2)
        assert torch.equal(got, first), f"seed {seed}"


@pytest.mark.parametrize("offset", [1, 8])
def test_quantised_rows_at_any_address(kernels: ModuleType, offset: int) -> None:
    case = make_rows("k8v4", torch.bfloat16, True, False, dim=64, stored=100, tail=3)
    want = simulated.Device(kernels).ragged_attention(**case, scaling=0.1)
    for name in ("query", "keys", "values", "scales", "bias"):
        room = case[name].new_zeros(case[name].numel() + offset)
        moved = case | {name: room[offset:].view(case[name].shape).copy_(case[name])}
        got = simulated.Device(kernels).ragged_attention(**moved, scaling=0.1)
        torch.testing.assert_close(got, want)


def test_quantised_rows_take_queries_of_16_bits(kernels: ModuleType) -> None:
    case = make_rows("k8v8", torch.float32, False, False, dim=32, stored=50)
    message = "expected a query of float16 or bfloat16 with quantised pairs on CUDA, got float32"
    with pytest.raises(RuntimeError, match=message):
        simulated.Device(kernels).ragged_attention(**case, scaling=0.1)


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("pairs", QUANTISED)
def test_codes_are_the_references(kernels: ModuleType, pairs: str, dtype: torch.dtype) -> None:
    """To the bit, and what is no number stays in its pair."""
    for dims in ((64, 64), (128, 80), (96, 112), (2, 2), (34, 66), (256, 128), (30, 6), (520, 8)):
        keys, values = (torch.randn(13, x).to(dtype) * 3 for x in dims)
        keys[3, 1], values[4, 0], keys[5], values[6] = torch.nan, torch.inf, 0.0, 1.0
        keys[7], values[8] = 3e4, 6e-8  # near the last of float16, and the first
        got = simulated.Device(kernels).quantize_pairs(keys, values, pairs=pairs)
        want = reference.quantize_pairs(keys, values, pairs=pairs)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_row_ranges_out_of_bounds_are_cut(kernels: ModuleType) -> None:
    case = ragged.make_case(heads=2, dim=16, stored=50)
    case["begin"], case["end"] = torch.tensor([[-3, 40]]).int(), torch.tensor([[20, 99]]).int()
    got = simulated.Device(kernels).ragged_attention(**case, scaling=0.25)
    case["begin"], case["end"] = case["begin"].clamp(min=0), case["end"].clamp(max=50)
    expected = ragged.oracle(**case, scaling=0.25)
    torch.testing.assert_close(got.double(), expected, atol=4e-6, rtol=4e-6)


def with_nan(tensor: torch.Tensor, share: float = 0.02) -> torch.Tensor:
    hit = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) < share
    return tensor.masked_fill(hit, torch.nan)


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
def test_nan_logits(kernels: ModuleType, dtype: torch.dtype) -> None:
    (logits, *_), options = op_cases.GatingTopk(50, 17, 3, dtype).inputs()
    logits = with_nan(logits, 0.3)
    logits[3] = torch.nan
    logits[4] = -torch.inf
    logits[5, 2] = torch.inf
    bias = with_nan(torch.zeros(17), 0.3)
    for some_bias in (None, bias):
        result = simulated.Device(kernels).gating_topk(logits, some_bias, **options)
        op_cases.check_gating_result(result, logits, some_bias, None, **options)


@pytest.mark.parametrize("dtype", op_cases.FLOAT_DTYPES, ids=str)
def test_nan_keys_stay_within_their_head(kernels: ModuleType, dtype: torch.dtype) -> None:
    case = op_cases.ExpertScores((2, 2, 70, 16), dtype=dtype)
    (keys, *rest), options = case.inputs()
    device = simulated.Device(kernels)
    before = device.expert_scores(keys, *rest, **options)
    keys[1, 0, 20] = torch.nan
    after = device.expert_scores(keys, *rest, **options)
    assert after[:3, 1, 0].isnan().any(-1).all()
    for batch, head in ((0, 0), (0, 1), (1, 1)):
        assert torch.equal(after[:, batch, head], before[:, batch, head])


@pytest.mark.parametrize("wrong", [(40, -1), (1000, -5)], ids=str)
def test_indices_out_of_range_move_nothing_outside(
    kernels: ModuleType, wrong: tuple[int, int]
) -> None:
    """An index out of range is neither read nor moved; the memory around stays as it was."""
    case = op_cases.KvCompact((1, 2, 40, 8), (10,))
    (keys, values, indices, _), options = case.inputs()
    indices[0, 0, -1], indices[0, 1, 0] = wrong
    expected = keys.clone()
    for head in range(2):
        for rank, position in enumerate(indices[0, head].tolist()):
            if 0 <= position < 40:
                expected[0, head, rank] = keys[0, head, position]
    simulated.Device(kernels).kv_compact_(keys, values, indices, **options)
    assert torch.equal(keys, expected)


@pytest.mark.parametrize("wrong", [(4, -1), (1000, -5)], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_experts_that_are_none_add_nothing(
    kernels: ModuleType, wrong: tuple[int, int], per_head: bool
) -> None:
    case = op_cases.MixScores((4, 2, 3, 40), 2, per_head=per_head)
    (scores, weights, experts, *maps), _ = case.inputs()
    expected_weights = weights.clone()
    for slot, expert in enumerate(wrong):
        experts[..., slot::7, slot] = expert
        expected_weights[..., slot::7, slot] = 0
    device = simulated.Device(kernels)
    got = device.mix_scores(scores, weights, experts, *maps)
    expected = device.mix_scores(scores, expected_weights, experts.clamp(0, 3), *maps)
    assert torch.equal(got, expected)


def call(kernels: ModuleType, name: str) -> None:
    """Any op on any input."""
    device = simulated.Device(kernels)
    if name == "ragged_attention":
        device.ragged_attention(**ragged.make_case(), scaling=0.1)
    elif name == "quantize_pairs":
        device.quantize_pairs(torch.ones(3, 32), torch.ones(3, 32), pairs="k8v4")
    else:
        check, (_, case, *_) = op_cases.CHECKS[name]
        check(device.op(name), case)


@pytest.mark.parametrize("name", [*op_cases.CHECKS, "quantize_pairs", "ragged_attention"])
def test_gpus_that_are_too_old(kernels: ModuleType, name: str) -> None:
    kernels.set_compute_capability(75)
    try:
        message = f"moekv::{name}: expected a GPU of compute capability 8.0 or higher, got 7.5"
        with pytest.raises(RuntimeError, match=message):
            call(kernels, name)
    finally:
        kernels.set_compute_capability(80)
    call(kernels, name)


@pytest.mark.parametrize("dims", [{"dim": 257}, {"dim": 64, "value_dim": 512}], ids=str)
def test_head_dims_beyond_the_kernel(kernels: ModuleType, dims: dict[str, int]) -> None:
    case = ragged.make_case(**dims)
    key_dim, value_dim = case["keys"].shape[1], case["values"].shape[1]
    message = (
        "moekv::ragged_attention: expected head dims of 1 to 256 on CUDA, "
        f"got {key_dim} for keys and {value_dim} for values"
    )
    with pytest.raises(RuntimeError, match=message):
        simulated.Device(kernels).ragged_attention(**case, scaling=0.1)


def test_more_rows_than_are_counted(kernels: ModuleType) -> None:
    case = ragged.make_case()
    for name in ("tail_keys", "tail_values"):
        case[name] = case[name][:, :, :1].expand(-1, -1, 2**31, -1)
    with pytest.raises(RuntimeError, match="ragged_attention: expected at most 2147483135 rows"):
        simulated.Device(kernels).ragged_attention(**case, scaling=0.1)


def test_more_pairs_than_a_group_may_have(kernels: ModuleType) -> None:
    scores = torch.zeros(2**20).expand(1, 2**11, 2**20)
    with pytest.raises(RuntimeError, match="moekv::select_kept: expected fewer than 2.31 pairs in"):
        simulated.Device(kernels).select_kept(scores, total=[2**11])


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.parametrize("name", op_cases.CHECKS)
def test_misaligned_storage(kernels: ModuleType, name: str, offset: int) -> None:
    """Tensors that begin anywhere give what aligned ones give, through narrower accesses."""
    case: Any = {
        "gating_topk": op_cases.GatingTopk(40, 16, 2, torch.bfloat16),
        "expert_scores": op_cases.ExpertScores((1, 2, 70, 64), dtype=torch.bfloat16),
        "expected_attention": op_cases.ExpectedAttention((1, 2, 70, 64), dtype=torch.bfloat16),
        "project_tokens": op_cases.ProjectTokens((2, 30, 64), 3, torch.bfloat16, mask=True),
        "mix_scores": op_cases.MixScores((4, 2, 3, 40), 2),
        "select_kept": op_cases.SelectKept((2, 1, 64), (20,), dtype=torch.bfloat16),
        "kv_compact_": op_cases.KvCompact((1, 2, 40, 64), (17,), dtype=torch.bfloat16),
    }[name]

    class Shifted(type(case)):
        def inputs(self, device: str = "cpu") -> tuple[list[Any], dict[str, Any]]:
            inputs, options = dataclasses.replace(case).inputs(device)
            return [shifted(x) for x in inputs], options

        def __str__(self) -> str:
            return str(case)

    def shifted(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        room = tensor.new_zeros(tensor.numel() + offset)
        return room[offset:].view(tensor.shape).copy_(tensor)

    shifted_case = Shifted(**{f.name: getattr(case, f.name) for f in dataclasses.fields(case)})
    op_cases.CHECKS[name][0](simulated.Device(kernels).op(name), shifted_case)

"""fold_pairs: who joins whom, what becomes of values, and numbers that are none."""

import math

import pytest
import torch
from memory import peak_mib
from targets import NATIVE_TARGETS, on_any_number_of_threads, refuses
from torch import Tensor

from moekv import ops
from moekv.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = 0.01
"""By how much a cosine may be off: columns are rounded to bfloat16."""


def make(
    target,
    *,
    batch=2,
    heads=2,
    group=2,
    length=70,
    asked=9,
    dims=(16, 24),
    share=0.4,
    dtype=torch.float32,
    start=None,
    seed=0,
) -> dict[str, Tensor | None]:
    """A case in which heads keep different numbers of pairs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(target.device, dtype)

    kept = torch.rand(batch * heads, length, generator=generator) < share
    counts = torch.cat([torch.zeros(1), kept.sum(1)]).cumsum(0)
    return {
        "queries": 2 * draw(batch, heads * group, asked, dims[0]),
        "keys": draw(batch, heads, length, dims[0]),
        "values": draw(batch, heads, length, dims[1]),
        "indices": kept.nonzero()[:, 1].int().to(target.device),
        "offsets": counts.int().to(target.device),
        "start": None if start is None else torch.tensor(start).int().to(target.device),
    }


def run(target, case, *, scaling=0.3, **options) -> list[Tensor]:
    got = target.op("fold_pairs")(**case, scaling=scaling, **options)
    return [x.cpu() for x in got]


def columns(case, b: int, h: int, *, scaling: float, softcap: float = 0.0) -> Tensor:
    """Shares [Q, L] of the queries of one KV head over its real keys, in float64."""
    first = 0 if case["start"] is None else min(max(int(case["start"][b]), 0), 10**9)
    keys = case["keys"][b, h, first:].cpu().double()
    group = case["queries"].shape[1] // case["keys"].shape[1]
    queries = case["queries"][b, h * group : (h + 1) * group].cpu().double().flatten(0, 1)
    logits = scaling * queries @ keys.T
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    return logits.softmax(-1)


def check(case, got, *, gate=0.0, least=0.0, scaling=0.3, softcap=0.0) -> None:
    """Hold a result to the definition, pair by pair."""
    folded, bias, joined = got
    batch, heads, length = case["keys"].shape[:3]
    values, offsets = case["values"].cpu().double(), case["offsets"].tolist()
    assert folded.dtype == case["values"].dtype and folded.is_contiguous()
    assert bias.dtype == torch.float16 and joined.dtype == torch.int32
    tolerance = {"rtol": 2e-5, "atol": 2e-5}
    if folded.dtype != torch.float32:
        tolerance = {"rtol": 1e-2, "atol": 1e-2}
    for row in range(batch * heads):
        b, h = divmod(row, heads)
        first = 0 if case["start"] is None else min(max(int(case["start"][b]), 0), length)
        mine = range(offsets[row], offsets[row + 1])
        places = case["indices"].cpu()[mine.start : mine.stop].long()
        shares = torch.zeros(case["queries"].shape[2] * 8, length, dtype=torch.float64)[:1]
        if first < length:
            real = columns(case, b, h, scaling=scaling, softcap=softcap)
            shares = torch.zeros(len(real), length, dtype=torch.float64)
            shares[:, first:] = torch.where(real < 1e-18, 0.0, real)
        looks = shares.mean(0)
        enough = least / max(length - first, 1)
        patterns = shares / shares.norm(dim=0).clamp_min(1e-300)
        totals = torch.ones(len(places), dtype=torch.float64)
        sums = values[b, h, places].clone()
        for place in range(length):
            to = int(joined[b, h, place])
            if place < first or place in places.tolist():
                assert to == -1
                continue
            cosines = patterns[:, place] @ patterns[:, places]
            best = float(cosines.max()) if len(places) else 0.0
            if to == -1:
                lost = best <= gate + NEAR or looks[place] < enough * (1 + 1e-3)
                assert lost or not values[b, h, place].isfinite().all()
                continue
            assert to in mine and looks[place] >= enough * (1 - 1e-3)
            i = to - mine.start
            assert float(cosines[i]) >= best - NEAR and best > gate - NEAR
            weight = min(1.0, float(looks[place] / looks[places[i]]))
            totals[i] += weight
            sums[i] += weight * values[b, h, place]
        wanted = sums / totals[:, None]
        torch.testing.assert_close(folded[mine.start : mine.stop].double(), wanted, **tolerance)
        own = bias[mine.start : mine.stop].double()
        torch.testing.assert_close(own, totals.log(), rtol=1e-3, atol=1e-3)


SHAPES = {
    "plain": {},
    "one query": {"group": 1, "asked": 1},
    "as many queries as can be": {"group": 4, "asked": 64, "length": 90},
    "odd group": {"group": 3, "asked": 11, "heads": 1},
    "odd dims": {"dims": (5, 7)},
    "wide": {"dims": (80, 256)},
    "several chunks": {"length": 900, "batch": 1, "share": 0.1},
    "nothing leaves": {"share": 1.1},
    "nothing stays": {"share": -1.0},
    "one position": {"length": 1, "share": 0.5},
    "no position": {"length": 0},
    "no row": {"batch": 0},
    "padding": {"start": [13, 0]},
    "a row of padding": {"start": [70, 69]},
    "start beyond": {"start": [99, -5]},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, padded": {"dtype": torch.bfloat16, "length": 500, "start": [7, 130], "dims": (64, 64)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_does_what_it_says(target, name):
    case = make(target, **SHAPES[name])
    check(case, run(target, case))


@pytest.mark.parametrize(
    "options",
    [{"softcap": 2.0}, {"gate": 0.7}, {"gate": 1.0}, {"least": 0.5, "gate": 0.2}],
    ids=str,
)
def test_options(target, options):
    case = make(target, length=200)
    got = run(target, case, **options)
    check(case, got, **options)
    if options.get("gate") == 1.0:
        assert (got[2] == -1).all() and not got[1].any()
    if "least" in options:  # of a row with padding as of one without: the mean is over real pairs
        every = run(target, case, gate=options["gate"])[2] != -1
        assert 0.2 < (got[2] != -1).sum() / every.sum() < 0.8
        padded = make(target, length=200, start=[150, 0])
        check(padded, run(target, padded, **options), **options)


@pytest.mark.parametrize("target", NATIVE_TARGETS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_reference(target, name):
    """The same pairs join, but for ties within rounding."""
    case = make(target, **SHAPES[name])
    mine = run(target, case)
    other = [x.cpu() for x in reference.fold_pairs(**case, scaling=0.3)]
    same = mine[2] == other[2]
    assert same.numel() == 0 or same.float().mean() > 0.97
    same = (mine[1] - other[1]).abs() < 1e-3
    assert len(same) == 0 or same.float().mean() > 0.9


def test_alike_joins_alike(target):
    """Copies of kept keys join them with weight 1, the first of equals; strangers stay apart."""
    case = make(target, batch=1, heads=1, group=1, length=8, asked=12, dims=(8, 8), share=1.1)
    keys = 6 * torch.eye(8, device=target.device)
    keys[5] = keys[4] = keys[1]
    case |= {
        "keys": keys[None, None],
        "queries": torch.eye(8, device=target.device).repeat(2, 1)[None, None, :12] * 4,
        "indices": torch.tensor([0, 1, 5, 7], dtype=torch.int32, device=target.device),
        "offsets": torch.tensor([0, 4], dtype=torch.int32, device=target.device),
    }
    folded, bias, joined = run(target, case, scaling=1.0, gate=0.9)
    values = case["values"][0, 0].cpu()
    assert joined[0, 0].tolist() == [-1, -1, -1, -1, 1, -1, -1, -1]
    torch.testing.assert_close(folded[1], (values[1] + values[4]) / 2)
    assert torch.equal(folded[[0, 2, 3]], values[[0, 5, 7]])
    torch.testing.assert_close(
        bias.float(), torch.tensor([0, math.log(2), 0, 0]), atol=1e-3, rtol=0
    )


def test_attention_over_the_folded_is_that_over_all_where_pairs_are_alike(target):
    """Each key twice, of which one stays: with values and biases nothing is lost."""
    case = make(target, batch=1, heads=1, group=2, length=40, asked=20, dims=(16, 16), share=1.1)
    keys, values = (case[name].repeat_interleave(2, 2) for name in ("keys", "values"))
    values[:, :, 1::2] *= -0.5
    kept = torch.arange(0, 80, 2, dtype=torch.int32, device=target.device)
    ends = torch.tensor([0, 40], dtype=torch.int32, device=target.device)
    case |= {"keys": keys, "values": values, "indices": kept, "offsets": ends}
    folded, bias, _ = run(target, case)
    shares = columns(case, 0, 0, scaling=0.3)
    wanted = shares @ values[0, 0].cpu().double()
    weights = columns(case, 0, 0, scaling=0.3)[:, ::2] * bias.double().exp()
    got = weights / weights.sum(1, keepdim=True) @ folded.double()
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e5])
def test_what_is_no_number_stays_in_its_pair(target, bad):
    case = make(target, batch=1, heads=2)
    evicted = next(t for t in range(70) if t not in case["indices"][: case["offsets"][1]].tolist())
    case["values"][0, 0, evicted, 3] = bad
    kept = int(case["indices"][case["offsets"][1]])
    case["values"][0, 1, kept, 0] = bad
    got = run(target, case)
    assert got[2][0, 0, evicted] == -1
    wrong = ~(got[0].abs() < 1e4).all(1)
    assert wrong.nonzero().flatten().tolist() == [int(case["offsets"][1])]
    clean = make(target, batch=1, heads=2)
    clean["keys"][0, 0, 5, 2] = bad
    folded, bias, joined = run(target, clean)
    assert folded.isfinite().all() and bias.isfinite().all()
    plain = run(target, make(target, batch=1, heads=2))
    assert torch.equal(joined[0, 1], plain[2][0, 1])


def test_large_logits_and_keys_that_nobody_sees(target):
    for scaling in (1e-6, 1e3, 1e10):
        case = make(target, length=100)
        got = run(target, case, scaling=scaling)
        assert got[0].isfinite().all() and got[1].isfinite().all()
        check(case, got, scaling=scaling)


def test_a_padded_row_folds_as_it_does_alone(target):
    case = make(target, batch=2, start=[37, 0], length=300)
    whole = run(target, case)
    offsets, keep = case["offsets"].tolist(), []
    for row in range(2):
        mine = case["indices"][offsets[row] : offsets[row + 1]]
        keep.append(mine[mine >= 37] - 37)
    alone = {name: case[name][:1] for name in ("queries", "keys", "values")}
    alone |= {name: alone[name][:, :, 37:] for name in ("keys", "values")}
    counts = torch.tensor([0, *map(len, keep)], device=target.device).cumsum(0).int()
    alone |= {"indices": torch.cat(keep), "offsets": counts, "start": None}
    got = run(target, alone)
    real = torch.cat([case["indices"][offsets[r] : offsets[r + 1]] >= 37 for r in range(2)]).cpu()
    for mine, other in zip(whole[:2], got[:2], strict=True):
        near = 0 if target.backend == "cpu" else 1e-3
        torch.testing.assert_close(mine[: offsets[2]][real], other, atol=near, rtol=near)


def test_strided_inputs(target):
    case = make(target, dims=(16, 16))
    plain = run(target, case)
    for name in ("queries", "keys", "values"):
        across = case[name].transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(run(target, case | {name: across})[2], plain[2])
        sparse = torch.stack([case[name], case[name]], -1)[..., 0]
        assert torch.equal(run(target, case | {name: sparse})[2], plain[2])


@pytest.mark.parametrize("target", NATIVE_TARGETS, ids=str)
def test_threads_do_not_matter(target):
    case = make(target, length=1500, dims=(64, 64), dtype=torch.bfloat16)
    on_any_number_of_threads(lambda: run(target, case))


@pytest.mark.parametrize("target", NATIVE_TARGETS, ids=str)
def test_opcheck(target):
    op = torch.ops.moekv.fold_pairs.default
    for start in (None, [3, 0]):
        case = make(target, length=20, start=start)
        torch.library.opcheck(op, tuple(case.values()), {"scaling": 0.3, "gate": 0.2, "least": 0.1})


def test_no_gradient():
    case = make(NATIVE_TARGETS[0] if NATIVE_TARGETS else pytest.skip("no native op"))
    case["values"].requires_grad_()
    for backend in ("auto", "torch"):
        folded = ops.fold_pairs(**case, scaling=0.3, backend=backend).values
        with pytest.raises(NotImplementedError, match="no backward"):
            folded.sum().backward()


def test_memory_grows_with_the_text_and_not_with_its_square():
    case = make(
        NATIVE_TARGETS[0], batch=1, heads=1, length=40_000, asked=32, dims=(64, 64), share=0.2
    )
    assert peak_mib(lambda: ops.fold_pairs(**case, scaling=0.3)) < 60  # 40,000² floats are 6,100


WRONG = {
    "queries of dtype float32": {"queries": torch.zeros(2, 4, 9, 16, dtype=torch.int32)},
    r"keys \[2, num_kv_heads, num_keys, 16\]": {"keys": torch.zeros(2, 2, 70, 8)},
    r"values \[2, 2, 70, value_dim\]": {"values": torch.zeros(2, 2, 7, 8)},
    "num_query_heads to be a multiple": {"queries": torch.zeros(2, 3, 9, 16)},
    "1 to 256 queries of each KV head, got 0": {"queries": torch.zeros(2, 4, 0, 16)},
    "1 to 256 queries of each KV head, got 260": {"queries": torch.zeros(2, 4, 130, 16)},
    "indices of dtype int32": {"indices": torch.zeros(3)},
    r"offsets \[5\]": {"offsets": torch.zeros(4, dtype=torch.int32)},
    "a gate between 0 and 1, got 2": {"gate": 2.0},
    "least between 0 and 1, got -1": {"least": -1.0},
    "least between 0 and 1, got nan": {"least": math.nan},
    "scaling between": {"scaling": 0.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(target, message):
    case = make(target) | {"scaling": 0.3}
    refuses(target, "fold_pairs", case | WRONG[message], message)


@pytest.mark.parametrize("wrong", ["order", "range", "offsets", "end"])
def test_indices_are_checked(target, wrong):
    if target.device != "cpu":
        pytest.skip("a look at them would wait for the device")
    case = make(target)
    indices, offsets = case["indices"].clone(), case["offsets"].clone()
    if wrong == "order":
        indices[:2] = indices[:2].flip(0)
    elif wrong == "range":
        indices[offsets[1] - 1] = 70
    elif wrong == "offsets":
        offsets[1] = offsets[2] + 1
    else:
        offsets[-1] -= 1
    with pytest.raises(RuntimeError, match="moekv::fold_pairs: expected (offsets|.*indices)"):
        run(target, case | {"indices": indices, "offsets": offsets})

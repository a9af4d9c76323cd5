from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekv.budget import (
    Kept,
    check_ratio,
    choose,
    kept_pairs,
    protect,
    select,
)

NAN, INF = float("nan"), float("inf")


@given(st.integers(0, 5000), st.floats(0, 1, exclude_max=True))
def test_kept_pairs_are_those_of_kvpress(length: int, ratio: float) -> None:
    theirs = pytest.importorskip("kvpress.utils").compute_n_kept(length, ratio)
    assert kept_pairs(length, ratio) == theirs
    assert 1 <= kept_pairs(length, ratio) <= max(length, 1)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, NAN])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match="compression_ratio in"):
        check_ratio(ratio)


@given(
    st.integers(1, 40),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(1, 40),
    st.integers(0, 1000),
)
def test_topk_of_protected_scores_is_what_select_keeps(
    length: int, sinks: int, recent: int, total: int, seed: int
) -> None:
    """Whichever way pairs are chosen, by moekv or by a wrapper of kvpress, they are the same."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randperm(2 * 3 * length, generator=generator).float().view(2, 3, length)
    scores = 10.0 * scores - 100
    total = min(total, length)
    protected = {"sinks": sinks, "recent": recent}
    (kept,) = select([scores], None, [total, total], backend="auto", **protected)
    indices = kept.indices.view(*scores.shape[:2], total)
    best = protect(scores, None, **protected).topk(total, dim=-1).indices.sort(-1).values
    assert torch.equal(indices.long(), best)


def test_protect_orders_sinks_recent_scores_nan_padding() -> None:
    scores = torch.tensor([[[9.0, NAN, 5.0, 7.0, NAN, 6.0, -2.0, 8.0, 0.0, 1.0]]])
    start = torch.tensor([1], dtype=torch.int32)
    ranked = protect(scores, start, sinks=2, recent=3)
    assert ranked.isfinite().all()
    # Sinks 1, 2; recent 9, 8, 7; by score 3, 5, 6; NaN 4; padding 0.
    assert ranked.argsort(descending=True).flatten().tolist() == [1, 2, 9, 8, 7, 3, 5, 6, 4, 0]
    assert len(ranked.unique()) == 10


def test_protect_treats_a_row_as_if_it_were_alone() -> None:
    scores = torch.randn(3, 2, 30) * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    start = torch.tensor([0, 7, 12], dtype=torch.int32)
    together = protect(scores, start, sinks=4, recent=5)
    for row in range(3):
        begin = int(start[row])
        alone = protect(scores[row : row + 1, :, begin:], None, sinks=4, recent=5)
        assert torch.equal(together[row : row + 1, :, begin:], alone)


def test_protect_leaves_its_input_alone() -> None:
    scores = torch.randn(1, 2, 30)
    before = scores.clone()
    protect(scores, None, sinks=4, recent=5).zero_()
    assert torch.equal(scores, before)


def test_select_with_one_total_per_row() -> None:
    scores = torch.arange(24.0).view(2, 2, 6)
    start = torch.tensor([0, 3], dtype=torch.int32)
    (kept,) = select([scores], start, [3, 1], sinks=1, recent=0, backend="auto")
    assert kept.indices.tolist() == [0, 4, 5] * 2 + [3] * 2
    assert kept.per_head is None
    (kept,) = select([scores], None, [2, 2], sinks=1, recent=0, backend="auto")
    assert kept.indices.tolist() == [0, 5] * 4
    assert kept.per_head == 2


def test_kept_marks_and_numbers_its_positions() -> None:
    indices = torch.tensor([0, 2, 1, 0, 1, 2, 3], dtype=torch.int32)
    kept = Kept(indices, torch.tensor([0, 2, 3, 3, 7], dtype=torch.int32), (2, 2, 4))
    assert kept.mask().int().tolist() == [
        [[1, 0, 1, 0], [0, 1, 0, 0]],
        [[0, 0, 0, 0], [1, 1, 1, 1]],
    ]
    assert kept.rows().tolist() == [0, 2, 5, 12, 13, 14, 15]
    assert kept.share().tolist() == [[0.5, 0.5, 0.5, 0.0], [0.5] * 4]
    again = Kept.from_mask(kept.mask())
    assert torch.equal(again.indices, indices) and torch.equal(again.offsets, kept.offsets)


@settings(deadline=None, max_examples=40)
@given(
    layers=st.integers(1, 4),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 40),
    seed=st.integers(0, 999),
    budget=st.sampled_from(["uniform", "head", "model"]),
    padded=st.booleans(),
)
def test_every_budget_is_exact_and_takes_the_best(
    layers: int, batch: int, heads: int, length: int, seed: int, budget: str, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(batch, heads, length, generator=generator) for _ in range(layers)]
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths = lengths.tolist() if padded else [length] * batch
    start = torch.tensor([length - n for n in lengths], dtype=torch.int32) if padded else None
    totals = [max(1, n // 2) for n in lengths]
    kept = select(scores, start, totals, budget=budget, sinks=1, recent=2, backend="auto")
    masks = torch.stack([k.mask() for k in kept], dim=1)  # [B, L, H, T]
    stacked = torch.stack(scores, dim=1)
    for row, (n, total) in enumerate(zip(lengths, totals, strict=True)):
        real, mask = stacked[row, ..., length - n :], masks[row]
        assert not mask[..., : length - n].any()
        mask = mask[..., length - n :]
        sums = {"uniform": mask.sum(-1), "head": mask.sum((1, 2)), "model": mask.sum()}[budget]
        share = {"uniform": 1, "head": heads, "model": heads * layers}[budget]
        assert (sums == total * share).all()
        if total >= 3:
            always = torch.zeros_like(mask)
            always[..., 0] = always[..., -2:] = True
            assert (mask | ~always).all()
            dims = {"uniform": -1, "head": (1, 2), "model": (0, 1, 2)}[budget]
            worst = real.masked_fill(~mask | always, torch.inf).amin(dims)
            best = real.masked_fill(mask, -torch.inf).amax(dims)
            assert (worst >= best).all()
    assert all((k.per_head == totals[0]) == (k.per_head is not None) for k in kept)
    if budget != "uniform" or padded:
        assert all(k.per_head is None for k in kept)


@settings(deadline=None, max_examples=60)
@given(
    layers=st.integers(1, 5),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 40),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    seed=st.integers(0, 999),
    padded=st.booleans(),
)
def test_layers_keep_what_their_heads_would_on_average(
    layers: int, batch: int, heads: int, length: int, share: float, seed: int, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(layers, generator=generator) * 4
    scores = [x + torch.randn(batch, heads, length, generator=generator) for x in spread]
    lengths = torch.randint(1, length + 1, (batch,), generator=generator).tolist()
    lengths = lengths if padded else [length] * batch
    start = torch.tensor([length - n for n in lengths], dtype=torch.int32) if padded else None
    totals = [max(1, int(share * n)) for n in lengths]

    def under(budget: str, which: slice, totals: Sequence[int]) -> list[Kept]:
        these = scores[which]
        return select(these, start, totals, budget=budget, sinks=1, recent=2, backend="auto")

    kept = choose(under, "layer", totals, [lengths] * layers, alike=not padded)
    over_model = torch.stack([k.counts() for k in under("model", slice(None), totals)])
    counts = torch.stack([k.counts() for k in kept])  # [L, B, H]
    assert (counts == counts[..., :1]).all() and (counts >= 1).all()
    assert counts[..., 0].sum(0).tolist() == [layers * n for n in totals]
    mean = over_model.double().mean(-1) if padded else over_model.double().mean((1, 2))[:, None]
    raised = (mean.clamp(min=1) - mean).sum(0).max()  # no layer keeps none
    assert ((counts[..., 0] - mean).abs() < 1 + raised).all()
    for index, each in enumerate(kept):
        assert (each.per_head is None) == padded
        own = counts[index, :, 0].tolist()
        (expected,) = under("uniform", slice(index, index + 1), own)
        assert torch.equal(each.indices, expected.indices)

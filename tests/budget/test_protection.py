import torch
from hypothesis import given
from hypothesis import strategies as st

from moekv.budget import (
    protect,
    select,
)

NAN = float("nan")


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

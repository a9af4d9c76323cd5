import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekv.budget import (
    select,
)


def test_select_with_one_total_per_row() -> None:
    scores = torch.arange(24.0).view(2, 2, 6)
    start = torch.tensor([0, 3], dtype=torch.int32)
    (kept,) = select([scores], start, [3, 1], sinks=1, recent=0, backend="auto")
    assert kept.indices.tolist() == [0, 4, 5] * 2 + [3] * 2
    assert kept.per_head is None
    (kept,) = select([scores], None, [2, 2], sinks=1, recent=0, backend="auto")
    assert kept.indices.tolist() == [0, 5] * 4
    assert kept.per_head == 2


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

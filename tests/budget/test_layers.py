from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekv.budget import (
    Kept,
    choose,
    select,
)


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

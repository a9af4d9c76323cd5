from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peers import peer
from torch import Tensor

from moekv import Expert, LayerView, expert_names, ops, register_expert
from moekv.budget import select
from moekv.experts import registry
from moekv.experts.base import scores_by
from moekv.experts.position import PositionExpert
from moekv.experts.registry import build_experts
from moekv.ops import ScoreKind

NAN, INF = float("nan"), float("inf")


def make_view(length: int = 20, starts: tuple[int, ...] = (0, 0), **changes: Any) -> LayerView:
    batch, heads, dim = len(starts), 2, 8
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    fields: dict[str, Any] = {
        "module": SimpleNamespace(scaling=0.3, config=SimpleNamespace()),
        "hidden_states": randn(batch, length, 16),
        "keys": randn(batch, heads, length, dim),
        "values": randn(batch, heads, length, dim),
        "queries": randn(batch, 2 * heads, min(5, length), dim),
        "start": torch.tensor(starts, dtype=torch.int32) if any(starts) else None,
        "lengths": tuple(length - start for start in starts),
        "begins": True,
        "ends": True,
        "attentions": None,
        "kwargs": {},
    }
    return LayerView(**fields | changes)


class Fixed(Expert):
    def __init__(self, scores: Tensor, name: str = "fixed") -> None:
        self.name, self._fixed = name, scores

    def scores(self, view: LayerView) -> Tensor:
        return self._fixed


def test_registry_has_the_documented_order() -> None:
    names = expert_names()
    assert names[:7] == (
        "aggressive",
        "moderate",
        "conservative",
        "selective",
        "semantic",
        "temporal",
        "expected",
    )
    rows = [line.split() for line in registry.__doc__.splitlines() if line[:1].isdigit()]
    assert [(int(row[0]), row[1].strip("`")) for row in rows] == list(enumerate(names))
    for name, expert in zip(names, build_experts(names), strict=True):
        assert expert.name == name


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("aggressive", 0.2, 0.1), ("moderate", 0.3, 0.2), ("conservative", 0.5, 0.3)],
)
@given(length=st.integers(1, 300), start=st.integers(0, 20))
def test_position_experts_keep_exactly_their_regions(
    name: str, first: float, last: float, length: int, start: int
) -> None:
    (expert,) = build_experts([name])
    head, tail = int(length * first), int(length * last)
    expected = [*range(head), *range(length - tail, length)] or [0]
    assert expert.kept(length, 0.99) == len(expected)
    view = make_view(length + start, (start, 0))
    scores = expert.scores(view)
    assert scores.shape == view.keys.shape[:3]
    # As the press selects, so that also the score has to be right, and row by row.
    (kept,) = select(
        [scores[:1]],
        None if view.start is None else view.start[:1],
        [len(expected)],
        sinks=0,
        recent=0,
        backend="torch",
    )
    assert kept.indices.tolist() == [start + i for i in expected] * 2


def test_position_scores_fall_with_the_distance() -> None:
    (expert,) = build_experts(["aggressive"])
    scores = expert.scores(make_view(20))[0, 0]
    # The regions are 0 to 3, and 18 and 19: so 4 positions here count as 2 there.
    expected = [min(place / 4, (19 - place) / 2) for place in range(20)]
    assert (-scores).tolist() == expected


def test_position_expert_without_an_end() -> None:
    expert = PositionExpert("head", 0.25, 0.0)
    scores = expert.scores(make_view(8))[0, 0]
    assert (scores * -2).int().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    for first, last in ((-0.1, 0.5), (0.7, 0.4), (NAN, 0.1)):
        with pytest.raises(ValueError, match="shares"):
            PositionExpert("bad", first, last)


def test_kinds_are_computed_once_for_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def count(*args: Any, **options: Any) -> Tensor:
        calls.append(options["kinds"])
        return original(*args, **options)

    original = ops.expert_scores
    monkeypatch.setattr(ops, "expert_scores", count)
    view = make_view()
    selective, semantic, temporal = build_experts(["selective", "semantic", "temporal"])
    scores = original(
        view.keys,
        view.values,
        view.queries,
        kinds=list(ScoreKind),
        scaling=0.3,
        pool=5,
        lag=128,
    )
    assert torch.equal(selective.scores(view), scores[ScoreKind.ATTENTION])
    assert torch.equal(semantic.scores(view), scores[ScoreKind.DIVERSITY])
    age = torch.arange(19, -1, -1)
    expected = scores[ScoreKind.LAG] - (1 + age / 128).log()
    torch.testing.assert_close(temporal.scores(view), expected)
    assert len(calls) == 1


def test_kvpress_scorers_are_called_as_by_kvpress() -> None:
    view = make_view()
    norm, snap = build_experts([peer("KnormPress")(), peer("SnapKVPress")(window_size=4)])
    assert (norm.name, snap.name) == ("KnormPress", "SnapKVPress")
    assert torch.equal(norm.scores(view), -view.keys.norm(dim=-1))
    assert norm.kept(10, 0.7) == 3


def test_registering() -> None:
    register_expert("even", lambda: Fixed(torch.zeros(0), "even"))
    try:
        assert expert_names()[-1] == "even"
        first, second = build_experts(["even"]) + build_experts(["even"])
        assert first is not second
        with pytest.raises(ValueError, match="'even'"):
            register_expert("even", lambda: Fixed(torch.zeros(0)))
        with pytest.raises(TypeError, match="factory"):
            register_expert("odd", "not callable")  # type: ignore[arg-type]
    finally:
        del registry._REGISTRY["even"]


def test_factory_that_returns_no_expert() -> None:
    register_expert("broken", lambda: "nothing")  # type: ignore[arg-type, return-value]
    try:
        with pytest.raises(TypeError, match="factory of 'broken' to return an Expert, got str"):
            build_experts(["broken"])
    finally:
        del registry._REGISTRY["broken"]


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        (["unknown"], ValueError, "aggressive.*got 'unknown'"),
        (["selective", "selective"], ValueError, "different names"),
        ([], ValueError, "one or more"),
        ("selective", TypeError, "to be a list"),
        (3, TypeError, "to be a list"),
        ([3], TypeError, "got int"),
    ],
)
def test_what_is_no_expert(items: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_experts(items)


def test_scores_of_padded_rows_are_those_of_the_rows_alone() -> None:
    view = make_view(30, (0, 13))
    alone = make_view(
        17,
        (0,),
        keys=view.keys[1:, :, 13:],
        values=view.values[1:, :, 13:],
        queries=view.queries[1:],
    )
    for expert in build_experts(expert_names()[:6]):
        torch.testing.assert_close(expert.scores(view)[1:, :, 13:], expert.scores(alone))


def test_infinite_scores_come_next_to_the_finite_ones() -> None:
    view = make_view(5, (0,))
    scores = torch.tensor([[[1.0, INF, 3.0, -INF, NAN], [2.0, 2.0, INF, 2.0, -INF]]])
    stacked = scores_by(Fixed(scores), view)
    assert stacked[0, 0, :4].tolist() == [1.0, 5.0, 3.0, -1.0] and stacked[0, 0, 4].isnan()
    assert stacked[0, 1].tolist() == [2.0, 2.0, 3.0, 2.0, 1.0]
    mask = torch.tensor([[[0.0, -INF, 0.0, -INF, 0.0]] * 2])
    assert scores_by(Fixed(mask), view)[0, 0].tolist() == [0.0, -1.0, 0.0, -1.0, 0.0]


def test_infinity_at_padding_moves_nothing() -> None:
    view = make_view(4, (2,))
    scores = torch.tensor([[[1e9, -1e9, 1.0, INF]] * 2])
    assert scores_by(Fixed(scores), view)[0, 0, 2:].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "scores", [torch.zeros(2, 2, 19), torch.zeros(2, 2, 20, 1), torch.zeros(2, 2, 20).int()]
)
def test_scores_of_another_shape_or_dtype(scores: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[2, 2, 20\] on cpu from expert 'fixed', got"):
        scores_by(Fixed(scores), make_view(20))

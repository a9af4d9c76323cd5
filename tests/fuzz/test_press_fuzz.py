"""The fuzzer of presses finds faults, makes them small, and finds none in a few lives."""

from typing import Any

import pytest
from press_fuzz import draw, error_of, reduce
from torch import Tensor

from moekv.cache.folding import Folding
from moekv.cache.ragged import RaggedLayer
from moekv.press import prefill as prefills

OPTIONS = {"compression_ratio": 0.5, "budget": "head", "experts": ["selective"], "top_k": 1}
LIFE = [("prefill", [20], OPTIONS), ("more", 2), ("rows", [1, 0], "reorder_cache"), ("more", 2)]

LATE = {"compression_ratio": 0.6, "budget": "model", "sinks": 0}

FOUND = {
    "notes of rows that were selected are saved": (
        "phi3",
        "calibrated",
        (7,),
        [
            ("prefill", [14], OPTIONS | {"budget": "model", "window": 4}),
            ("rows", [2, 5], "reorder_cache"),
            ("file",),
        ],
    ),
    "a row of which a crop leaves padding alone is saved": (
        "phi3",
        "plain",
        (25, 3),
        [
            ("prefill", [29], OPTIONS | {"pairs": "k8v8", "fold": False}),
            ("shorten", 9),
            ("file",),
            ("more", 2),
        ],
    ),
    "a later layer stores what a mask hides and the first one lacks": (
        "llama_mha",
        "plain",
        (0,),
        [("prefill", [44], OPTIONS | LATE | {"recent": 4, "window": 1}), ("masked", [41], 4, 2)],
    ),
    "a row that is padding in the first chunk is rated as among others": (
        "llama_mha",
        "plain",
        (19, 34),
        [
            (
                "prefill",
                [22, 15],
                OPTIONS
                | {"compression_ratio": 0.3, "experts": ["expected", "selective"]}
                | {"sinks": 1, "recent": 0, "window": 9},
            ),
            ("more", 1),
        ],
    ),
    "a row grows by padding, which is no compression": (
        "llama_mha",
        "plain",
        (17, 0),
        [
            ("prefill", [18], OPTIONS | LATE | {"experts": ["expected"], "recent": 5, "window": 5}),
            ("shorten", 3),
            ("grow", 1, 7, 2, OPTIONS | {"experts": "uneven", "pairs": "16", "fold": True}),
            ("more", 5),
            ("shorten", 8),
        ],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_lives_that_have_gone_wrong(name: str) -> None:
    assert error_of(*FOUND[name]) is None


def test_a_few_lives() -> None:
    for seed in range(6):
        assert error_of(*draw(seed)) is None, f"seed {seed}"


def test_a_fault_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_of("llama", "plain", (0, 3), LIFE) is None

    def forget_to_select(self: RaggedLayer, indices: Tensor) -> None:
        """Leave rows where they are."""

    monkeypatch.setattr(RaggedLayer, "_select_rows", forget_to_select)
    assert "AssertionError" in str(error_of("llama", "plain", (0, 3), LIFE))
    steps = reduce("llama", "plain", (0, 3), LIFE)[-1]
    assert [step[0] for step in steps] == ["prefill", "rows", "more"]


FOLDS = {"compression_ratio": 0.9, "budget": "model", "pairs": "k8v8", "fold": True}
FOLDED = [("prefill", [48], OPTIONS | FOLDS), ("more", 2), ("rows", [1, 0], "reorder_cache")]


def test_a_fault_in_folding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = Folding.fold
    lives = [(name, "plain", (0, 9), [*FOLDED, ("more", 2)]) for name in ("llama", "phi3")]
    assert [error_of(*life) for life in lives] == [None, None]

    def less_bias(self: Folding, *args: Any, **kwargs: Any) -> Any:
        values, bias, num_joined = fold(self, *args, **kwargs)
        return values, bias * 0.97, num_joined

    def fewer(self: Folding, *args: Any, **kwargs: Any) -> Any:
        values, bias, num_joined = fold(self, *args, **kwargs)
        return values, bias, num_joined // 2

    for faulty in (less_bias, fewer):
        with monkeypatch.context() as patch:
            patch.setattr(Folding, "fold", faulty)
            assert all("AssertionError" in str(error_of(*life)) for life in lives)
    for name, number in (("FOLD_GATE", 0.7), ("FOLD_LEAST", 0.4), ("FOLD_QUERIES", 32)):
        with monkeypatch.context() as patch:
            patch.setattr(prefills, name, number)
            assert any("AssertionError" in str(error_of(*life)) for life in lives), name

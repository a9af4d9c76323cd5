"""Calibration as a whole: its texts, its settings, and where it was interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_cases import SMALL, text, texts
from tiny_models import tiny_model
from transformers import PreTrainedTokenizerFast

from moekv import CalibrationConfig, calibrate
from moekv.calibration.calibrate import find_domains
from moekv.calibration.oracle import Oracle, Reading


def test_calibration_ranks_better_than_chance_and_is_repeatable(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model()
    first = calibrate(model, tokenizer, texts(24), config=SMALL, progress=False)
    again = calibrate(model, tokenizer, texts(24), config=SMALL, progress=False)
    for (name, one), (_, other) in zip(
        first.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    curve = first.recipe["curve"]
    assert len(curve) == SMALL.epochs + 1
    # Chance misses (0.5 + 0.75 + 0.9) / 3 = 0.717; a model of random weights has little to find.
    assert min(row["ranking_loss"] for row in curve) < 0.7
    assert first.recipe["num_texts"] == 24


def test_an_interrupted_calibration_goes_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = tiny_model(), tmp_path / "checkpoint.pt"
    whole = calibrate(model, tokenizer, texts(12), config=SMALL, progress=False)
    read, calls = Oracle.read, []

    def fail_at_the_tenth(self: Oracle, words: str, *, as_turn: bool) -> Reading:
        calls.append(words)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return read(self, words, as_turn=as_turn)

    monkeypatch.setattr(Oracle, "read", fail_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, texts(12), config=SMALL, checkpoint=file, progress=False)
    with pytest.raises(ValueError, match="of another model, other texts or other settings"):
        calibrate(model, tokenizer, texts(11), config=SMALL, checkpoint=file, progress=False)
    resumed = calibrate(model, tokenizer, texts(12), config=SMALL, checkpoint=file, progress=False)
    assert len(calls) == 10 + 4  # texts 9 to 12
    for name, one in whole.state_dict().items():
        assert torch.equal(one, resumed.state_dict()[name]), name
    assert list(tmp_path.iterdir()) == []


def test_texts_that_are_alike_are_one_domain() -> None:
    centres = torch.eye(3, 16)
    noise = 0.1 * torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    kinds = [i % 3 for i in range(30)]
    found = find_domains(5 + centres[kinds] + noise, 3)
    assert len(set(zip(kinds, found, strict=True))) == 3
    assert set(find_domains(torch.ones(2, 4), 3)) == {0}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"length": 3}, "length an integer >= 64, got 3"),
        ({"exponent": 0.5}, "exponent between 1 and inf, got 0.5"),
        ({"held_out": 0.9}, "held_out between 0 and 0.5, got 0.9"),
        ({"top_k": True, "epochs": -1}, "epochs an integer >= 0, got -1"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CalibrationConfig(**options)


def test_too_few_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="two or more texts of 64 tokens or more, got 1"):
        calibrate(tiny_model(), tokenizer, ["w1 w2", text(80)], config=SMALL, progress=False)

"""Reports of nothing, and of other tokens than those that were recorded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from character_tokenizer import character_tokenizer
from refusals import LENGTH, assert_untouched, refuse_block
from tiny_models import prefill, tiny_model, tokens

import moekv
from moekv import MoERouterPress

DOCUMENT = "The tide covers the causeway twice a day."


def test_a_report_without_a_record(tmp_path: Path) -> None:
    model, press, tokenizer = tiny_model(), MoERouterPress(), character_tokenizer()
    path = tmp_path / "report.html"
    message = r"expected a recorded prefill, got none: .*record=True"
    with pytest.raises(RuntimeError, match=message):
        press.report(path, tokenizer, tokens(1, LENGTH))
    with press(model, record=True):
        pass  # nothing has run
    with pytest.raises(RuntimeError, match=message):
        press.report(path, tokenizer, tokens(1, LENGTH))
    with press(model):
        prefill(model, tokens(1, LENGTH))
    with pytest.raises(RuntimeError, match=message):
        press.report(path, tokenizer, tokens(1, LENGTH))
    context = moekv.compress(model, tokenizer, DOCUMENT)
    with pytest.raises(RuntimeError, match=r"compress\(..., record=True\) makes one"):
        context.report(path)
    assert not path.exists()


def test_what_cannot_be_recorded() -> None:
    model, press = tiny_model(), MoERouterPress()
    refuse_block(
        ValueError, "record or context_length", model, press, record=True, context_length=40
    )
    refuse_block(TypeError, "record True or False, got 'yes'", model, press, record="yes")
    assert_untouched(model, press)
    with pytest.raises(ValueError, match="record or chunk_size"):
        moekv.compress(model, character_tokenizer(), DOCUMENT, record=True, chunk_size=8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input_ids": tokens(1, LENGTH + 1)}, ValueError, r"\[1, 40\], .* got \[1, 41\]"),
        ({"input_ids": tokens(2, LENGTH)}, ValueError, r"got \[2, 40\]"),
        ({"input_ids": torch.rand(1, LENGTH)}, TypeError, "as integers, got torch.float32"),
        ({"input_ids": "text"}, TypeError, "expected input_ids as a tensor, got 'text'"),
        ({"row": 1}, ValueError, "expected a row from 0 to 0, got 1"),
        ({"row": -1}, ValueError, "got -1"),
        ({"tokenizer": None}, TypeError, "expected a tokenizer, got NoneType"),
        ({"path": "."}, ValueError, "expected a file, got the folder"),
        ({"path": "missing/report.html"}, OSError, "missing"),
    ],
    ids=[
        "too long",
        "two rows",
        "floats",
        "text",
        "row 1",
        "row -1",
        "tokenizer",
        "folder",
        "path",
    ],
)
def test_reports_of_other_things(
    changed: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model, press = tiny_model(), MoERouterPress()
    with press(model, record=True):
        prefill(model, tokens(1, LENGTH))
    given: dict[str, Any] = {
        "path": "report.html",
        "tokenizer": character_tokenizer(),
        "input_ids": tokens(1, LENGTH),
    }
    with pytest.raises(error, match=message):
        press.report(**given | changed)
    assert not list(tmp_path.iterdir())
    press.report(**given | {"input_ids": given["input_ids"][0].tolist()})
    assert Path("report.html").is_file()

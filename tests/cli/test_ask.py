"""``moekv ask``: a document is read once, and answers come from its compressed cache."""

import io
import re
import sys
from pathlib import Path

import pytest
from character_tokenizer import character_tokenizer
from cli_cases import STORY, printed
from tiny_models import tiny_model

import moekv
from moekv import MoERouterPress
from moekv.cli.main import main

QUESTIONS = ("When?", "Where [is] it?")  # text, and no markup


def ask(folder: Path, *arguments: str) -> int:
    options = ["--dtype", "float32", "--max-new-tokens", "5"]
    return main(["ask", "--model", str(folder), *options, *arguments])


def answers(folder: Path, text: str, ratio: float) -> list[str]:
    """What the context says in Python."""
    press = MoERouterPress(compression_ratio=ratio)
    context = moekv.compress(tiny_model(), character_tokenizer(), text, press=press)
    return [" ".join(context.ask(q, max_new_tokens=5).split()) for q in QUESTIONS]


def test_questions_are_answered_from_the_compressed_cache(
    folder: Path, story: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(folder, str(story), "-q", QUESTIONS[0], "-q", QUESTIONS[1]) == 0
    out = printed(capsys)
    tokens = len(STORY.strip())
    full = 2 * 2 * 2 * 16 * 4 * tokens / 2**10
    kept = full * (tokens // 4) / tokens
    assert f"{tokens} tokens; cache {full:.1f} KiB -> {kept:.1f} KiB (25 %)" in out
    for question, answer in zip(QUESTIONS, answers(folder, STORY, 0.75), strict=True):
        assert f"{question} {answer}" in out


def test_a_long_answer_is_one_line_in_a_pipe(
    folder: Path,
    story: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = "The tide covers it. " * 20
    monkeypatch.setattr(moekv.CompressedContext, "ask", lambda *args, **kwargs: answer)
    assert ask(folder, str(story), "-q", QUESTIONS[0]) == 0
    assert answer in capsys.readouterr().out


def test_an_answer_beyond_ascii_where_the_terminal_has_no_more(
    folder: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moekv.CompressedContext, "ask", lambda *args, **kwargs: "At the caf\xe9.")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert ask(folder, str(story), "-q", "O\xf9?") == 0
    sys.stdout.flush()
    assert b"O??" in written.getvalue() and b"At the caf?." in written.getvalue()


def test_several_files_are_one_document(
    folder: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.html"
    other.write_text("<p>Nobody knows.</p>")
    assert ask(folder, str(story), str(other), "-q", QUESTIONS[0], "--ratio", "0.5") == 0
    expected, _ = answers(folder, f"{STORY.strip()}\n\nNobody knows.", 0.5)
    assert f"{QUESTIONS[0]} {expected}" in printed(capsys)


def test_the_full_cache_answers_beside(
    folder: Path, story: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(folder, str(story), "-q", QUESTIONS[0], "--ratio", "0.9", "--compare") == 0
    out = printed(capsys)
    assert re.search(r"\(10 %\), read in .*\(100 %\), read in", out)
    small, _ = answers(folder, STORY, 0.9)
    full, _ = answers(folder, STORY, 0.0)
    assert re.search(rf"{re.escape(small)} [\d.]+ s full cache: {re.escape(full)} [\d.]+ s", out)


def test_a_context_is_saved_and_asked_later(
    folder: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "story.safetensors"
    assert ask(folder, str(story), "--save", str(saved)) == 0
    assert f"saved: {saved}" in printed(capsys).replace("\n", "")
    assert ask(folder, "--load", str(saved), "-q", QUESTIONS[0]) == 0
    expected, _ = answers(folder, STORY, 0.75)
    assert f"{QUESTIONS[0]} {expected}" in printed(capsys)
    assert ask(folder, "--load", str(story), "-q", QUESTIONS[0]) == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err


def test_questions_come_from_the_terminal_until_an_empty_line(
    folder: Path,
    story: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*QUESTIONS, "", "never asked"])))
    assert ask(folder, str(story)) == 0
    out = printed(capsys)
    first, second = answers(folder, STORY, 0.75)
    assert re.search(rf"{re.escape(first)} [\d.]+ s {re.escape(second)} [\d.]+ s$", out)


def test_standard_input_is_a_document(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(STORY))
    assert ask(folder, "-", "-q", QUESTIONS[0]) == 0
    expected, _ = answers(folder, STORY, 0.75)
    assert expected in printed(capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO(" "))
    assert ask(folder, "-", "-q", QUESTIONS[0]) == 2
    assert "expected text at standard input" in capsys.readouterr().err


def test_a_page_shows_what_stayed(
    folder: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert ask(folder, str(story), "--html", str(page), "-q", QUESTIONS[0], "--compare") == 0
    out = printed(capsys)
    assert "report:" in out
    expected, _ = answers(folder, STORY, 0.75)
    assert expected in out
    assert "compression_ratio=0.75" in page.read_text()
    page.unlink()
    for wrong in (["--chunk-size", "9"], ["--load", str(story)]):
        files = [] if "--load" in wrong else [str(story)]
        assert ask(folder, *files, "--html", str(page), *wrong) == 2
        assert "expected" in capsys.readouterr().err and not page.exists()
    assert ask(folder, str(story), "--html", str(tmp_path)) == 2
    assert "got the folder" in capsys.readouterr().err

"""Files that are no documents."""

import sys
from pathlib import Path

import pytest
from pdf_files import pdf

from moekv import read_document


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b" \n", "expected text in .*a.txt, got none"),
        ("a.html", b"<p></p>", "expected text in .*a.html, got none"),
        ("a.txt", b"\xff\xfe\x00\xd8", "to be UTF-8 text, HTML or PDF"),
        ("a.txt", "hello there".encode("utf-16-le"), "a.txt to be UTF-8 text, .* got NUL"),
        ("a.txt", "hello there".encode("utf-16-be"), "a.txt to be UTF-8 text, .* got NUL"),
        ("a.bin", bytes(range(4)) * 8, "a.bin to be UTF-8 text, .* got NUL"),
        ("a.pdf", b"%PDF-1.4\n broken", "expected a readable PDF in .*a.pdf"),
        ("a.pdf", b"", "expected a readable PDF in .*a.pdf"),
        ("a.pdf", pdf(["", ""]), "got 2 pages without"),
    ],
)
def test_files_without_text_are_refused(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_document(path)


def test_what_is_no_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got the folder"):
        read_document(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_document(tmp_path / "missing.txt")


@pytest.mark.parametrize(("name", "module"), [("a.pdf", "pypdf"), ("a.html", "bs4")])
def test_a_missing_reader_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(pdf(["text"]))
    monkeypatch.setitem(sys.modules, module, None)
    if name == "a.html":
        path.write_text("<p>text")
    with pytest.raises(ImportError, match=r"pip install 'moekv\[documents\]'"):
        read_document(path)

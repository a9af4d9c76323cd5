"""Files as text."""

from pathlib import Path

import pytest
from pdf_files import pdf

from moekv import read_document

TEXT = "The lamp was lit at nine.\nThe keeper slept."


def test_text_is_read_as_it_stands(tmp_path: Path) -> None:
    for name, data in {
        "a.txt": f"\n {TEXT}\n\n".encode(),
        "a.md": b"\xef\xbb\xbf" + TEXT.encode(),  # with a byte order mark
        "nosuffix": TEXT.encode(),
    }.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert read_document(path) == TEXT


@pytest.mark.parametrize("name", ["a.html", "a.HTM"])
def test_html_is_read_without_what_nobody_sees(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(
        "<html><head><style>p { color: red }</style><script>alert(1)</script></head>"
        "<body><p>The lamp was lit at nine.</p>\n\n<p>The keeper <!-- never --> slept.</p></body>"
    )
    assert read_document(str(path)).split() == TEXT.split()


@pytest.mark.parametrize("name", ["a.pdf", "a.txt"])
def test_pdf_is_read_page_by_page(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(pdf(TEXT.splitlines()))
    assert read_document(path) == TEXT.replace("\n", "\n\n")

"""Files as text: plain text, Markdown, HTML, PDF."""

from __future__ import annotations

import os
from pathlib import Path

_INSTALL = "pip install 'moekv[documents]'"
_PAGES = {".htm", ".html", ".xhtml"}


def read_document(path: str | os.PathLike[str]) -> str:
    """Read a file as text.

    Parameters
    ----------
    path : path
        ``.pdf``, ``.html``, ``.htm`` and ``.xhtml`` are read as such, any other file as UTF-8.

    Returns
    -------
    str
        Its text, without white space around it.

    Raises
    ------
    OSError
        There is no such file, or it cannot be read.
    ValueError
        It holds no text: an empty file, another encoding, pictures of pages, a broken PDF.
    ImportError
        A PDF or a page of HTML, and what reads it is not installed.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"expected a file, got the folder {file}")
    data = file.read_bytes()
    suffix = file.suffix.lower()
    if suffix == ".pdf" or data.startswith(b"%PDF-"):
        text = _pdf(file)
    elif suffix in _PAGES:
        text = _html(data)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"expected {file} to be UTF-8 text, HTML or PDF: {error}") from error
        if "\0" in text:  # in UTF-16 there is one beside each letter
            raise ValueError(f"expected {file} to be UTF-8 text, HTML or PDF, got NUL characters")
    text = text.strip()
    if not text:
        raise ValueError(f"expected text in {file}, got none")
    return text


def _pdf(file: Path) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise ImportError(f"a PDF is read by pypdf, which is not installed: {_INSTALL}") from error
    try:
        pages = [page.extract_text().strip() for page in PdfReader(file).pages]
    except (PyPdfError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected a readable PDF in {file}: {error}") from error
    if not any(pages):
        raise ValueError(f"expected text in {file}, got {len(pages)} pages without (pictures?)")
    return "\n\n".join(page for page in pages if page)


def _html(data: bytes) -> str:
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise ImportError(
            f"HTML is read by beautifulsoup4, which is not installed: {_INSTALL}"
        ) from error
    page = BeautifulSoup(data, "html.parser")
    for hidden in page(["script", "style", "noscript", "template"]):
        hidden.decompose()
    lines = (line.strip() for line in page.get_text("\n").splitlines())
    return "\n".join(line for line in lines if line)

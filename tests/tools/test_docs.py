"""The documentation: no link leads nowhere, translations show the same code, and it builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("", "docs", "examples")
    for path in (ROOT / folder).glob("*.md")
    if not path.is_symlink()
)


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target), link


@pytest.mark.parametrize("name", ["index", "moe_router_guide"])
def test_translations_say_as_much(name: str) -> None:
    """Section by section: as many paragraphs, the same names, links and numbers."""
    english, chinese = (_sections(ROOT / "docs" / f"{name}{kind}.md") for kind in ("", ".zh"))
    for ours, theirs in zip(english, chinese, strict=True):
        assert ours == theirs


def _sections(page: Path) -> list[tuple[int, list[str], list[str], list[str]]]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        code = re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", section))
        numbers = re.findall(r"(?<![\w.])\.?\d[\d.,]*\b", re.sub(r"`[^`]*`", "", section))
        links = re.findall(r"\]\(([^)]+)\)", section)
        paragraphs = [part for part in re.split(r"\n\s*\n", section) if part.strip()]
        found.append((len(paragraphs), sorted(code), sorted(links), sorted(numbers)))
    return found


@pytest.mark.parametrize("name", ["index", "moe_router_guide"])
def test_translations_show_the_same_code(name: str) -> None:
    pages = [(ROOT / "docs" / f"{name}{kind}.md").read_text() for kind in ("", ".zh")]
    english, chinese = (re.findall(r"^```\w*\n.*?^```", p, re.MULTILINE | re.DOTALL) for p in pages)
    assert english == chinese and english
    # As many sections, and rows of tables, on both.
    for mark in (r"^## ", r"^\|"):
        assert len({len(re.findall(mark, page, re.MULTILINE)) for page in pages}) == 1


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs mkdocs-material: pip install 'moekv[docs]'")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = (site / "api.html").read_text()
    for name in ("MoERouterPress", "report", "compress", "load_context", "calibrate"):
        assert re.search(rf'id="moekv[\w.]*\.{name}"', api), name
    experts = (site / "experts.html").read_text()
    assert "BaseMoERouter" in experts and ":class:" not in experts + api
    assert "指南" in (site / "zh" / "index.html").read_text()
    pages = "".join(page.read_text() for page in site.rglob("*.html"))
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', pages)

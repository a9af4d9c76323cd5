"""Hooks of MkDocs: links between the repository's files as links between pages.

``docs/contributing.md`` and a few others are links to files outside of ``docs/``, whose own links
are right where these files are.
"""

from __future__ import annotations

import re
from typing import Any

PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "CHANGELOG.md": "changelog.md",
    "RELEASING.md": "releasing.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository, and the pages of the site that they are."""

_ROLE = re.compile(r":(?:attr|class|exc|func|meth|mod):(?=<code>)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Give links the names that pages have on the site."""
    for path, name in PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(path)}", f"]({name}", markdown)
    return re.sub(r"\]\((?:\.\./)?docs/", "](", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show docstrings' roles (``:func:``) as what they name."""
    return _ROLE.sub("", html)

"""Every row of docs/errors.md names a test, and every test of an error has a row."""

import re
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "errors.md"


def tests_in(pattern: str) -> list[str]:
    """Names of the test functions in files of this name."""
    files = TESTS.rglob(pattern)
    return [
        name
        for file in files
        for name in re.findall(r"^\s*def (test_\w+)\(", file.read_text(), re.MULTILINE)
    ]


def test_every_row_is_a_test_and_every_test_a_row() -> None:
    page = PAGE.read_text()
    rows = re.findall(r"\| `(test_\w+)` \|$", page, re.MULTILINE)
    lines = re.findall(r"^\|.*", page, re.MULTILINE)
    assert len(rows) == len([line for line in lines if not re.match(r"\| ?(?:input |-)", line)])
    assert not [row for row, count in Counter(rows).items() if count > 1]
    known = Counter(tests_in("test_*.py"))
    assert not [row for row in rows if known[row] != 1]
    assert not set(tests_in("test_*_errors.py")) - set(rows)

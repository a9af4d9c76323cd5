"""Every row of docs/errors.md names a test, and every test of an error has a row."""

import re
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]


def names_in(files: str) -> list[str]:
    """Of all test functions in these files, wherever they are."""
    texts = (file.read_text() for file in TESTS.rglob(files))
    return [n for text in texts for n in re.findall(r"^ *def (test_\w+)\(", text, re.MULTILINE)]


def test_every_row_is_a_test_and_every_test_a_row() -> None:
    page = (TESTS.parent / "docs/errors.md").read_text()
    rows = re.findall(r"\| `(test_\w+)` \|$", page, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\|(?! input|-)", page, re.MULTILINE))
    assert not [name for name, count in Counter(rows).items() if count > 1]
    tests = Counter(names_in("test_*.py"))
    assert not [name for name in rows if tests[name] != 1]
    errors = names_in("test_*_errors.py")
    assert errors and not [name for name in errors if name not in rows]

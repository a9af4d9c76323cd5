"""What the tests of commands share."""

import re

import pytest

STORY = "The tide covers the causeway twice a day. " * 8


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, its runs of white space as one space."""
    return re.sub(r"\s+", " ", capsys.readouterr().out).strip()

"""The examples of CONTRIBUTING.md: one script, which runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_its_blocks_run_as_one_script() -> None:
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_paths_of_its_table_are_there() -> None:
    rows = "\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("|"))
    paths = re.findall(r"`((?:moekv|tests|csrc)/[\w./-]+)`", rows)
    assert len(paths) > 5
    for path in paths:
        assert (PAGE.parent / path).exists(), path

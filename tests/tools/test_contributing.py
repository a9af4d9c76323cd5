"""The examples of CONTRIBUTING.md, and what it and docs/design.md say of files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
ROOM = PAGE.parent / "moekv"
FOLDERS = sorted(
    path.parent
    for path in ROOM.rglob("__init__.py")
    if path.parent != ROOM and path.parents[1].name != "ops"
)


def test_its_blocks_run_as_one_script() -> None:
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOM)))
def test_a_package_names_its_files(folder: Path) -> None:
    """As the page says; but for those of one op each, whose names are those of the ops."""
    said = (folder / "__init__.py").read_text().split('"""')[1]
    named = set(re.findall(r"``(\w+)``", said))
    modules = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}
    modules |= {path.parent.name for path in folder.glob("*/__init__.py")}
    assert modules <= named
    assert "import" in said, "what it may import"


def test_the_paths_of_its_table_are_there() -> None:
    rows = "\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("|"))
    paths = re.findall(r"`((?:moekv|tests|csrc)/[\w./-]+)`", rows)
    assert len(paths) > 5
    for path in paths:
        assert (PAGE.parent / path).exists(), path


def test_the_parts_of_the_press_import_what_the_page_says() -> None:
    page = (PAGE.parent / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| `(\w+)\.py` \|[^|\n]*\|([^|;\n]*)", page, re.MULTILINE)
    press = ROOM / "press"
    said = {name: set(re.findall(r"\w+", parts)) - {"none"} for name, parts in rows}
    assert said.keys() >= {path.stem for path in press.glob("*.py")} - {"__init__"}
    for path in press.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        sources = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        found = {source.split(".")[2] for source in sources if source.startswith("moekv.press.")}
        assert said.get(path.stem, set()) == found, path.stem

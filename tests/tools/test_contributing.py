"""The examples of CONTRIBUTING.md, and what it and docs/design.md say of files."""

import ast
import inspect
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from moekv.cli.main import app
from moekv.experts.registry import build_experts, expert_names
from moekv.routing.registry import ROUTERS

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


NAMES = {
    "an expert": {Path(inspect.getfile(type(each))).stem for each in build_experts(expert_names())},
    "a router": set(ROUTERS),
    "a command": {each.callback.__name__ for each in app.registered_commands if each.callback},
    "an op": {path.stem for path in ROOM.glob("ops/api/*.py")} - {"__init__"},
}
NAMES["its kernels"] = NAMES["an op"]


def test_the_paths_of_its_table_are_there() -> None:
    """Paths with braces in all their forms, those with <name> or <op> for all that there are."""
    checked = 0
    for row in re.findall(r"^\| .*\|$", PAGE.read_text(), re.MULTILINE):
        what = re.split("[:,|]", row)[1].strip()
        for path in re.findall(r"`((?:moekv|tests|csrc)/[^`]+)`", row):
            names = NAMES[what] if "<" in path else {""}
            if path.startswith("csrc/cuda/"):
                names = names - {"fold_pairs"}  # as the page says
            choices = re.findall(r"\{(.+)\}", path)
            for name, choice in product(names, choices[0].split(",") if choices else [""]):
                whole = re.sub(r"\{.+\}", choice, re.sub("<.+>", name, path))
                assert (PAGE.parent / whole).exists(), f"{whole}, of the row of {what}"
                checked += 1
    assert checked > 60


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

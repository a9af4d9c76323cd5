"""Every example runs as it stands, on a model of a few weights, and prints what it says."""

import runpy
import sys
from pathlib import Path

import pytest
from character_tokenizer import character_tokenizer
from tiny_models import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
PRINTED = {
    "ask_often": [
        "CompressedContext(",
        "When did the harbour board meet? ->",
        "saved: ",
        "loaded: ",
    ],
    "compiled_ops": ["2048 in all", "in front: True"],
    "custom_expert": ["layer  1: hit rate of selective 0.", "of loudest 0."],
    "custom_router": ["layer  1: selective "],
    "endless_chat": ["tokens of chat, "],
    "moe_router_example": ["75% of the pairs removed", "selective", "It goes on:"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def test_all_are_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTED)
    page = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}.py`" in page for name in PRINTED)


def test_the_notebook(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat, nbclient and ipykernel")
    client = pytest.importorskip("nbclient", reason="needs nbformat, nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbformat, nbclient and ipykernel")
    notebook = nbformat.read(EXAMPLES / "read_once.ipynb", as_version=4)
    nbformat.validate(notebook)
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert all(shown[1:])  # what it prints is there to be read
    assert "".join(o.get("text", "") for o in shown[-1]).count(" heads") == 8
    assert (EXAMPLES / "read_once.ipynb").stat().st_size < 20_000  # without progress bars
    monkeypatch.setenv("MODEL", str(folder))
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=120, resources=resources).execute()
    assert (tmp_path / "report.html").is_file()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert " bytes" in printed and "When did the harbour board meet? ->" in printed


@pytest.mark.parametrize("name", PRINTED)
def test_examples(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(folder)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    for words in PRINTED[name]:
        assert words in out
    if name == "endless_chat":
        counts = [float(line.split("chat, ")[1].split()[0]) for line in out.splitlines()]
        lengths = [int(line.split()[0]) for line in out.splitlines()]
        # 64 and the 32 tokens that come between two compressions, and what a turn brings.
        assert lengths[-1] > 128 and max(counts) < 128

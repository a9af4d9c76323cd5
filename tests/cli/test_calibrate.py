"""``moekv calibrate``: fits a router to a model."""

import re
from pathlib import Path

import pytest
from cli_cases import STORY, printed

from moekv.calibration.config import CalibrationConfig
from moekv.calibration.needs import MEMORY
from moekv.cli.main import main


def test_help_of_calibrate_tells_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--help"]) == 0
    out = printed(capsys)
    config = CalibrationConfig()
    for name in ("length", "top_k", "samples", "exponent", "seed"):
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} .*?default: \(?{getattr(config, name)}[;\])]", out), name
    assert f"default: ({', '.join(config.experts)})" in out
    assert re.search(rf"--memory GIB .*?default: {MEMORY / 2**30}[;\]]", out)


def test_calibrate_says_what_it_takes_and_writes_a_router(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [tmp_path / f"{number}.txt" for number in range(3)]
    for number, path in enumerate(texts):
        path.write_text(STORY[number : number + 90])
    command = ["calibrate", *map(str, texts), "--out", str(tmp_path / "router"), "--samples", "64"]
    command += ["--model", str(folder), "--length", "64", "--dtype", "float32"]
    assert main([*command, "--memory", "0.0001"]) == 2
    assert "error: expected a memory of" in capsys.readouterr().err
    assert main(command) == 0
    out = printed(capsys)
    assert re.search(r"3 texts; takes up to [\d.]+ MiB beside the model; a checkpoint of", out)
    assert re.search(r"router for llama-[0-9a-f]{16}-[0-9a-f]{8} in ", out)
    assert out.index("takes up to") < out.index("on held-out texts")
    assert sorted(path.name for path in (tmp_path / "router").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_an_error_leaves_no_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, out = tmp_path / "short.txt", tmp_path / "routers" / "mine"
    short.write_text("Too short.")
    command = ["calibrate", str(short), "--out", str(out), "--dtype", "float32", "--model"]
    assert main([*command, str(folder)]) == 2
    assert "expected two or more texts of 64 tokens or more, got 0" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "no-model")]) == 2
    assert not out.parent.exists()


def test_the_folder_is_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/router"):
        assert main(["calibrate", "missing.txt", "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert f"expected a folder to write to, got {tmp_path / out}: " in error

"""The command line itself: help, versions, errors; commands have files of their own."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

import moekv
from moekv.budget.size import Budget
from moekv.cli import common, info, options
from moekv.cli.main import main
from moekv.ops.backends import Backend
from moekv.routing.registry import RouterType


def test_the_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "moekv"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"moekv {moekv.__version__}\n"


def test_help_and_version_wait_for_nothing() -> None:
    """Neither torch nor transformers is imported to say what there is."""
    script = (
        "import sys; from moekv.cli.main import main; "
        "codes = [main([a]) for a in ('--version', '--help')]; "
        "print(codes, [m for m in ('torch', 'transformers', 'kvpress') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[0, 0] []"


# What a shell asks the command for; bash and zsh complete names of files where nothing comes back.
COMPLETED = {
    "moekv ": ["info", "demo", "ask", "serve", "bench", "calibrate"],
    "moekv ca": ["calibrate"],
    "moekv ask --pa": ["--pairs"],
    "moekv ask --pairs k8": ["k8v8", "k8v4"],
    "moekv demo --router p": ["pikv"],
    "moekv demo --budget ": list(get_args(Budget)),
    "moekv demo --backend c": ["cpu", "cuda"],
    "moekv calibrate --dtype f": ["float16", "float32"],
    "moekv serve --budget ": ["uniform", "model"],
    "moekv ask rep": [],
    "moekv ask --html ": [],
}


@pytest.mark.parametrize("line", COMPLETED)
def test_completion(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.split(" ")
    monkeypatch.setattr(sys, "argv", ["moekv"])
    monkeypatch.setenv("_MOEKV_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert capsys.readouterr().out.split() == COMPLETED[line]


def test_choices_are_those_of_the_press() -> None:
    for ours, theirs in (
        (options.ROUTERS, RouterType),
        (options.BUDGETS, Budget),
        (options.BACKENDS, Backend),
    ):
        assert ours == get_args(theirs)
    for pairs in options.PAIRS:
        assert moekv.MoERouterPress(pairs=pairs).pairs == pairs
    with pytest.raises(ValueError, match=", ".join(options.PAIRS)):
        moekv.MoERouterPress(pairs="k1v1")


@pytest.mark.parametrize("command", ["info", "demo", "ask", "serve", "calibrate", "bench"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([command, "--help"])
    except SystemExit as end:  # the benchmark has a parser of its own
        status = end.code
    assert status == 0
    out = capsys.readouterr().out
    assert out.lower().startswith("usage: ")
    assert re.search(rf"\n *Examples?:\s+moekv {command}", out)
    assert "``" not in out and not re.search(r"<(str|float|int|list)", out.split("Options:")[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'; see moekv --help"),
        (["demo", "--ratio", "much"], "valid number"),
        (["demo", "--max-new-tokens", "0"], "greater than or equal to 1"),
        (["demo", "--dtype", "int8"], "int8"),
        (["demo", "--nonsense"], "--nonsense; see moekv demo --help"),
        (["demo", "--ratio", "1"], "compression_ratio"),
        (["ask"], "with a saved context, got neither"),
        (["ask", __file__, "--load", "x"], "with a saved context, got both"),
        (["ask", "--load", "x", "--compare"], "expected files to read with --compare, got --load"),
        (["ask", "--load", "x", "-r", "0.75"], "expected files to read with --ratio, got --load"),
        (["ask", "--load", "x", "--pairs", "k8v4", "--budget", "head"], "with --budget, --pairs"),
        (["ask", "--load", "missing"], "got missing, which is no file"),
        (["ask", "-"], "expected a --question, as the document is standard input"),
        (["ask", __file__, "--save", "x", "--compare"], "whose answers --compare shows, got none"),
        (["ask", __file__, "--html", "x", "--compare"], "whose answers --compare shows, got none"),
        (["ask", __file__, "-q", " "], "expected a --question, got an empty one"),
        (["ask", "missing.txt"], "missing.txt: No such file or directory"),
        (["ask", __file__, "--save", "/nowhere/at/all"], "in a folder that exists"),
        (["ask", __file__, "--device", "toaster"], "expected a --device that is there"),
        (["ask", __file__, "--ratio", "1.5"], "compression_ratio"),
        (["calibrate", "missing.txt", "--out", __file__], "expected a folder to write to"),
        (["serve"], "Missing argument 'MODEL'; see moekv serve --help"),
        (["calibrate", "missing.txt", "--out", "nowhere"], "missing.txt"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    command = f"moekv {arguments[0]}"
    assert error.startswith(f"{command}: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("capability", "device", "dtype"),
    [
        ("AVX2", None, torch.float32),
        ("AVX512", "cpu", torch.bfloat16),
        ("AVX2", "meta", torch.bfloat16),
    ],
)
def test_the_dtype_is_the_faster_one(
    capability: str, device: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common._dtype("auto", device) == dtype
    assert common._dtype("float16", device) == torch.float16


def test_no_command_is_answered_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_a_bug_shows_its_traceback_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("of nothing")

    monkeypatch.setattr(info, "run", fail)
    assert main(["info"]) == 2
    expected = "moekv info: error: ZeroDivisionError: of nothing (--debug shows where)\n"
    assert capsys.readouterr().err == expected
    assert main(["info", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["ask"], ["calibrate", "--out", "out"], ["demo", "-q", "Who?", "--context"]]
)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("latin.txt", b"\xe9t\xe9", "to be UTF-8"), ("empty.txt", b"", "expected text in")],
)
def test_a_file_that_is_no_text_is_named(
    arguments: list[str],
    name: str,
    content: bytes,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    assert main([*arguments, str(file)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error and message in error and error.count("\n") == 1


def test_a_broken_pdf_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pypdf")
    file = tmp_path / "broken.pdf"
    file.write_bytes(b"%PDF-1.4\nbroken")
    assert main(["ask", str(file), "-q", "Who?"]) == 2
    error = capfd.readouterr().err
    assert "expected a readable PDF" in error and error.count("\n") == 1

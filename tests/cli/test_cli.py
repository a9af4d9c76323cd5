import importlib.metadata
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from character_tokenizer import character_tokenizer
from tiny_models import tiny_model
from transformers import DynamicCache

import moekv
from moekv.calibration.config import CalibrationConfig
from moekv.calibration.needs import MEMORY
from moekv.cli import common, info, trial
from moekv.cli.main import main

STORY = "The tide covers the causeway twice a day. " * 8


def lines(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, its runs of white space as one space."""
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of a few weights in a local folder; its tokens are ASCII characters."""
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    return path


def test_info_shows_versions_and_why_a_backend_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["info"]) == 0
    out = lines(capsys)
    assert f"moekv {moekv.__version__}" in out
    assert f"torch {torch.__version__}" in out
    assert f"CPU kernels {moekv.ops.cpu_capability()}" in out
    for name, reason in moekv.ops.available_backends().items():
        assert f"{name} {'yes' if reason is None else 'no ' + reason}" in out


def test_info_without_kvpress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package == "kvpress":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["info"]) == 0
    assert re.search(r"kvpress +not installed", capsys.readouterr().out)


def test_info_reads_the_architectures_from_the_library(tmp_path: Path) -> None:
    library = tmp_path / "libmoekv_cuda.so"
    assert info.cuda_library(library) == "not built"
    library.write_bytes(b"\x7fELF\0moekv-cuda-architectures=80;90;120+PTX\0\xff")
    assert info.cuda_library(library) == "libmoekv_cuda.so  80;90;120+PTX"


@pytest.mark.parametrize("command", [[sys.executable, "-m", "moekv"]])
def test_the_module_runs_as_a_command(command: list[str]) -> None:
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


@pytest.mark.parametrize("command", ["info", "demo", "ask", "serve", "calibrate"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: ")
    assert re.search(rf"\n  Examples?:\n    moekv {command}", out)
    assert "``" not in out


def test_help_of_calibrate_tells_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--help"]) == 0
    out = lines(capsys)
    config = CalibrationConfig()
    for name in ("length", "top_k", "samples", "exponent", "seed"):
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} .*?default: \(?{getattr(config, name)}[;\])]", out), name
    assert f"default: ({', '.join(config.experts)})" in out
    assert re.search(rf"--memory GIB .*?default: {MEMORY / 2**30}[;\]]", out)


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
        (["ask", "missing.txt"], "missing.txt: No such file or directory"),
        (["ask", __file__, "--save", "/nowhere/at/all"], "in a folder that exists"),
        (["ask", __file__, "--device", "toaster"], "expected a --device that is there"),
        (["ask", __file__, "--ratio", "1.5"], "compression_ratio"),
        (["calibrate", "missing.txt", "--out", __file__], "expected a folder for the router"),
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
    out = lines(capsys)
    assert re.search(r"3 texts; takes up to [\d.]+ MiB beside the model; a checkpoint of", out)
    assert out.index("takes up to") < out.index("on held-out texts")
    assert sorted(path.name for path in (tmp_path / "router").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


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
    ("arguments", "message"),
    [
        (["--backend", "metal"], "expected backend to be one of auto, cpu, cuda, torch"),
        (["--router", "oracle"], "expected router_type"),
        (["--num-experts", "1", "--top-k", "2"], "expected top_k <= num_experts = 1, got 2"),
        (["--model", "no-such/model"], "'no-such/model' is no local folder"),
        (["--context", "missing.txt", "--question", "Where?"], "missing.txt"),
        (["--context", __file__], "expected a --question about --context"),
        (["--model", "FOLDER", "--context-tokens", "10000000"], "--context-tokens, got 10000000"),
        (["--model", "FOLDER", "--context-tokens", "5"], "have no fact to ask for"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *(str(folder) if a == "FOLDER" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moekv demo: error: ")
    assert message in error


def test_demo_on_a_local_folder(
    folder: Path, story: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_demo(folder, story, "--ratio", "0.75", "--ratio", "0.5")) == 0
    out = lines(capsys)
    length = len(STORY.strip())
    assert f"{length} tokens of context, 1 questions" in out
    assert "Full cache ┃ 50 % removed ┃ 75 % removed" in out
    # 2 layers, keys and values, 2 heads of 16 numbers of 4 bytes.
    sizes = [length, length // 2, length // 4]
    kibibytes = " │ ".join(f"{2 * 2 * 2 * 16 * 4 * n / 2**10:.1f} KiB" for n in sizes)
    assert f"KV cache │ {kibibytes}" in out
    shares = " │ ".join(f"{100 * n / length:.1f} %" for n in sizes)
    assert f"of the full cache's bytes │ {shares}" in out
    assert re.search(r"of it in the press │ - │ \d\.\d{3} s", out)
    assert re.search(r"Cache +\d+\.\d KiB -> \d+\.\d KiB, 2[45]\.\d % of the full one", out)
    assert re.search(r"Press +\d+\.\d % of the prefill's time", out)
    assert re.search(r"Answers [01] of 1 word for word as with the full cache", out)


def test_demo_fails_where_the_press_does_nothing(
    folder: Path,
    story: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moekv.MoERouterPress, "__call__", lambda self, model: nullcontext())
    assert main(_demo(folder, story)) == 2
    assert "the press did nothing: 50 % removed was asked for" in capsys.readouterr().err


def test_cache_bytes_counts_each_storage_once() -> None:
    cache = DynamicCache()
    both = torch.zeros(2, 1, 2, 10, 16)
    cache.update(both[0], both[1], 0)
    cache.layers[0].keys, cache.layers[0].values = both[0], both[1]
    assert trial.cache_bytes(cache) == both.nbytes
    # A view of a part still holds the whole.
    cache.layers[0].keys = both[0, :, :, :1]
    assert trial.cache_bytes(cache) == both.nbytes


def _demo(folder: Path, story: Path, *more: str) -> list[str]:
    arguments = ["demo", "--model", str(folder), "--context", str(story), "--question", "When?"]
    return [*arguments, "--dtype", "float32", "--max-new-tokens", "3", *more]

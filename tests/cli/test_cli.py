import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

import moekv
from moekv.cli import demo, info
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
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # the last two: space and line feed
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
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


def test_info_reads_the_architectures_from_the_library(tmp_path: Path) -> None:
    library = tmp_path / "libmoekv_cuda.so"
    assert info.cuda_library(library) == "not built"
    library.write_bytes(b"\x7fELF\0moekv-cuda-architectures=80;90;120+PTX\0\xff")
    assert info.cuda_library(library) == "libmoekv_cuda.so  80;90;120+PTX"


@pytest.mark.parametrize("command", [[sys.executable, "-m", "moekv"]])
def test_the_module_runs_as_a_command(command: list[str]) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"moekv {moekv.__version__}\n"


@pytest.mark.parametrize("command", ["info", "demo"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert lines(capsys).startswith(f"usage: moekv {command}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["demo", "--ratios", "1"], "expected a ratio in [0, 1), got 1"),
        (["demo", "--ratios", "much"], "invalid _ratio value"),
        (["demo", "--max-new-tokens", "0"], "expected a number of at least 1, got 0"),
        (["demo", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


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
    assert main(["demo", *(str(folder) if a == "FOLDER" else a for a in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("moekv demo: error: ")
    assert message in error


def test_demo_on_a_local_folder(
    folder: Path, story: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_demo(folder, story, "--ratios", "0.75", "0.5")) == 0
    out = lines(capsys)
    length = len(STORY.strip())
    assert f"{length} tokens of context, 1 questions" in out
    assert "Full cache ┃ 50 % removed ┃ 75 % removed" in out
    # 2 layers, keys and values, 2 heads of 16 numbers of 4 bytes.
    sizes = [length, length // 2, length // 4]
    mebibytes = " │ ".join(f"{2 * 2 * 2 * 16 * 4 * n / 2**20:.2f} MiB" for n in sizes)
    assert f"KV cache │ {mebibytes}" in out
    shares = " │ ".join(f"{100 * n / length:.1f} %" for n in sizes)
    assert f"of the full cache's bytes │ {shares}" in out
    assert re.search(r"of it in the press │ - │ \d\.\d{3} s", out)
    assert "Experts at 75 % removed: their share of the weight" in out
    assert re.search(r"expected +┃ ?selective +┃ ?semantic", out)
    assert re.search(r"│ 1 ?│ +50 %, \d+ %", out)


def test_demo_fails_where_the_press_does_nothing(
    folder: Path,
    story: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moekv.MoERouterPress, "__call__", lambda self, model: nullcontext())
    assert main(_demo(folder, story)) == 1
    assert "the press did nothing: 50 % removed was asked for" in capsys.readouterr().err


def test_cache_bytes_counts_each_storage_once() -> None:
    cache = DynamicCache()
    both = torch.zeros(2, 1, 2, 10, 16)
    cache.update(both[0], both[1], 0)
    cache.layers[0].keys, cache.layers[0].values = both[0], both[1]
    assert demo.cache_bytes(cache) == both.nbytes
    # A view of a part still holds the whole.
    cache.layers[0].keys = both[0, :, :, :1]
    assert demo.cache_bytes(cache) == both.nbytes


def _demo(folder: Path, story: Path, *more: str) -> list[str]:
    arguments = ["demo", "--model", str(folder), "--context", str(story), "--question", "When?"]
    return [*arguments, "--dtype", "float32", "--max-new-tokens", "3", *more]

"""``moekv demo``, and the blocks of README and pages, on the real model.

Long texts are read in float32: in bfloat16 that takes four times as long on most processors.
"""

import copy
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import STORY, printed
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import moekv
from moekv.cli import demo, trial
from moekv.cli.main import main

README = Path(__file__).parents[2] / "README.md"
GUIDE = README.parent / "docs" / "moe_router_guide.md"

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def test_the_model_speaks(real_model: Loaded) -> None:
    model, tokenizer = real_model
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**chat, max_new_tokens=20, do_sample=False)
    answer = out[0, chat["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


def test_the_tokenizer_is_that_of_the_model(real_model: Loaded) -> None:
    model, tokenizer = real_model
    assert len(tokenizer) == model.config.vocab_size == 49152
    special = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert special == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    for text in ("Hello  world", "naïve — 12345\n\n\tx", "日本語 <|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # Digits one by one, nothing before or after.
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 12")["input_ids"]) == ["Ġ", "1", "2"]


def test_demo_text(real_model: Loaded) -> None:
    """At least 1,500 tokens, which have every fact that is asked for."""
    _, tokenizer = real_model
    prompt = trial.Prompt(tokenizer, demo._story(), None)
    assert prompt.ids.shape[1] >= 1500
    assert all(question.facts[0] in prompt.text for question in demo.QUESTIONS)
    # Context and question together are the chat that the model was trained on.
    ids = torch.cat([prompt.ids, prompt.question_ids("Why?")], 1)[0]
    content = f"{prompt.text}\n\n{trial.INSTRUCTION} Why?"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(ids) == whole


def test_demo(real_model: Loaded) -> None:
    prompt = trial.Prompt(real_model[1], demo._story(), 700)
    asked = sum(question.facts[0] in prompt.text for question in demo.QUESTIONS)
    assert 0 < asked < len(demo.QUESTIONS)
    command = ["demo", "--context-tokens", "700", "--ratio", "0.5", "--max-new-tokens", "12"]
    command += ["--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-m", "moekv", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    out = re.sub(r"\s+", " ", done.stdout)
    length = prompt.ids.shape[1]
    assert f"{length:,} tokens of context, {asked} questions" in out
    # 30 layers, keys and values, 3 heads of 64 numbers.
    full, half = (30 * 2 * 3 * 64 * 4 * n / 2**20 for n in (length, length // 2))
    assert f"KV cache │ {full:.1f} MiB │ {half:.1f} MiB" in out
    right = re.search(rf"Right answers │ (\d) of {asked} │ \d of {asked}", out)
    assert right is not None and int(right[1]) > 0
    assert re.search(rf"Answers \d of {asked} right, \d with the full cache", out)


@pytest.mark.parametrize("layers", [6, pytest.param(None, marks=pytest.mark.thorough)])
def test_usage_in_the_readme(
    layers: int | None, real_model: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every Python block of the README runs as it stands, in order."""
    names = _run_blocks(README, real_model, monkeypatch, tmp_path, layers)
    press: Any = names["press"]
    found = press.get_stats()["compression"]
    before, after = found["bytes_before"], found["bytes_after"]
    assert after / before == pytest.approx(0.1, abs=0.01)


def test_usage_in_the_guide(
    real_model: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every Python block of the guide runs as it stands, in order."""
    names = _run_blocks(GUIDE, real_model, monkeypatch, tmp_path, 6)
    press: Any = names["press"]
    assert press.get_stats()["forward_count"] > 0


@pytest.mark.parametrize("name", ["index", "operators"])
def test_usage_on_pages_of_the_site(
    name: str, real_model: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every Python block of a page runs as it stands, in order."""
    page = GUIDE.with_name(f"{name}.md")
    names = _run_blocks(page, real_model, monkeypatch, tmp_path, 6)
    assert "indices" in names or (tmp_path / "report.html").is_file()


def _run_blocks(
    page: Path,
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    layers: int | None,
) -> dict[str, object]:
    model, tokenizer = copy.deepcopy(loaded[0]).float(), loaded[1]
    if layers is not None:  # what the model says does not matter
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    monkeypatch.setattr(moekv, "load_model", lambda *args: (model, tokenizer), raising=False)
    monkeypatch.chdir(folder)  # where it saves a cache
    blocks = re.findall(r"```py(?:thon)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    return names


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
    out = printed(capsys)
    length = len(STORY.strip())
    assert f"{length} tokens of context, 1 questions" in out
    assert "Full cache ┃ 50 % removed ┃ 75 % removed" in out
    # 2 layers, keys and values, 2 heads of 16 numbers of 4 bytes; and for a head that pairs have
    # left, where the others begin and end, and their positions, in bits.
    more = 2 * 2 * (8 + -(-length // 8))
    full, half, quarter = (2 * 2 * 2 * 16 * 4 * n for n in (length, length // 2, length // 4))
    sizes = [full, half + more, quarter + more]
    kibibytes = " │ ".join(f"{n / 2**10:.1f} KiB" for n in sizes)
    assert f"KV cache │ {kibibytes}" in out
    shares = " │ ".join(f"{100 * n / full:.1f} %" for n in sizes)
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

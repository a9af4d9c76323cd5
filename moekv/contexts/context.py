"""A document's compressed cache, with a model that answers from it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from moekv.cache.caches import held_bytes
from moekv.cache.layer import CompressedLayer
from moekv.cache.storage import load_filled, save_cache
from moekv.models.chat import check_tokenizer, user_turn
from moekv.models.hooks import cache_argument, find_layers
from moekv.models.weights import language_model
from moekv.press.checks import check_count
from moekv.press.chunks import prefill_in_chunks
from moekv.press.press import MoERouterPress
from moekv.press.reports import Stats
from moekv.report.page import write_page
from moekv.report.recording import Recording
from moekv.units import kind

MAX_NEW_TOKENS = 128
"""Tokens of an answer at most, by default."""


_ONE_ANSWER = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    **dict.fromkeys(("input_ids", "attention_mask", "past_key_values")),
}
"""Options of generate that a question leaves as they are."""
_OWN = {"use_cache": True, "generation_config": None}
"""Options of generate over which a question's own would win, or that go without its cache."""


class CompressedContext:
    """A document that a model has read, its cache compressed: made by :func:`compress`.

    Parameters
    ----------
    model : PreTrainedModel
        The model that filled the cache.
    tokenizer : PreTrainedTokenizerBase
    cache : Cache
        Filled with `input_ids`, compressed or not.
    input_ids : Tensor [1, T], int64
        The tokens of the document, and of what comes before it in a chat.
    stats : dict, optional
        What the press measured, see ``MoERouterPress.get_stats``.
    recording : Recording, optional
        Which pairs were retained, for :meth:`report`.

    Raises
    ------
    TypeError
        `input_ids` are not a tensor.
    ValueError
        The cache has another length than the tokens, or more rows than one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: Cache,
        input_ids: Tensor,
        stats: Stats | None = None,
        recording: Recording | None = None,
    ) -> None:
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"expected input_ids as a tensor [1, T], got {kind(input_ids)}")
        if input_ids.dim() != 2 or input_ids.shape[0] != 1:
            raise ValueError(f"expected input_ids [1, T], got {list(input_ids.shape)}")
        if cache.get_seq_length() != input_ids.shape[1]:
            raise ValueError(
                f"expected a cache of {input_ids.shape[1]} tokens, as input_ids, got one of "
                f"{cache.get_seq_length()}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.input_ids = input_ids
        self.stats = stats
        self.recording = recording

    def __len__(self) -> int:
        """Tokens that were read."""
        return self.input_ids.shape[1]

    def __repr__(self) -> str:
        """Tokens, bytes and model."""
        return (
            f"CompressedContext({len(self)} tokens, {self.nbytes} of {self.full_nbytes} bytes, "
            f"{type(self.model).__name__})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds."""
        return sum(held_bytes(layer) for layer in self.cache.layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that it would hold without compression."""
        return sum(_full_bytes(layer) for layer in self.cache.layers)

    @torch.no_grad()
    def ask(self, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS, **options: Any) -> str:
        """Answer a question from the document.

        Every question refers to the document alone: earlier questions and answers are not part of
        it, and the context is not changed.

        Parameters
        ----------
        question : str
        max_new_tokens : int, optional
            Tokens of the answer at most.
        **options
            For ``model.generate``, such as ``streamer=`` or ``do_sample=True``; by default
            decoding is greedy.

        Returns
        -------
        str
            The answer, without white space around it.

        Raises
        ------
        TypeError
            `question` is not a str.
        ValueError
            It is empty, `max_new_tokens` is not an integer above 0, or an option is the context's
            own (``past_key_values``), goes without it (``use_cache=False``), holds others
            (``generation_config``) or would make more of an answer than a str.
        """
        if not isinstance(question, str):
            raise TypeError(f"expected a question as str, got {type(question).__name__}")
        if not question.strip():
            raise ValueError("expected a question, got an empty one")
        check_count("max_new_tokens", max_new_tokens, 1)
        for name, plain in _ONE_ANSWER.items():
            if options.pop(name, plain) != plain:
                raise ValueError(
                    f"expected options of model.generate that make one answer, a str, got {name}; "
                    "generate(..., past_key_values=copy.deepcopy(context.cache)) takes any"
                )
        for name, plain in _OWN.items():
            if options.pop(name, plain) != plain:
                raise ValueError(
                    "expected options of model.generate that go with a filled cache and with a "
                    f"question's own, each by its name, such as do_sample=True, got {name}"
                )
        _, after = turn(self.tokenizer)
        asked = encode(self.tokenizer, f"\n\n{question.strip()}{after}")
        ids = torch.cat([self.input_ids, asked], dim=1).to(self.model.device)
        if not options.get("do_sample"):
            # A model's own settings for sampling would only cause warnings.
            options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | (
                options
            )
        generate: Any = self.model.generate
        made = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(self.model, copy.deepcopy(self.cache)),
            **{"max_new_tokens": max_new_tokens, "pad_token_id": _padding(self.model)} | options,
        )
        answer = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return str(answer).strip()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the context to one safetensors file, for :func:`load_context`.

        The file contains the tokens of the document: who can read it can read the document.

        Raises
        ------
        ValueError, OSError
            As :func:`moekv.save_cache`.
        """
        save_cache(self.cache, path, self.model, input_ids=self.input_ids)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write a page that shows which tokens were retained, see ``MoERouterPress.report``.

        Raises
        ------
        RuntimeError
            Nothing was recorded: the context was made without ``record=True``, or loaded.
        ValueError, OSError
            The file cannot be written.
        """
        if self.recording is None:
            raise RuntimeError(
                "expected a context with a record, got one without: "
                "moekv.compress(..., record=True) makes one; a saved context has none"
            )
        write_page(path, self.recording, self.tokenizer, self.input_ids)


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    *,
    press: MoERouterPress | None = None,
    chunk_size: int | None = None,
    record: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CompressedContext:
    """Read a document once with a model, and compress its cache.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
        With a chat template, the document begins the user's turn, and a question ends it.
    document : str
        Its text; :func:`moekv.contexts.documents.read_document` reads a file.
    press : MoERouterPress, optional
        By default ``MoERouterPress()``; ``MoERouterPress(compression_ratio=0)`` keeps every pair.
    chunk_size : int, optional
        Tokens to read at a time, with a compression after each chunk, for documents whose full
        cache does not fit; by default all at once.
    record : bool
        Record which pairs are retained, for :meth:`CompressedContext.report`; not with
        `chunk_size`.
    progress : callable, optional
        Called with the number of layers done, and of all layers.

    Returns
    -------
    CompressedContext

    Raises
    ------
    TypeError
        `document` is not a str, or `press` not a press.
    ValueError
        The document is empty, or to be recorded in chunks; or as in a block of the press.

    Examples
    --------
    >>> context = moekv.compress(model, tokenizer, text)  # doctest: +SKIP
    >>> context.ask("Who keeps the lighthouse?")  # doctest: +SKIP
    'Thomas'
    """
    language_model(model)
    check_tokenizer(tokenizer)
    if not isinstance(document, str):
        raise TypeError(
            f"expected the text of a document as str, got {type(document).__name__}; "
            "moekv.contexts.documents.read_document reads a file"
        )
    if not document.strip():
        raise ValueError("expected the text of a document, got an empty one")
    if press is None:
        press = MoERouterPress()
    if not isinstance(press, MoERouterPress):
        raise TypeError(f"expected a MoERouterPress, got {kind(press)}")
    if record and chunk_size is not None:
        raise ValueError(
            f"expected record or chunk_size, got record={record!r} and {chunk_size}: a record is "
            "of a prefill in one forward"
        )
    before, _ = turn(tokenizer)
    ids = encode(tokenizer, before + document.strip())
    given = ids.to(model.device)
    with ExitStack() as stack:
        if progress is not None:
            forwards = 1 if chunk_size is None else -(-ids.shape[1] // max(chunk_size, 1))
            _count(stack, model, forwards, progress)
        if chunk_size is not None:
            with torch.no_grad():
                done = prefill_in_chunks(press, model, given, chunk_size=chunk_size)
            cache = done.past_key_values
        else:
            cache = DynamicCache(config=model.config)
            stack.enter_context(press(model, record=record))
            with torch.no_grad():
                model(given, **cache_argument(model, cache), logits_to_keep=1)
    recording = press.recording() if record else None
    return CompressedContext(model, tokenizer, cache, ids, press.get_stats(), recording)


def load_context(
    path: str | os.PathLike[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> CompressedContext:
    """Read a context that :meth:`CompressedContext.save` wrote.

    Parameters
    ----------
    path : path
    model : PreTrainedModel
        The one that read the document, see :func:`moekv.load_cache`.
    tokenizer : PreTrainedTokenizerBase

    Returns
    -------
    CompressedContext
        Without statistics.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It does not contain a context, or one of another model.
    """
    language_model(model)
    check_tokenizer(tokenizer)
    cache, input_ids = load_filled(path, model)
    if input_ids is None:
        raise ValueError(
            f"{path} holds a cache without the tokens that filled it: expected a context, see "
            "CompressedContext.save; moekv.load_cache reads it"
        )
    return CompressedContext(model, tokenizer, cache, input_ids)


def turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what comes before a document, and between a question and its answer."""
    return user_turn(tokenizer) or (tokenizer.bos_token or "", "\nAnswer:")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids [1, n] of a piece of a turn."""
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return ids


def _padding(model: PreTrainedModel) -> int | None:
    """Return a padding token for models without one: nothing is padded, but generate needs one."""
    settings: Any = model.generation_config
    pad: int | None = getattr(settings, "pad_token_id", None)
    end: Any = getattr(settings, "eos_token_id", None)
    return (end[0] if isinstance(end, list) else end) if pad is None else pad


def _full_bytes(layer: Any) -> int:
    if not isinstance(layer, CompressedLayer):
        return held_bytes(layer)
    pairs = layer.batch_size * layer.num_heads * int(layer.get_seq_length())
    return pairs * layer.bytes_per_pair


def _count(
    stack: ExitStack, model: PreTrainedModel, forwards: int, progress: Callable[[int, int], None]
) -> None:
    """Report each attention layer that is done."""
    layers = find_layers(model)[1]
    total, done = forwards * len(layers), 0

    def report(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for layer in layers:
        stack.callback(layer.register_forward_hook(report).remove)

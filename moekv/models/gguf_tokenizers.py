"""Tokenizers, read from GGUF files.

transformers reads these two models' wrongly. SmolLM2's becomes a Code Llama tokenizer: with a token
before every text, five tokens beyond the embedding, and the wrong end of a turn. Of Gemma's ranks
of merges it makes the logarithms of a unigram model, which splits words into letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast


class Kind(IntEnum):
    """GGUF's types of tokens, as far as they are read."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4


def byte_level(path: Path) -> PreTrainedTokenizerFast:
    """Read a byte-level BPE tokenizer that splits numbers into digits (SmolLM2).

    Parameters
    ----------
    path : Path
        Of the GGUF file.

    Returns
    -------
    PreTrainedTokenizerFast
    """
    content = _content(path, "chat_template", "ggml.merges")
    tokens = content["ggml.tokens"]
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in content["ggml.merges"]],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_special(content)))
    tokenizer = _wrapped(backend, content)
    tokenizer.chat_template = content["chat_template"]
    return tokenizer


def sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """Read a SentencePiece BPE tokenizer without a space before texts (Gemma).

    The file has each piece's rank, minus one for each that was learned before it. A piece is merged
    from any two pieces that it consists of.

    Parameters
    ----------
    path : Path
        Of the GGUF file.

    Returns
    -------
    PreTrainedTokenizerFast
        Puts its first token before every text, if the file says so.
    """
    content = _content(path, "ggml.scores", "ggml.add_bos_token")
    tokens, kinds = content["ggml.tokens"], content["ggml.token_type"]
    unknown = tokens[content["ggml.unknown_token_id"]]
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges(tokens, content["ggml.scores"], kinds),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(list(_special(content)))
    backend.add_tokens(
        [
            AddedToken(token, normalized=True, special=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == Kind.USER_DEFINED
        ]
    )
    if content["ggml.add_bos_token"]:
        index = content["ggml.bos_token_id"]
        first = tokens[index]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, index)]
        )
    return _wrapped(backend, content)


def merges(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Find the merges of a SentencePiece BPE model, in the order in which they are tried.

    Parameters
    ----------
    tokens : sequence of N str
    scores : sequence of N float
        Of the pieces; those of higher scores are merged first.
    kinds : sequence of N int
        See :class:`Kind`; normal pieces are merged.

    Returns
    -------
    list of tuples of two str
    """
    places = {token: index for index, token in enumerate(tokens)}

    def ranked() -> Iterator[tuple[float, int, int, int]]:
        for place, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
            if kind != Kind.NORMAL:
                continue
            for cut in range(1, len(token)):
                left, right = places.get(token[:cut]), places.get(token[cut:])
                if left is not None and right is not None:
                    yield -score, place, left, right

    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(ranked())]


def _content(path: Path, *names: str) -> dict[str, Any]:
    """Read the fields of a file that make a tokenizer."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    common = (
        *("ggml.tokens", "ggml.token_type"),
        *(f"ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding")),
    )
    return {name: fields[f"tokenizer.{name}"].contents() for name in (*common, *names)}


def _special(content: dict[str, Any]) -> Iterator[AddedToken]:
    for token, kind in zip(content["ggml.tokens"], content["ggml.token_type"], strict=True):
        if kind == Kind.CONTROL:
            yield AddedToken(token, normalized=False, special=True)


def _wrapped(backend: Tokenizer, content: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens = content["ggml.tokens"]
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=tokens[content["ggml.bos_token_id"]],
        eos_token=tokens[content["ggml.eos_token_id"]],
        unk_token=tokens[content["ggml.unknown_token_id"]],
        pad_token=tokens[content["ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
    )
    return tokenizer

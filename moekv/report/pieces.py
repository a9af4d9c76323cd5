"""Text in pieces that a reader sees: a token each, or several that are one character together."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What a decoder makes of bytes that are no whole character."""
_LONGEST = 8
"""Tokens of a character at most: beyond that, bytes that are none in fact."""


def split_into_pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]
) -> list[tuple[int, str]]:
    """Split tokens into pieces, whose texts make up the whole.

    Each is decoded behind those before it, as what a token looks like may depend on them: a space
    at its beginning, or bytes of a character that began earlier.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    tokens : sequence of int

    Returns
    -------
    list of tuple of int and str
        The first token of each piece, and its text.
    """

    def decode(begin: int, end: int) -> str:
        text = tokenizer.decode(
            list(tokens[begin:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    pieces: list[tuple[int, str]] = []
    behind, begin = 0, 0  # the piece before, and this one
    for end in range(1, len(tokens) + 1):
        before, text = decode(behind, begin), decode(behind, end)
        waits = text.endswith(_INCOMPLETE) and end - begin < _LONGEST and end < len(tokens)
        if waits:
            continue
        fits = text.startswith(before)
        pieces.append((begin, text[len(before) :] if fits else decode(begin, end)))
        behind, begin = begin, end
    return pieces

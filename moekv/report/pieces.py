"""Text in visible pieces: one token each, or several that make up one character."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What a decoder returns for an incomplete character."""
_LONGEST = 8
"""Most tokens of a character; beyond that the bytes are not a character."""


def split_into_pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]
) -> list[tuple[int, str]]:
    """Split tokens into pieces, whose texts make up the whole.

    Each is decoded after those before it, as its text may depend on them: a space at its beginning,
    or bytes of a character that began earlier.

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

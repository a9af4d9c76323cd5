"""Pieces of text: together they are the text, and each is what a reader sees of a token."""

import pytest
from character_tokenizer import character_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moekv.report.pieces import split_into_pieces


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, a space its beginning, which decoders drop where a text begins."""
    words = ["▁the", "▁tide", "▁covers", "s", "."]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="▁the")
    )
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="▁the")


def test_a_character_is_a_piece() -> None:
    text = "Twice a day."
    tokenizer = character_tokenizer()
    pieces = split_into_pieces(tokenizer, tokenizer(text).input_ids)
    assert pieces == list(enumerate(text))


@pytest.mark.parametrize("text", ["潮水来", "naïve café", "a👩‍🚀b", "plain", ""])
def test_bytes_of_one_character_are_one_piece(text: str) -> None:
    tokenizer = byte_tokenizer()
    pieces = split_into_pieces(tokenizer, tokenizer(text).input_ids)
    assert [piece for _, piece in pieces] == list(text)
    starts = [len(text[:i].encode()) for i in range(len(text))]
    assert [begin for begin, _ in pieces] == starts


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("潮a").input_ids
    broken = [ids[0]] * 20 + [ids[3]]
    pieces = split_into_pieces(tokenizer, broken)
    assert sum("\ufffd" in piece for _, piece in pieces) >= 2
    assert pieces[-1][1].endswith("a")
    begins = [begin for begin, _ in pieces]
    assert begins == sorted(set(begins)) and begins[0] == 0
    cut = split_into_pieces(tokenizer, ids[:2])
    assert cut == [(0, "\ufffd")]


def test_a_space_at_the_beginning_is_the_token_s() -> None:
    pieces = split_into_pieces(metaspace_tokenizer(), [0, 1, 3, 2, 4])
    assert [piece for _, piece in pieces] == ["the", " tide", "s", " covers", "."]

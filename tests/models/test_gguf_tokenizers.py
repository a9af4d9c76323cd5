"""Tokenizers read from GGUF files cut texts as the models' own do."""

from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType

from moekv.models.gguf_tokenizers import Kind, byte_level, merges, sentencepiece

PIECES = [
    *("<pad>", "<eos>", "<bos>", "<unk>"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "\n\n",
    *("a", "b", "c", "▁", "\n", "ab", "bc", "▁a", "abc", "▁abc"),
]
LEARNED = PIECES.index("ab")


def _write(path: Path, model: str, tokens: list[str], kinds: list[int], **more: object) -> Path:
    writer = GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, token in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{name}_token_id")(token)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A SentencePiece model of a few pieces; those learned first have the higher scores."""
    kinds = [
        TokenType.CONTROL if place < 4 else TokenType.BYTE if place < 260 else TokenType.NORMAL
        for place in range(len(PIECES))
    ]
    kinds[PIECES.index("\n\n")] = TokenType.USER_DEFINED
    scores = [-float(max(place - LEARNED, -1) + 1) for place in range(len(PIECES))]
    return _write(
        tmp_path / "pieces.gguf", "llama", PIECES, kinds, token_scores=scores, add_bos_token=True
    )


def test_pieces_are_merged_in_the_order_in_which_they_were_learned(pieces: Path) -> None:
    tokenizer = sentencepiece(pieces)

    def cut(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert cut("abc abc") == ["<bos>", "abc", "▁abc"]
    assert cut("bbc") == ["<bos>", "b", "bc"]
    # What no piece covers falls apart into bytes, and comes back.
    assert cut("ä") == ["<bos>", "<0xC3>", "<0xA4>"]
    for text in ("abc ä  cab", "a\n\nb", " a", "€\nabc"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    # Pieces that somebody has chosen are not merged further, nor cut.
    assert "\n\n" in cut("a\n\nb")
    assert cut("<eos>a") == ["<bos>", "<eos>", "a"]


def test_a_file_without_a_first_token_gets_none(tmp_path: Path) -> None:
    kinds = [int(Kind.CONTROL)] * 4 + [int(Kind.NORMAL)] * 3
    path = _write(
        tmp_path / "plain.gguf", "llama", [*PIECES[:4], "a", "b", "ab"], kinds,
        token_scores=[0.0] * 4 + [-1.0] * 3, add_bos_token=False,
    )  # fmt: skip
    assert sentencepiece(path)("ab").input_ids == [6]


def test_merges_are_all_ways_to_a_piece_and_nothing_else() -> None:
    tokens = ["a", "b", "ab", "aba", "x", "ba"]
    kinds = [1, 1, 1, 1, 3, 1]
    found = merges(tokens, [0.0, 0.0, -2.0, -3.0, -1.0, -1.0], kinds)
    assert found == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]


def test_numbers_are_cut_into_digits(tmp_path: Path) -> None:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "1", "2", "a", "b", "ab", "12"]
    path = _write(
        tmp_path / "bytes.gguf", "gpt2", tokens, [3] * 4 + [1] * 6,
        token_merges=["a b", "1 2"], chat_template="{{ messages }}",
    )  # fmt: skip
    tokenizer = byte_level(path)
    ids = tokenizer("ab12").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "1", "2"]
    assert tokenizer.decode(ids) == "ab12" and tokenizer.chat_template == "{{ messages }}"

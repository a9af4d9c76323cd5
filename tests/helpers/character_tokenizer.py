"""A tokenizer whose tokens are ASCII characters."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Make one; it knows no chats and no special tokens."""
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # the last two: space and line feed
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)

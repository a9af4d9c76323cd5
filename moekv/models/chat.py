"""The parts of a chat template around a text."""

from transformers import PreTrainedTokenizerBase

from moekv.units import kind

_MARK = "\x00"


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Return what a chat template puts around the user's turn.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase

    Returns
    -------
    tuple of str, or None
        What comes before the turn, and what is between it and the answer; None for a tokenizer
        without a chat template.
    """
    if not tokenizer.chat_template:
        return None
    turn = [{"role": "user", "content": _MARK}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, after = str(chat).split(_MARK)
    return before, after


def check_tokenizer(tokenizer: object) -> None:
    """Raise ``TypeError`` for anything but a tokenizer."""
    instance = callable(tokenizer) and not isinstance(tokenizer, type)
    if not instance or not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(f"expected a tokenizer of transformers, got {kind(tokenizer)}")

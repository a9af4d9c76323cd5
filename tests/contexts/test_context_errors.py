"""Documents, questions and tokens that make no context."""

from pathlib import Path
from typing import Any

import pytest
import torch
from character_tokenizer import character_tokenizer
from tiny_models import tiny_model
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import moekv
from moekv import CompressedContext, MoERouterPress

DOCUMENT = "The tide covers the causeway twice a day. " * 6


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return character_tokenizer()


def test_tokens_that_are_not_of_the_cache_are_refused(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    context = moekv.compress(model, tokenizer, DOCUMENT)
    ids = context.input_ids[:, 1:]
    with pytest.raises(ValueError, match=r"expected input_ids I32 \[1, \d+\]"):
        moekv.save_cache(context.cache, tmp_path / "short", model, input_ids=ids)
    whole = context.input_ids
    for other in (whole + 2**32, whole.float(), whole > 5):  # which would be written as others
        with pytest.raises(ValueError, match="as integers of at most 32 bits, got torch"):
            moekv.save_cache(context.cache, tmp_path / "other", model, input_ids=other)
    with pytest.raises(TypeError, match=r"expected input_ids as a tensor \[B, T\], got list"):
        moekv.save_cache(context.cache, tmp_path / "other", model, input_ids=whole.tolist())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="expected a cache of"):
        CompressedContext(model, tokenizer, context.cache, ids)
    with pytest.raises(ValueError, match=r"expected input_ids \[1, T\]"):
        CompressedContext(model, tokenizer, DynamicCache(), ids[0])


@pytest.mark.parametrize(
    ("document", "press", "error", "message"),
    [
        (["a", "b"], None, TypeError, "expected the text of a document as str, got list"),
        (Path("a.txt"), None, TypeError, "read_document reads a file"),
        ("  \n", None, ValueError, "got an empty one"),
        ("text", MoERouterPress, TypeError, "expected a MoERouterPress, got the class"),
    ],
)
def test_wrong_documents_and_presses(
    document: object,
    press: object,
    error: type[Exception],
    message: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(error, match=message):
        moekv.compress(model, tokenizer, document, press=press)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        (["one", "two"], TypeError, "expected a question as str, got list"),
        (" ", ValueError, "expected a question, got an empty one"),
    ],
)
def test_wrong_questions(
    question: object,
    error: type[Exception],
    message: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    context = moekv.compress(model, tokenizer, DOCUMENT)
    with pytest.raises(error, match=message):
        context.ask(question)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option",
    [
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"attention_mask": torch.ones(1, 3)},
        {"past_key_values": DynamicCache()},
        {"use_cache": False},
        {"generation_config": GenerationConfig(max_new_tokens=3)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_make_more_than_an_answer(
    option: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    context = moekv.compress(model, tokenizer, DOCUMENT)
    with pytest.raises(ValueError, match=next(iter(option))):
        context.ask("Who?", **option)
    assert isinstance(context.ask("Who?", num_return_sequences=1, max_new_tokens=2), str)

"""Contexts: what is asked of them is answered as by the cache itself, and they survive files."""

import copy
from pathlib import Path

import pytest
import torch
from character_tokenizer import character_tokenizer
from tiny_models import tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import moekv
from moekv import CompressedContext, MoERouterPress
from moekv.models.hooks import cache_argument

DOCUMENT = "The tide covers the causeway twice a day. " * 6
QUESTION = "When does it come?"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return character_tokenizer()


def greedy(model: PreTrainedModel, context: CompressedContext, asked: torch.Tensor) -> list[int]:
    """What the likeliest tokens are, one forward at a time."""
    cache = copy.deepcopy(context.cache)
    ids, position, answer = asked, len(context), []
    for _ in range(8):
        positions = torch.arange(position, position + ids.shape[1])[None]
        with torch.no_grad():
            logits = model(ids, position_ids=positions, **cache_argument(model, cache)).logits
        position += ids.shape[1]
        ids = logits[:, -1:].argmax(-1)
        answer.append(int(ids))
    return answer


@pytest.mark.parametrize("options", [{}, {"budget": "uniform"}, {"compression_ratio": 0}], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 50])
def test_answers_come_from_the_document(
    options: dict[str, object],
    chunk_size: int | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    press = MoERouterPress(**options)
    context = moekv.compress(model, tokenizer, DOCUMENT, press=press, chunk_size=chunk_size)
    assert len(context) == len(DOCUMENT.strip())
    asked = tokenizer(f"\n\n{QUESTION}\nAnswer:", return_tensors="pt").input_ids
    expected = tokenizer.decode(greedy(model, context, asked)).strip()
    for _ in range(2):  # a question leaves nothing behind
        assert context.ask(QUESTION, max_new_tokens=8) == expected
    # 2 layers, keys and values, 2 heads of 16 numbers of 4 bytes.
    assert context.full_nbytes == 2 * 2 * 2 * 16 * 4 * len(context)
    if options.get("compression_ratio") == 0:
        assert 1 <= context.nbytes / context.full_nbytes < 1.1  # chunks leave room to grow
    else:
        assert context.stats["forward_count"] > 0
        assert 0.45 < context.nbytes / context.full_nbytes < 0.55
    assert str(len(context)) in repr(context)


def test_a_context_is_saved_and_loaded(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    context = moekv.compress(model, tokenizer, DOCUMENT)
    path = tmp_path / "context.safetensors"
    context.save(path)
    loaded = moekv.load_context(path, model, tokenizer)
    assert torch.equal(loaded.input_ids, context.input_ids)
    assert loaded.full_nbytes == context.full_nbytes
    assert loaded.nbytes <= context.nbytes  # room to grow stays behind
    assert loaded.ask(QUESTION) == context.ask(QUESTION)
    moekv.load_cache(path, model)  # it is a cache as well
    moekv.save_cache(context.cache, path, model)
    with pytest.raises(ValueError, match="without the tokens that filled it"):
        moekv.load_context(path, model, tokenizer)


def test_progress_counts_layers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    moekv.compress(model, tokenizer, DOCUMENT, progress=note)
    assert seen == [(1, 2), (2, 2)]
    seen.clear()
    moekv.compress(model, tokenizer, DOCUMENT, chunk_size=100, progress=note)
    assert seen == [(done, 6) for done in range(1, 7)]


def test_a_context_shows_what_stayed(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    press = MoERouterPress(compression_ratio=0.75)
    context = moekv.compress(model, tokenizer, DOCUMENT, press=press, record=True)
    with press(model):
        model(context.input_ids[:, :20])  # what the press does later is no part of it
    context.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "compression_ratio=0.75" in page and f'"tokens":{len(context)},' in page
    assert context.recording is not None
    kept = sum(int(layer.kept.sum()) for layer in context.recording.layers)
    assert kept == 2 * 2 * (len(context) // 4)

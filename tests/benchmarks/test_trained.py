"""Small models that the repository trains: their language, their questions, their files."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import choice, trained
from benchmarks.quality.suites import load_suite
from benchmarks.quality.tasks import encode
from benchmarks.quality.trained import TASKS, WORDS, Stage, make_sample, make_tokenizer

SHORT = (Stage(2, 72, 2, 4, 24), Stage(1, 96, 2, 4, 24))


@pytest.mark.parametrize("task", TASKS)
def test_answers_stand_in_the_context_behind_their_beginning(task: str) -> None:
    for index in range(5):
        sample = make_sample(task, index)
        assert sample == make_sample(task, index)
        assert len(sample.context.split()) == 384
        assert f"{sample.answer_prefix} {sample.answer}" in sample.context
        assert f" {sample.context}".count(f" {sample.answer_prefix} ") == 1
        parts = encode(sample, make_tokenizer())
        assert len(parts[0]) == 384 and 0 not in sum(parts, [])


def test_lessons_ask_for_what_they_have_said() -> None:
    rng = random.Random(0)
    for _ in range(5):
        numbers, is_answer = trained._lesson(rng, Stage(1, 160, 1, 10, 24))
        words = [WORDS[number] for number in numbers]
        assert len(words) == len(is_answer) == 160
        assert sum(is_answer) == 2 * 10 + 24 - trained.GIVEN
        text, ask = " ".join(words), words.index(trained.ASK)
        for place in range(ask, ask + 4 * 10, 4):
            assert words[place] == trained.ASK and is_answer[place + 2 : place + 4] == [True] * 2
            assert text.count(" ".join(words[place + 1 : place + 4])) >= 2


@pytest.mark.parametrize("kind", trained.KINDS)
def test_a_trained_model_is_saved_with_its_questions(kind: str, tmp_path: Path) -> None:
    model = trained.train(kind, 1, SHORT)
    again = trained.train(kind, 1, SHORT)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    trained.save(model, tmp_path, seed=1, samples=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("w3 n5 ?").input_ids == [
        WORDS.index(word) for word in ("w3", "n5", "?")
    ]
    suite = load_suite("ruler", None, tmp_path / "tasks.jsonl")
    assert list(suite) == list(TASKS) and len(suite["facts"]) == 2
    assert suite["facts"][0].context == make_sample("facts", 0, seed=1).context


def test_presses_with_the_choice_and_without() -> None:
    model, tokenizer = trained.train("mixtral", 0, SHORT), make_tokenizer()
    options = choice.presses({"without": None, "with": None})
    assert list(options) == list(choice.presses({"without": 1, "with": 2}))
    free = options["training-free, an expert that reads it"]
    kls = choice.measure(model, tokenizer, free, 1)
    assert len(kls) == len(choice.RATIOS) and all(0 <= kl < 20 for kl in kls)

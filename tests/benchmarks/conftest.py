"""What tests of the quality benchmark share."""

import pytest
import torch
from quality_model import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.quality import tasks

BOOK = " ".join(f"The {a} {b} went to town." for a in tasks.ADJECTIVES for b in tasks.NOUNS[:12])


@pytest.fixture(scope="module")
def model():
    return make_model().to(torch.bfloat16)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {chr(i): i for i in range(256)} | {"<unk>": 256}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %}U:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    return fast


@pytest.fixture
def local_texts(monkeypatch):
    sentences = tuple(part.strip() + "." for part in BOOK.split(".") if part)
    lines = tuple(f"value_{i} = compute({i})\n" for i in range(900))
    monkeypatch.setattr(
        tasks, "_units", lambda kind: {"prose": (sentences,), "code": (lines,)}[kind]
    )


@pytest.fixture
def few_methods(monkeypatch):
    import kvpress  # which need not be there for the other tests of this folder

    from benchmarks.quality import presses, report
    from benchmarks.quality import run as runner

    class Failing(kvpress.KnormPress):
        def score(self, *args, **kwargs):
            raise ValueError("no such luck\nsecond line")

    methods = {
        "KnormPress": presses.METHODS["KnormPress"],
        "KeyDiffPress": presses.METHODS["KeyDiffPress"],
        "Failing": Failing,
    }
    monkeypatch.setattr(runner, "METHODS", methods)
    monkeypatch.setattr(report, "METHODS", methods)
    return methods

"""RULER's thirteen tasks, made offline from their description: `moekv bench run --suite ruler`.

Kinds and numbers of needles, chains and words, the tokens an answer may take and the scores are
those of [1]_. The wording is this project's, essays are the test documents of ``texts.py``, words
come from a Debian package, and the two question-answering tasks ask about invented persons, as
their data sets are not to be had offline. So a score compares presses on one model, and not models
with published tables; for these the hub's own rows are answered with ``--subset`` or ``--data``.

References
----------
.. [1] Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?",
   arXiv:2404.06654.
"""

from __future__ import annotations

import functools
import random
import string
import uuid
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from .tasks import CITIES, FIRST, INSTRUMENTS, JOBS, Sample, Source, draw_number
from .texts import words

LEAST_LENGTH = 512
"""Tokens that the largest sets of needles and words need at least."""


def _listed(items: Sequence[str]) -> str:
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last


def _sample(
    context: str,
    question: str,
    prefix: str,
    answers: Sequence[str],
    tokens: int,
    metric: str = "all",
) -> Sample:
    return Sample(
        context,
        question,
        prefix,
        " " + ", ".join(answers),
        answers=tuple(answers),
        metric=f"match_{metric}",
        max_new_tokens=tokens,
    )


def _word(rng: random.Random) -> str:
    return "-".join(rng.sample(words(), 2))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_DRAW = {"number": draw_number, "word": _word, "uuid": _uuid}
_CALLED = {"number": "access number", "uuid": "access code"}


def _needles(
    source: Source,
    *,
    hay: str,
    key: str = "word",
    value: str = "number",
    num_keys: int = 1,
    num_values: int = 1,
    num_asked: int = 1,
) -> Sample:
    """Hide what some keys stand for, and ask for what the first of them do."""
    rng, called = source.rng, _CALLED[value]

    def needle(name: str) -> tuple[str, str]:
        number = _DRAW[value](rng)
        return number, f"One {called} of {name} is {number}."

    keys = [_DRAW[key](rng) for _ in range(num_keys)]
    drawn = {name: [needle(name) for _ in range(num_values)] for name in keys}
    hidden = [sentence for own in drawn.values() for _, sentence in own]
    rng.shuffle(hidden)
    if hay == "needles":
        room = source.length - sum(map(source.count, hidden))
        pieces = Source(source.tokenizer, rng, room).repeat(lambda: needle(_DRAW[key](rng))[1])
    else:
        pieces = source.noise(hidden) if hay == "noise" else source.prose(hidden)
    asked = keys[:num_asked]
    answers = [number for name in asked for number, _ in drawn[name]]
    plural, verb = ("s", "are") if len(answers) > 1 else ("", "is")
    return _sample(
        source.hide(hidden, pieces),
        f"What {verb} the {called}{plural} of {_listed(asked)} in the text above?",
        f"The {called}{plural} of {_listed(asked)} in the text {verb}",
        answers,
        128,
    )


def vt(source: Source) -> Sample:
    """Follow a chain of four assignments."""
    rng = source.rng
    names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(5)]
    value = str(rng.randrange(10**4, 10**5))
    links = [f"VAR {name} = {to}" for name, to in zip(names, [value, *names], strict=False)]
    return _sample(
        source.hide(links, source.noise(links)),
        f"Which variables have the value {value} in the text above?",
        f"In the text, five variables have the value {value}:",
        names,
        30,
    )


def cwe(source: Source) -> Sample:
    """Find the ten words that come ten times as often as all others."""
    rng = source.rng
    often, seldom = (30, 3) if source.length >= 4096 else (10, 1)
    drawn = rng.sample(words(), len(words()))
    common, others = drawn[:10], drawn[10:]
    listed = common * often
    tokens = sum(source.count(f"99. {word}\n") for word in common) * often
    for word in others:
        if tokens >= source.length:
            break
        listed += [word] * seldom
        tokens += source.count(f"999. {word}\n") * seldom
    rng.shuffle(listed)
    return _sample(
        "\n".join(f"{i}. {word}" for i, word in enumerate(listed, 1)),
        "Which ten words are the most common in the list above?",
        "The ten most common words of the list are:",
        common,
        120,
    )


def fwe(source: Source) -> Sample:
    """Find the three most frequent of coded words whose frequency falls with their rank squared."""
    rng = source.rng
    coded = ["...", *("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(2000))]
    each = sum(source.count(f" {word}") for word in coded[1:21]) / 20
    total = source.length / (0.61 * source.count(" ...") + 0.39 * each)  # as 1 / zeta(2) = .61
    listed = []
    for rank, word in enumerate(coded, 1):
        listed += [word] * round(0.61 * total / rank**2)
    rng.shuffle(listed)
    return _sample(
        " ".join(listed),
        "Which three coded words appear most often in the text above? Leave out the dots.",
        "The three words that appear most often in the text are:",
        coded[1:4],
        50,
    )


def _persons(source: Source) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Invent persons, each the pupil of the next, until their lives fill the context."""
    rng = source.rng
    last = [word.capitalize() for word in rng.sample(words(), 4000)]
    names = [f"{rng.choice(FIRST)} {name}" for name in last]
    lives: dict[str, dict[str, str]] = {}
    paragraphs, tokens = [], 0
    for name, teacher in zip(names, names[1:], strict=False):
        facts = {
            "city": rng.choice(CITIES),
            "job": rng.choice(JOBS),
            "instrument": rng.choice(INSTRUMENTS),
            "teacher": teacher,
        }
        lives[name] = facts
        paragraphs.append(
            f"{name} grew up in {facts['city']} and became a {facts['job']}. As a child, {name} "
            f"learnt the {facts['instrument']} from {teacher}."
        )
        tokens += source.count(paragraphs[-1]) + 1
        if tokens >= source.length:
            break
    rng.shuffle(paragraphs)
    return paragraphs, lives


def qa_1(source: Source) -> Sample:
    """Answer a question about one of many persons."""
    paragraphs, lives = _persons(source)
    who = source.rng.choice(list(lives))
    return _sample(
        "\n\n".join(paragraphs),
        f"In which city did {who} grow up? Answer with its name.",
        f"{who} grew up in",
        [lives[who]["city"]],
        32,
        "any",
    )


def qa_2(source: Source) -> Sample:
    """Answer a question that needs two of the paragraphs."""
    paragraphs, lives = _persons(source)
    who = source.rng.choice(list(lives)[:-1])
    teacher = lives[who]["teacher"]
    return _sample(
        "\n\n".join(paragraphs),
        f"In which city did the person grow up who taught {who} to play an instrument?",
        f"The person who taught {who} grew up in",
        [lives[teacher]["city"]],
        32,
        "any",
    )


RULER: dict[str, Callable[[Source], Sample]] = {
    "niah_single_1": functools.partial(_needles, hay="noise"),
    "niah_single_2": functools.partial(_needles, hay="prose"),
    "niah_single_3": functools.partial(_needles, hay="prose", value="uuid"),
    "niah_multikey_1": functools.partial(_needles, hay="prose", num_keys=4),
    "niah_multikey_2": functools.partial(_needles, hay="needles"),
    "niah_multikey_3": functools.partial(_needles, hay="needles", key="uuid", value="uuid"),
    "niah_multivalue": functools.partial(_needles, hay="prose", num_values=4),
    "niah_multiquery": functools.partial(_needles, hay="prose", num_keys=4, num_asked=4),
    "vt": vt,
    "cwe": cwe,
    "fwe": fwe,
    "qa_1": qa_1,
    "qa_2": qa_2,
}
"""The tasks by their names in RULER."""


def make_ruler(
    task: str, tokenizer: PreTrainedTokenizerBase, *, length: int, index: int, seed: int = 0
) -> Sample:
    """Make one sample of about `length` tokens; the same arguments give the same sample.

    Raises
    ------
    ValueError
        `length` is below ``LEAST_LENGTH``.
    """
    if length < LEAST_LENGTH:
        raise ValueError(f"expected a length of at least {LEAST_LENGTH} tokens, got {length}")
    rng = random.Random(f"ruler/{seed}/{task}/{length}/{index}")
    return RULER[task](Source(tokenizer, rng, length))

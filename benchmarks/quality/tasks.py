"""Tasks: a context, and a question about it that nobody saw when the context was compressed.

Every sample is made from a seed. Contexts are about `length` tokens, from test documents alone.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moekv.models.chat import user_turn

from .texts import documents


@dataclass(frozen=True)
class Sample:
    """One context with a question and the reference answer.

    Where `chat` is set, context and question are the user's turn and the answer follows
    `answer_prefix` in the assistant's, if the model knows chats; else all of it is plain text.

    Samples of official benchmarks have a `metric` as well (a key of ``scores.METRICS``): what the
    model writes in at most `max_new_tokens` is held against `answers`, and where the metric is of
    classes, against all of these.
    """

    context: str
    question: str
    answer_prefix: str
    answer: str
    chat: bool = True
    answers: tuple[str, ...] = ()
    metric: str = ""
    max_new_tokens: int = 0
    classes: tuple[str, ...] = ()


class Source:
    """Draws text of a wanted number of tokens; one per sample.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Counts the tokens.
    rng : random.Random
        Makes all choices.
    length : int
        Tokens of the context.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random, length: int) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.length = length

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prose(self, reserve: Sequence[str] = (), extra: int = 0) -> list[str]:
        """Draw successive sentences that fill the context beside `reserve`, then `extra` tokens."""
        wanted = self.length + extra - sum(map(self.count, reserve))
        return self._fill(_units("prose"), wanted)

    def code(self, extra: int = 0) -> list[str]:
        """Draw successive lines of code that fill the context and `extra` tokens."""
        return self._fill(_units("code"), self.length + extra)

    def noise(self, reserve: Sequence[str] = ()) -> list[str]:
        """Repeat meaningless sentences until they fill the context beside `reserve`."""
        wanted = self.length - sum(map(self.count, reserve))
        return [NOISE] * max(wanted // self.count(NOISE), 1)

    def repeat(self, draw: Callable[[], str]) -> list[str]:
        """Draw lines until they fill the context."""
        lines, tokens = [], 0
        while tokens < self.length:
            lines.append(draw())
            tokens += self.count(lines[-1])
        return lines

    def hide(self, needles: Sequence[str], hay: list[str]) -> str:
        """Put the needles, in order, at random places between pieces of hay."""
        places = sorted(self.rng.choices(range(len(hay) + 1), k=len(needles)))
        pieces = list(hay)
        for place, needle in reversed(list(zip(places, needles, strict=True))):
            pieces.insert(place, needle)
        return " ".join(pieces)

    def _fill(self, texts: Sequence[tuple[str, ...]], wanted: int) -> list[str]:
        """Draw a place in a document, long ones more often, from which `wanted` tokens follow."""
        while True:
            units = self.rng.choices(texts, weights=[len(t) for t in texts])[0]
            first = self.rng.randrange(len(units))
            chosen, tokens = [], 0
            for unit in units[first:]:
                chosen.append(unit)
                tokens += self.count(unit)
                if tokens >= wanted:
                    return chosen


@functools.cache
def _units(kind: str) -> tuple[tuple[str, ...], ...]:
    """Split each test document: prose into sentences, code into lines."""
    if kind == "code":
        return tuple(tuple(d.text().splitlines(keepends=True)) for d in documents("test", kind))
    return tuple(
        tuple(s for s in re.split(r"(?<=[.!?]) +|\n", d.text()) if s)
        for d in documents("test", kind)
    )


NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = words(
    """amber ancient bitter brave bright calm clever cloudy crimson curious damp distant eager
    early fancy fierce frozen gentle golden hidden hollow humble icy ivory jolly keen lively lonely
    loud mellow misty narrow noble odd pale plain proud quiet rapid rusty silent silver sleepy steep
    sturdy swift tender vivid wild young"""
)
NOUNS = words(
    """anchor arrow badge basket beacon bridge candle canyon castle cellar chimney circle compass
    copper crown desert engine falcon feather fiddle forest fountain garden glacier hammer harbor
    island jacket kettle ladder lantern marble meadow mirror needle orchard paddle pebble pillar
    puzzle ribbon river saddle shadow shelter temple thunder tunnel valley willow window"""
)
FIRST = words("Anna Boris Clara David Elena Farid Greta Hugo Irene Jonas Karla Liam Maria Nadia")
LAST = words("Abbot Becker Castro Dalton Fischer Garcia Holmes Ivanov Jensen Keller Lopez")
CITIES = words("Lisbon Oslo Vienna Nairobi Lima Kyoto Toronto Cairo Dublin Hanoi Seville Quito")
JOBS = words("baker carpenter dentist farmer gardener judge nurse pilot plumber sailor tailor")
INSTRUMENTS = words("cello flute guitar harp oboe piano trumpet violin drums")
LABELS = words("blue cold green heavy late old red short soft wide")
TOPICS = {
    "food": ("soup", "cheese", "salad"),
    "sport": ("tennis", "boxing", "hockey"),
    "music": ("opera", "jazz", "guitar"),
    "weather": ("rain", "fog", "snow"),
}
REMARKS = (
    "I could talk about the {} all day long.",
    "My neighbour told me about the {} again.",
    "We never expected so much {} this year.",
    "Nothing beats good {} on a Sunday.",
    "There was a long report on {} in the paper.",
    "Her brother knows everything about {}.",
    "They argued about the {} until midnight.",
)


def _keys(rng: random.Random, count: int) -> list[str]:
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[p // len(NOUNS)]} {NOUNS[p % len(NOUNS)]}" for p in pairs]


def draw_number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _needle_sample(source: Source, num_needles: int, hay: str) -> Sample:
    keys = _keys(source.rng, num_needles)
    numbers = [draw_number(source.rng) for _ in keys]
    needles = [f"The secret number of the {k} is {n}." for k, n in zip(keys, numbers, strict=True)]
    pieces = source.noise(needles) if hay == "noise" else source.prose(needles)
    asked = source.rng.randrange(num_needles)
    return Sample(
        context=source.hide(needles, pieces),
        question=f"What is the secret number of the {keys[asked]} in the text above?",
        answer_prefix=f"The secret number of the {keys[asked]} is",
        answer=f" {numbers[asked]}",
    )


def needle_noise(source: Source) -> Sample:
    """Find one number in repeated sentences."""
    return _needle_sample(source, 1, "noise")


def needle_prose(source: Source) -> Sample:
    """Find one number in a book."""
    return _needle_sample(source, 1, "prose")


def needles_prose(source: Source) -> Sample:
    """Find the right one of four numbers in a book."""
    return _needle_sample(source, 4, "prose")


def many_keys(source: Source) -> Sample:
    """Find one number where the whole context is numbers."""
    keys = iter(_keys(source.rng, len(ADJECTIVES) * len(NOUNS)))
    numbers: dict[str, str] = {}

    def draw() -> str:
        key = next(keys)
        numbers[key] = draw_number(source.rng)
        return f"The secret number of the {key} is {numbers[key]}."

    context = "\n".join(source.repeat(draw))
    asked = source.rng.choice(list(numbers))
    return Sample(
        context=context,
        question=f"What is the secret number of the {asked} in the list above?",
        answer_prefix=f"The secret number of the {asked} is",
        answer=f" {numbers[asked]}",
    )


def variable_tracking(source: Source) -> Sample:
    """Follow a chain of four assignments; a second chain distracts."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = ["".join(source.rng.choices(letters, k=4)) for _ in range(8)]
    chains, values = (names[:4], names[4:]), source.rng.sample(range(10**4, 10**5), 2)
    lines: list[list[str]] = []
    for chain, value in zip(chains, values, strict=True):
        links = zip(chain, [str(value), *chain], strict=False)
        lines.append([f"VAR {name} = {to}." for name, to in links])
    # The chains interleave, each in its own order.
    first = set(source.rng.sample(range(8), 4))
    queues = [iter(chain) for chain in lines]
    needles = [next(queues[0 if i in first else 1]) for i in range(8)]
    return Sample(
        context=source.hide(needles, source.noise(needles)),
        question=f"Which four variables have the value {values[0]} in the text above?",
        answer_prefix=f"The variables that have the value {values[0]} are:",
        answer=" " + ", ".join(chains[0]),
    )


def facts(source: Source) -> Sample:
    """Answer a question about one of four persons whom a book mentions in passing."""
    rng = source.rng
    people = [f"{a} {b}" for a, b in zip(rng.sample(FIRST, 4), rng.sample(LAST, 4), strict=True)]
    columns = [rng.sample(values, 4) for values in (CITIES, JOBS, INSTRUMENTS)]
    sentences = [
        sentence
        for person, city, job, instrument in zip(people, *columns, strict=True)
        for sentence in (
            f"{person} lives in {city}.",
            f"{person} works as a {job}.",
            f"{person} plays the {instrument}.",
        )
    ]
    who, what = rng.randrange(4), rng.randrange(3)
    question, start = (
        ("Where does {} live?", "{} lives in"),
        ("What is the job of {}?", "{} works as a"),
        ("Which instrument does {} play?", "{} plays the"),
    )[what]
    rng.shuffle(sentences)
    return Sample(
        context=source.hide(sentences, source.prose(sentences)),
        question=question.format(people[who]),
        answer_prefix=start.format(people[who]),
        answer=f" {columns[what][who]}",
    )


def labelling(source: Source) -> Sample:
    """Label a remark as the examples do, with labels that mean nothing elsewhere."""
    rng = source.rng
    labels = dict(zip(TOPICS, rng.sample(LABELS, len(TOPICS)), strict=True))

    def draw() -> tuple[str, str]:
        topic = rng.choice(list(TOPICS))
        return rng.choice(REMARKS).format(rng.choice(TOPICS[topic])), labels[topic]

    def example() -> str:
        remark, label = draw()
        return f"Remark: {remark}\nLabel: {label}\n"

    context = "\n".join(source.repeat(example))
    remark, label = draw()
    return Sample(context, f"\nRemark: {remark}\nLabel:", "", f" {label}", chat=False)


def recall(source: Source) -> Sample:
    """Repeat a passage of the book word by word, given its beginning."""
    sentences = source.prose()
    words = " ".join(sentences).split()
    at = source.rng.randrange(len(words) // 10, len(words) - 60)
    return Sample(
        context=" ".join(sentences),
        question="Repeat a passage of the text above word by word.",
        answer_prefix=" ".join(words[at : at + 12]),
        answer=" " + " ".join(words[at + 12 : at + 36]),
    )


def continue_prose(source: Source) -> Sample:
    """Continue the book."""
    text = " ".join(source.prose(extra=96))
    return _split(source, text)


def continue_code(source: Source) -> Sample:
    """Continue the program."""
    # Lines have more tokens one by one than together, as white space merges.
    return _split(source, "".join(source.code(extra=96 + source.length // 2)))


def _split(source: Source, text: str) -> Sample:
    """Cut plain text behind `length` tokens; 4 more stand for a question, the next 64 answer."""
    ids = source.tokenizer(text, add_special_tokens=False).input_ids
    ends = (0, source.length, source.length + 4, source.length + 68)
    if len(ids) < ends[-1]:
        raise ValueError(f"expected a text of {ends[-1]} tokens, got {len(ids)}")
    context, question, answer = (
        source.tokenizer.decode(ids[begin:end]) for begin, end in itertools.pairwise(ends)
    )
    return Sample(context, question, "", answer, chat=False)


TASKS: dict[str, Callable[[Source], Sample]] = {
    task.__name__: task
    for task in (
        needle_noise,
        needle_prose,
        needles_prose,
        many_keys,
        variable_tracking,
        facts,
        labelling,
        recall,
        continue_prose,
        continue_code,
    )
}


def make_sample(
    task: str, tokenizer: PreTrainedTokenizerBase, *, length: int, index: int, seed: int = 0
) -> Sample:
    """Make one sample; the same arguments give the same sample."""
    rng = random.Random(f"{seed}/{task}/{length}/{index}")
    return TASKS[task](Source(tokenizer, rng, length))


def encode(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, *, seen: bool = False
) -> tuple[list[int], ...]:
    """Tokenise what is compressed, what is fed behind it, and the answer.

    Context, question and answer are tokenised apart, so that none leans on another's text.

    Parameters
    ----------
    sample : Sample
    tokenizer : PreTrainedTokenizerBase
    seen : bool
        Whether the question is compressed with its context, as where ``generate`` gets both: only
        the answer's beginning follows. Where the sample gives none, the question's last token
        does, since what a prompt itself predicts needs no cache.

    Returns
    -------
    tuple of three lists of int
    """
    turn = user_turn(tokenizer) if sample.chat else None
    before, between = turn or ("", "\n")
    question = f"\n\n{sample.question}{between}" if sample.chat else sample.question
    context, asked, prefix, answer = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (before + sample.context, question, sample.answer_prefix, sample.answer)
    )
    if turn is None:  # a chat's template has what comes before every text
        context = tokenizer("").input_ids + context
    if not seen:
        return context, asked + prefix, answer
    prompt = context + asked
    return (prompt, prefix, answer) if prefix else (prompt[:-1], prompt[-1:], answer)

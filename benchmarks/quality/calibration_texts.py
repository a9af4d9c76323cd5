"""Texts to calibrate on: `python -m benchmarks.quality.calibration_texts FOLDER`.

Prose and code from the calibration documents, and made-up tables, registers, logs and notes, alone
and mixed. Nothing here is in a test document, and no sentence has the form of a task's.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path

from .tasks import words
from .texts import documents

SYLLABLES = words("ba ko ri ta mu le so vi ne da ku fi ra po ze lo mi ga tu he")
FIELDS = words(
    "id date amount status owner city code weight price phone email room floor score version"
)
NOTES = (
    "{a}'s {c} is {v}.",
    "The {c} of {a} was recorded as {v}.",
    "Remember that {a} has {c} {v}.",
    "According to the register, the {c} for {a} reads {v}.",
    "Note: {c} of {a} = {v}.",
    "{a} told us the {c}: {v}.",
)
EVENTS = (
    "moved to",
    "married",
    "bought a house in",
    "studied with",
    "sold the boat to",
    "was born in",
    "teaches",
    "visited",
)
CHARACTERS = 6000  # more than any tokenizer puts into 1,024 tokens of such text


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()


def _value(rng: random.Random, field: str) -> str:
    def digits(count: int) -> str:
        return "".join(rng.choices(string.digits, k=count))

    makers: dict[str, Callable[[], str]] = {
        "id": lambda: digits(rng.randint(3, 8)),
        "date": lambda: (
            f"{rng.randint(1950, 2030)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        ),
        "amount": lambda: f"{rng.randint(1, 99999)}.{digits(2)}",
        "status": lambda: rng.choice(["open", "closed", "pending", "failed", "ok"]),
        "owner": lambda: f"{_name(rng)} {_name(rng)}",
        "city": lambda: _name(rng),
        "code": lambda: "".join(
            rng.choices(string.ascii_uppercase + string.digits, k=rng.randint(4, 9))
        ),
        "weight": lambda: f"{rng.randint(1, 900)} kg",
        "price": lambda: f"${rng.randint(1, 9999)}",
        "phone": lambda: f"+{digits(2)} {digits(3)} {digits(6)}",
        "email": lambda: f"{_name(rng)}@{_name(rng)}.com".lower(),
        "room": lambda: digits(3),
        "floor": lambda: str(rng.randint(1, 40)),
        "score": lambda: f"{rng.random():.3f}",
        "version": lambda: f"{rng.randint(0, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 9)}",
    }
    return makers[field]()


def _records(rng: random.Random) -> Iterator[str]:
    """Go on with records of one form."""
    fields = rng.sample(FIELDS, rng.randint(3, 6))
    form = rng.choice(["csv", "json", "markdown", "pairs", "log"])
    while True:
        row = {field: _value(rng, field) for field in fields}
        if form == "csv":
            yield ",".join(row.values()) + "\n"
        elif form == "json":
            yield json.dumps(row) + ",\n"
        elif form == "markdown":
            yield "| " + " | ".join(row.values()) + " |\n"
        elif form == "pairs":
            yield "\n".join(f"{field}: {value}" for field, value in row.items()) + "\n\n"
        else:
            level = rng.choice(["INFO", "WARN", "ERROR"])
            pairs = " ".join(f"{field}={value}" for field, value in list(row.items())[:3])
            yield f"[{_value(rng, 'date')}] {level} {_name(rng).lower()}: {pairs}\n"


def _note(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return f"{_name(rng)} {_name(rng)} {rng.choice(EVENTS)} {_name(rng)}."
    field = rng.choice(FIELDS)
    return rng.choice(NOTES).format(a=_name(rng), c=field, v=_value(rng, field))


def _sentences(rng: random.Random, characters: int) -> list[str]:
    text = rng.choice(documents("calibration", "prose")).text()
    first = rng.randrange(max(len(text) - characters, 1))
    return [s for s in re.split(r"(?<=[.!?]) +|\n", text[first : first + characters])[1:] if s]


def _code(rng: random.Random, characters: int) -> str:
    text = rng.choice(documents("calibration", "code")).text()
    first = text.index("\n", rng.randrange(max(len(text) - 2 * characters, 1))) + 1
    return text[first : first + characters]


def _table(rng: random.Random, characters: int) -> str:
    records, text = _records(rng), ""
    while len(text) < characters:
        text += next(records)
    return text


def _with_notes(rng: random.Random, hay: list[str], count: int) -> str:
    for _ in range(count):
        hay.insert(rng.randrange(len(hay)), _note(rng))
    return " ".join(hay)


def _repeated(rng: random.Random) -> list[str]:
    found = re.findall(r"[a-z]+", " ".join(_sentences(rng, 3000)))
    phrase = " ".join(
        " ".join(rng.choices(found, k=rng.randint(4, 9))).capitalize() + "."
        for _ in range(rng.randint(2, 5))
    )
    return [phrase] * (CHARACTERS // len(phrase))


def make_text(index: int, seed: int = 0) -> str:
    """Make one text; the same arguments give the same text."""
    rng = random.Random(f"calibration/{seed}/{index}")
    characters = int(CHARACTERS * rng.uniform(0.4, 1))
    kind = rng.choices(["prose", "code", "table", "notes", "repeated", "mixed"], [6, 3, 3, 4, 2, 2])
    if kind == ["prose"]:
        return " ".join(_sentences(rng, characters))
    if kind == ["code"]:
        return _code(rng, characters)
    if kind == ["table"]:
        return _table(rng, characters)
    if kind == ["notes"]:
        return _with_notes(rng, _sentences(rng, characters), rng.randint(1, 16))
    if kind == ["repeated"]:
        return _with_notes(rng, _repeated(rng), rng.randint(1, 10))
    part = characters // 4
    parts = [
        " ".join(_sentences(rng, part)),
        _table(rng, part),
        _code(rng, part),
        _with_notes(rng, _sentences(rng, part), 3),
    ]
    rng.shuffle(parts)
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for index in range(args.texts):
        path = args.folder / f"{index:04}.txt"
        path.write_text(make_text(index, args.seed), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Official benchmarks, in the format that kvpress's evaluation has put on the hub.

A row has a `context`, a `question`, an `answer_prefix`, `answer` or `answers`, and a `task`.
RULER's `answer` lists all that has to be said, LongBench's `answers` are alternatives. Where a row
has `max_new_tokens`, what a model writes is scored as the benchmark does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .scores import LONGBENCH
from .tasks import Sample

SUITES = {"ruler": "simonjegou/ruler", "longbench": "Xnhyacinth/LongBench"}


def load_suite(name: str, subset: str | None, data: Path | None) -> dict[str, list[Sample]]:
    """Load the samples of each task, in their order.

    Parameters
    ----------
    name : str
        A key of ``SUITES``.
    subset : str or None
        Of the data set on the hub: "4096" of RULER, a task's name of LongBench.
    data : Path or None
        A file of JSON lines in the same format, instead of the hub.

    Raises
    ------
    ValueError
        A row lacks a column, or there are none.
    """
    import datasets  # kvpress brings it; slow to import

    if data is None:
        rows = datasets.load_dataset(SUITES[name], subset, split="test")
    else:
        rows = datasets.load_dataset("json", data_files=str(data), split="train")
    samples: dict[str, list[Sample]] = defaultdict(list)
    for row in rows:
        task = str(row.get("task", name))
        samples[task].append(_sample(row, task))
    if not samples:
        raise ValueError(f"expected rows of {name}, got none")
    return dict(samples)


def _metric(row: Mapping[str, Any], task: str) -> str:
    """Metric of a row; none where no score is published, or nobody says how much to write."""
    if not row.get("max_new_tokens"):
        return ""
    if row.get("answers"):
        return LONGBENCH.get(task.removesuffix("_e"), "")
    return "match_any" if task.startswith("qa") else "match_all"


def _sample(row: Mapping[str, Any], task: str) -> Sample:
    missing = {"context", "question", "answer_prefix"} - row.keys()
    if missing or not (row.get("answer") or row.get("answers")):
        lacking = ", ".join(sorted(missing)) or "answer or answers"
        raise ValueError(f"expected a row with {lacking}, got {', '.join(sorted(row))}")
    answers = row.get("answer") or row["answers"]
    answers = (answers,) if isinstance(answers, str) else tuple(answers)
    answer = ", ".join(answers) if row.get("answer") else answers[0]
    prefix = row["answer_prefix"]
    space = "" if not prefix or prefix[-1].isspace() else " "
    return Sample(
        row["context"],
        row["question"],
        prefix,
        space + answer,
        answers=answers,
        metric=_metric(row, task),
        max_new_tokens=int(row.get("max_new_tokens") or 0),
        classes=tuple(row.get("all_classes") or ()),
    )

"""Scores that official benchmarks publish: what a model wrote, held against their answers.

RULER counts answers that the text contains, LongBench has a metric for each of its data sets. As
their own evaluations do, control characters are dropped first. Data sets in Chinese, which would
need a segmenter of words, have no score here.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

from .tasks import Sample


def _match_all(text: str, sample: Sample) -> float:
    """Share of the answers that the text contains."""
    return sum(a.lower() in text.lower() for a in sample.answers) / len(sample.answers)


def _match_any(text: str, sample: Sample) -> float:
    return float(any(answer.lower() in text.lower() for answer in sample.answers))


def _normal(text: str) -> list[str]:
    """Give words in lower case, without articles and punctuation."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _f1(text: str, answer: str) -> float:
    """F1 over words, as SQuAD has it."""
    said, wanted = _normal(text), _normal(answer)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def _rouge(text: str, answer: str) -> float:
    from rouge import Rouge

    if not text.strip(" .\n") or not answer.strip(" .\n"):  # it has no sentence, and raises
        return 0.0
    return float(Rouge().get_scores([text], [answer], avg=True)["rouge-l"]["f"])


def _count(text: str, answer: str) -> float:
    """Share of the numbers in the text that are the right one."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(re.findall(r"\d+", answer)[0]) / len(numbers) if numbers else 0.0


def _edit(text: str, answer: str) -> float:
    """Similarity of the first line of code to the reference."""
    from rapidfuzz import fuzz

    lines = text.lstrip("\n").split("\n")
    code = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(code, answer)) / 100


def _classes(text: str, sample: Sample) -> float:
    """One over the number of classes that the text names, if the right one is among them."""
    (answer,) = sample.answers
    named = [c for c in sample.classes if c in text and not (c in answer and c != answer)]
    return 1 / len(named) if answer in named else 0.0


def _best(metric: Callable[[str, str], float]) -> Callable[[str, Sample], float]:
    """Take the best over alternative answers."""
    return lambda text, sample: max(metric(text, answer) for answer in sample.answers)


METRICS: dict[str, Callable[[str, Sample], float]] = {
    "match_all": _match_all,
    "match_any": _match_any,
    "f1": _best(_f1),
    "rouge": _best(_rouge),
    "count": _best(_count),
    "edit": _best(_edit),
    "classes": _classes,
}

_LONGBENCH = {
    "f1": "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa",
    "rouge": "gov_report qmsum multi_news samsum",
    "classes": "trec",
    "count": "passage_count passage_retrieval_en",
    "edit": "lcc repobench-p",
}
LONGBENCH = {task: metric for metric, tasks in _LONGBENCH.items() for task in tasks.split()}
"""Metric of each English data set of LongBench."""

_ONE_LINE = ("trec", "triviaqa", "samsum")
"""Data sets of LongBench whose examples models go on with: their first line counts."""


def score(text: str, sample: Sample, task: str) -> float:
    """Score what a model wrote, from 0 to 1.

    Parameters
    ----------
    text : str
    sample : Sample
        With a `metric`.
    task : str
        Name of the task, or of the data set.
    """
    if task.removesuffix("_e") in _ONE_LINE:
        text = text.lstrip("\n").split("\n")[0]
    elif sample.metric.startswith("match"):
        text = re.sub(r"[\x00-\x1f]", "", text.strip())
    return METRICS[sample.metric](text, sample)

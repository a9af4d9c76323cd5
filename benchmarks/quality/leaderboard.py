"""The folders in which kvpress keeps results of its evaluation, and which its leaderboard takes.

One folder for each data set, press and ratio: `predictions.csv`, `metrics.json`, `config.yaml`.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .presses import METHODS
from .run import FULL, Cell, Samples

_COLUMNS = (
    "task",
    "question",
    "answer_prefix",
    "answer",
    "max_new_tokens",
    "predicted_answer",
    "compression_ratio",
)


def write_leaderboard(
    rows: Sequence[Mapping[str, Any]],
    samples: Samples,
    folder: Path,
    *,
    suite: str,
    subset: str | None,
    model: str,
    seen: bool,
    seed: int,
) -> list[Path]:
    """Write one folder for each method and ratio that has scores, over what is there.

    Parameters
    ----------
    rows : sequence of dict
        Answers with a `score`, see ``run``; others are left out.
    samples : callable
        Makes the sample of a cell.
    folder : Path
        In which the folders come to be.
    suite : str
        Tasks of RULER make one result; each data set of LongBench makes one.
    subset : str or None
        None: the cells' length, if they have one.
    model : str
    seen : bool
        Whether questions were compressed with contexts.
    seed : int

    Returns
    -------
    list of Path
        The folders.
    """
    groups: dict[tuple[str, str, float], list[tuple[Cell, Mapping[str, Any]]]]
    groups = defaultdict(list)
    for row in rows:
        if "score" in row:
            cell = Cell(**row["cell"])
            part = cell.task if suite == "longbench" else subset or str(cell.length or "")
            groups[part, cell.method, cell.ratio].append((cell, row))
    paths = []
    for (part, method, ratio), answers in groups.items():
        press = "no_press" if method == FULL else method.replace(" ", "_")
        parts = [suite, part, model.replace("/", "--"), press, f"{ratio:.2f}"]
        parts += ["compressed_questions"] * seen
        path = folder / "__".join(filter(None, parts))
        path.mkdir(parents=True, exist_ok=True)
        _write_predictions(path / "predictions.csv", answers, samples)
        (path / "metrics.json").write_text(json.dumps(_metrics(suite, answers), indent=4) + "\n")
        config = {
            "dataset": suite,
            "data_dir": part,
            "model": model,
            "press_name": press,
            "compression_ratio": ratio,
            "compress_questions": seen,
            "press_init_command": "" if method == FULL else str(METHODS[method](ratio)),
            "seed": seed,
        }
        (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        paths.append(path)
    return paths


def _write_predictions(
    path: Path, answers: Sequence[tuple[Cell, Mapping[str, Any]]], samples: Samples
) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for cell, row in answers:
            s = samples(cell)
            asked = cell.task, s.question, s.answer_prefix, list(s.answers), s.max_new_tokens
            writer.writerow([*asked, row["text"], cell.ratio])


def _metrics(suite: str, answers: Sequence[tuple[Cell, Mapping[str, Any]]]) -> Any:
    """Percentages: of each task, or of LongBench's one data set."""
    scores: dict[str, list[float]] = defaultdict(list)
    for cell, row in answers:
        scores[cell.task].append(row["score"])
    percent = {task: round(100 * sum(own) / len(own), 2) for task, own in sorted(scores.items())}
    if suite == "longbench":
        (only,) = percent.values()
        return only
    return {task: {"string_match": value} for task, value in percent.items()}

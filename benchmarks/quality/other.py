"""Other prompts and other models: questions that are seen, and a model without calibration.

The page docs/results-other.md, of the recorded answers in benchmarks/results/seen and
benchmarks/results/gemma: ``python -m benchmarks.quality.first_screen`` makes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT

from .equal_bytes import Figures, Row, cells, percents, samples_of, where
from .metrics import geometric
from .presses import ASKED, STRONG
from .run import FULL, read_results
from .targets import FREE, OURS

SEEN, SECOND, MADE = (RESULTS / x / "answers.jsonl" for x in ("seen", "gemma", "ruler"))
NOTES = Path(__file__).with_name("other-notes.md")
PAGE = ROOT / "docs/results-other.md"

ASKING = sorted({*STRONG, *ASKED, "SnapKVPress", "TOVAPress"})
# Of the strong ones AdaKV(ExpectedAttention) fails on that model.
PLAIN = sorted({*STRONG, "SnapKVPress", "TOVAPress", "KeyDiffPress"} - {"AdaKV(ExpectedAttention)"})
BEST_ASKING, BEST_PLAIN = (
    f"the best of {len(names)} one-pass presses of kvpress on each task"
    for names in (ASKING, PLAIN)
)
NAMES = {
    OURS: "**moekv**",
    FREE: "**moekv**, without the calibrated router",
    "SnapKVPress, 16 queries": "SnapKV, 16 queries",
}
ABOUT = {
    BEST_ASKING: "With the question in the prompt",
    BEST_PLAIN: "On Gemma 3 270M, without calibration,",
}


def seen_figures(rows: Sequence[Row]) -> Figures:
    """Figures of answers whose question was compressed with the context."""
    return Figures(rows, [OURS, FREE, *ASKING], (0.75, 0.9, 0.95), {BEST_ASKING: ASKING})


def second_figures(rows: Sequence[Row]) -> Figures:
    """Figures of a model that nobody has calibrated a router for."""
    return Figures(rows, [OURS, *PLAIN], (0.5, 0.75, 0.9), {BEST_PLAIN: PLAIN})


def _best(figures: Figures) -> str:
    (best,) = figures.sets
    return best


def is_ahead(figures: Figures) -> bool:
    """Whether the press as it comes is ahead of the best of others at every ratio, in the mean."""
    return all(figures.times(OURS, _best(figures), ratio)[0] < 1 for ratio in figures.ratios)


def comparison(figures: Figures) -> str:
    """Say in one line what KL the press as it comes has beside the best of others."""
    best = _best(figures)
    times = " / ".join(f"{figures.times(OURS, best, r)[0]:.2f}" for r in figures.ratios)
    return (
        f"- {ABOUT[best]} it comes to {times} of the KL of {best}, with "
        f"{' / '.join(percents(figures.ratios))} removed ([more](results-other.md))."
    )


def losses(figures: Figures) -> str:
    """Say in one line where the press as it comes is behind."""
    best = _best(figures)
    return f"- {ABOUT[best]} {best} is ahead in {cells(figures.behind(OURS, best))}."


def _means(figures: Figures) -> Iterator[str]:
    heads = " | ".join(f"{ratio} removed" for ratio in percents(figures.ratios))
    yield f"| KL divergence from the full cache, nats | {heads} |"
    yield f"|---|{'---:|' * len(figures.ratios)}"
    ours = [method for method in (OURS, FREE) if method in figures.methods]
    peers = sorted(
        (method for method in figures.methods if method not in ours),
        key=lambda method: figures.mean_kl(method, figures.ratios[0]),
    )
    for method in (*ours, _best(figures), *peers):
        kls = " | ".join(f"{figures.mean_kl(method, ratio):.4f}" for ratio in figures.ratios)
        yield f"| {NAMES.get(method, method)} | {kls} |"


def _tasks(figures: Figures) -> Iterator[str]:
    best = _best(figures)
    yield f"| task | | {' | '.join(f'{r} removed' for r in percents(figures.ratios))} |"
    yield f"|---|---|{'---:|' * len(figures.ratios)}"
    shown = [method for method in (OURS, FREE) if method in figures.methods]
    for task in figures.tasks:
        for method in (*shown, best):
            texts = []
            for ratio in figures.ratios:
                kl = figures.kl(method, ratio, task)
                least = min(figures.kl(other, ratio, task) for other in (*shown, best))
                text = f"**{kl:.4f}**" if kl == least else f"{kl:.4f}"
                if method == best:
                    text += f" {figures.one(best, ratio, task).replace('Press', '')}"
                texts.append(text)
            first = task if method == shown[0] else ""
            yield f"| {first} | {NAMES.get(method, method)} | {' | '.join(texts)} |"


def _scores(rows: Sequence[Row]) -> Iterator[str]:
    """Scores and KL of RULER's tasks, of every method and ratio."""
    found = {
        (row["cell"]["task"], row["cell"]["method"], row["cell"]["ratio"]): row
        for row in rows
        if "error" not in row
    }
    tasks = list(dict.fromkeys(task for task, _, _ in found))
    columns = list(dict.fromkeys((method, ratio) for _, method, ratio in found))
    heads = [
        FULL if method == FULL else f"{NAMES.get(method, method)}, {percents([ratio])[0]} removed"
        for method, ratio in columns
    ]
    yield f"| score of 100, KL | {' | '.join(heads)} |"
    yield f"|---|{'---:|' * len(columns)}"

    def show(scores: Sequence[float], kls: Sequence[float], method: str) -> str:
        text = f"{100 * sum(scores) / len(scores):.0f}"
        return text if method == FULL else f"{text}, {geometric(kls):.3f}"

    for name, own in (*((task, [task]) for task in tasks), ("**all**", tasks)):
        texts = []
        for method, ratio in columns:
            cells = [found[task, method, ratio] for task in own]
            scores, kls = ([row[key] for row in cells] for key in ("score", "kl"))
            texts.append(show(scores, kls, method))
        yield f"| {name} | {' | '.join(texts)} |"


def page(
    seen_rows: Sequence[Row],
    seen_meta: Mapping[str, Any],
    second_rows: Sequence[Row],
    second_meta: Mapping[str, Any],
    made_rows: Sequence[Row],
    made_meta: Mapping[str, Any],
) -> str:
    """Write the page, in Markdown."""
    seen, second = seen_figures(seen_rows), second_figures(second_rows)
    notes = NOTES.read_text(encoding="utf-8")
    intro, about_seen, about_second, about_made = notes.split("\n---\n")
    lines = [
        *intro.strip().splitlines(),
        "",
        "## With the question in the prompt",
        "",
        *about_seen.strip().splitlines(),
        "",
        samples_of(seen),
        "",
        *_means(seen),
        "",
        *_tasks(seen),
        "",
        where(seen_meta),
        "",
        "## A model without calibration",
        "",
        *about_second.strip().splitlines(),
        "",
        samples_of(second),
        "",
        *_means(second),
        "",
        *_tasks(second),
        "",
        where(second_meta),
        "",
        "## RULER's tasks",
        "",
        *about_made.strip().splitlines(),
        "",
        *_scores(made_rows),
        "",
        where(made_meta),
    ]
    return "\n".join(lines) + "\n"


def recorded() -> tuple[Any, ...]:
    """Read the recorded answers, and where they were measured."""
    return tuple(
        found
        for path in (SEEN, SECOND, MADE)
        for found in (
            read_results(path),
            json.loads(path.with_suffix(".meta.json").read_text()),
        )
    )


def recorded_figures() -> tuple[Figures, Figures]:
    """Figures of the recorded answers."""
    return seen_figures(read_results(SEEN)), second_figures(read_results(SECOND))

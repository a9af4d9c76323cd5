"""Quality at equal bytes: pairs in fewer bits, beside peers that are lent the same rows.

The page docs/results-bytes.md, of the recorded answers in benchmarks/results/bytes; what its other
parts are made of is for the first screens, too.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS
from moekv import MoERouterPress

from .metrics import geometric
from .presses import DEFAULT, LENT, LENT_FOLDED, LENT_KVZIP, QUANTISED, STRONG
from .run import FULL, read_results
from .targets import OURS

ANSWERS = RESULTS / "bytes" / "answers.jsonl"
NOTES = Path(__file__).with_name("equal-bytes-notes.md")

RATIOS = (0.75, 0.9, 0.95, 0.98)
(AUTO,) = DEFAULT
UNFOLDED = "moekv pairs=auto"
FORMATS = [OURS, *(name for name in QUANTISED if not name.endswith("auto"))]
BEST = "the best of six one-pass presses of kvpress on each task"
BEST_LENT = "the same six, lent moekv's quantised rows"
BEST_FOLDED = "the same six, lent rows and folding"
KVZIP, KVZIP_LENT = "KVzip, which reads the text twice", "KVzip, lent moekv's quantised rows"
SETS: dict[str, Sequence[str]] = {
    BEST: list(STRONG),
    BEST_LENT: list(LENT),
    BEST_FOLDED: list(LENT_FOLDED),
    KVZIP: ["KVzipPress"],
    KVZIP_LENT: list(LENT_KVZIP),
}

Row = Mapping[str, Any]


def auto(ratio: float) -> str:
    """Name the method that ``pairs="auto"`` stands for on this model."""
    options = MoERouterPress(ratio, pairs="auto")._options()
    return f"moekv pairs={options.in_format((64, 64, torch.bfloat16)).pairs}"


@dataclass
class Figures:
    """Mean KL divergence and bytes of methods, on the samples that all of them have.

    Tasks without such a sample are left out, as are methods that never gave an answer. `sets` are
    names that stand for the best of several methods on each task.
    """

    rows: Sequence[Row]
    methods: Sequence[str]
    ratios: Sequence[float] = RATIOS
    sets: Mapping[str, Sequence[str]] = field(default_factory=lambda: SETS)
    kls: dict[tuple[str, float, str], float] = field(init=False)
    bytes: dict[tuple[str, float, str], float] = field(init=False)
    samples: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        answers: dict[str, dict[int, dict[tuple[str, float], Row]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        for row in self.rows:
            cell = row["cell"]
            if "error" not in row:
                own = answers[cell["task"]][cell["index"]]
                own[cell["method"], cell["ratio"]] = row
        known = {key for own in answers.values() for found in own.values() for key in found}
        self.methods = [m for m in self.methods if any((m, r) in known for r in self.ratios)]
        wanted = {(method, ratio) for method in self.methods for ratio in self.ratios}
        self.kls, self.bytes, self.samples = {}, {}, {}
        for task, own in answers.items():
            whole = [found for found in own.values() if wanted | {(FULL, 0.0)} <= found.keys()]
            if not whole or not wanted:
                continue
            self.samples[task] = len(whole)
            for method, ratio in wanted:
                self.kls[method, ratio, task] = geometric(f[method, ratio]["kl"] for f in whole)
                self.bytes[method, ratio, task] = sum(
                    found[method, ratio]["bytes"] / found[FULL, 0.0]["bytes"] for found in whole
                ) / len(whole)

    @property
    def tasks(self) -> list[str]:
        return list(self.samples)

    def one(self, method: str, ratio: float, task: str) -> str:
        """Name the method behind a name: a set's best on the task."""
        if method not in self.sets:
            return method
        return min(
            (name for name in self.sets[method] if name in self.methods),
            key=lambda name: self.kls[name, ratio, task],
        )

    def has(self, method: str) -> bool:
        """Whether all that a name stands for was measured."""
        return any(name in self.methods for name in self.sets.get(method, [method]))

    def kl(self, method: str, ratio: float, task: str) -> float:
        """Geometric mean over samples of a method's KL, or of the best of a set's."""
        return self.kls[self.one(method, ratio, task), ratio, task]

    def mean_kl(self, method: str, ratio: float) -> float:
        """Geometric mean over samples and tasks."""
        return _mean(self.kl(method, ratio, task) for task in self.tasks)

    def times(self, method: str, other: str, ratio: float) -> tuple[float, float]:
        """KL of a method over that of another: geometric mean over tasks, and the worst task."""
        found = [self.kl(method, ratio, t) / self.kl(other, ratio, t) for t in self.tasks]
        return _mean(found), max(found)

    def behind(self, method: str, other: str) -> list[tuple[str, float]]:
        """Tasks and ratios in which a method's KL is above another's."""
        return [
            (task, ratio)
            for task in self.tasks
            for ratio in self.ratios
            if self.kl(method, ratio, task) > self.kl(other, ratio, task)
        ]

    def held(self, method: str) -> str:
        """Percents of the full cache's bytes at each ratio; least and most where tasks differ."""
        texts = []
        for ratio in self.ratios:
            shares = [self.bytes[self.one(method, ratio, t), ratio, t] for t in self.tasks]
            low, high = (f"{100 * x:.0f}" for x in (min(shares), max(shares)))
            texts.append(low if low == high else f"{low}–{high}")
        return " / ".join(texts)


def _mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def all_figures(rows: Sequence[Row]) -> Figures:
    """Figures of all methods of the page."""
    return Figures(
        rows, [AUTO, UNFOLDED, *FORMATS, *(name for names in SETS.values() for name in names)]
    )


def percents(ratios: Sequence[float]) -> list[str]:
    """Write ratios as shares."""
    return [f"{100 * ratio:.0f} %" for ratio in ratios]


def table(figures: Figures, methods: Sequence[str]) -> Iterator[str]:
    """KL over all tasks and bytes held, a line for each method that was measured."""
    heads = " | ".join(f"{ratio} removed" for ratio in percents(figures.ratios))
    yield f"| KL divergence from the full cache, nats | {heads} | bytes held, % |"
    yield f"|---|{'---:|' * len(figures.ratios)}---|"
    for method in filter(figures.has, methods):
        kls = " | ".join(f"{figures.mean_kl(method, ratio):.4f}" for ratio in figures.ratios)
        yield f"| {label(method)} | {kls} | {figures.held(method)} |"


def label(method: str) -> str:
    """How a table calls a method; ours stand out."""
    if method == OURS:
        return "**moekv**, pairs in 16 bits"
    if not method.startswith("moekv "):
        return method
    if method == AUTO:
        return '**moekv**, `pairs="auto"`'
    return f'**moekv**, `pairs="{method.rpartition("=")[2]}", fold=False`'


def first_table(rows: Sequence[Row]) -> list[str]:
    """Write the table of the first screens, and of how many samples it is."""
    figures = all_figures(rows)
    return [*table(figures, [AUTO, OURS, *SETS]), "", samples_of(figures)]


def cells(found: Sequence[tuple[str, float]]) -> str:
    """Name tasks and ratios."""
    if not found:
        return "none"
    by_task: dict[str, list[float]] = defaultdict(list)
    for task, ratio in found:
        by_task[task].append(ratio)
    return ", ".join(f"{task} at {', '.join(percents(r))}" for task, r in by_task.items())


def _beside(figures: Figures) -> Iterator[str]:
    """Write KL of ``pairs="auto"`` as a multiple of that of others, and where it is behind."""
    heads = " | ".join(f"{ratio} removed" for ratio in percents(figures.ratios))
    yield f"| times the KL divergence of | {heads} | cells in which it is behind |"
    yield f"|---|{'---:|' * len(figures.ratios)}---|"
    for other in filter(figures.has, [UNFOLDED, OURS, *SETS]):
        found = [figures.times(AUTO, other, ratio) for ratio in figures.ratios]
        texts = " | ".join(f"**{mean:.2f}** ({worst:.2f})" for mean, worst in found)
        behind = figures.behind(AUTO, other)
        count = f"{len(behind)} of {len(figures.tasks) * len(figures.ratios)}: "
        yield f"| {label(other)} | {texts} | {count}{cells(behind)} |"


def _formats(figures: Figures) -> Iterator[str]:
    """Compare what each format loses, without folding, with the one that loses least."""
    yield f"| | {' | '.join(f'{ratio} removed' for ratio in percents(figures.ratios))} |"
    yield f"|---|{'---|' * len(figures.ratios)}"
    for method in FORMATS:
        entries = []
        for ratio in figures.ratios:
            best = min(figures.mean_kl(other, ratio) for other in FORMATS)
            least = [min((figures.kl(m, ratio, t), m) for m in FORMATS)[1] for t in figures.tasks]
            entries.append(f"{figures.mean_kl(method, ratio) / best:.2f} ({least.count(method)})")
        yield f"| {label(method)} | {' | '.join(entries)} |"


def _targets(figures: Figures) -> Iterator[str]:
    """Write what was aimed at, and what was measured."""
    yield "| target | measured | |"
    yield "|---|---|---|"
    near = [ratio for ratio in figures.ratios if ratio <= 0.95]
    own = {ratio: figures.times(AUTO, OURS, ratio) for ratio in figures.ratios}
    shares = {
        ratio: [figures.bytes[AUTO, ratio, t] / (1 - ratio) for t in figures.tasks]
        for ratio in figures.ratios
    }
    off = {ratio: max(abs(share - 1) for share in found) for ratio, found in shares.items()}

    def line(what: str, found: Mapping[float, float], most: float, text: str = "{:.2f}") -> str:
        missed = [ratio for ratio, value in found.items() if value > most]
        shown = " / ".join(text.format(value) for value in found.values())
        at = ", ".join(percents(missed))
        return f"| {what} | {shown} | {f'**missed** at {at}' if missed else 'met'} |"

    at = " / ".join(percents(near))
    yield line(f"≤ 0.15 × 16-bit pairs at {at}", {r: own[r][0] for r in near}, 0.15)
    yield line(f"on no task more than with 16-bit pairs, at {at}", {r: own[r][1] for r in near}, 1)
    at = " / ".join(percents(figures.ratios))
    for other, rows in ((BEST_LENT, "in the same rows"), (BEST_FOLDED, "in them and folded")):
        if figures.has(other):
            lent = {ratio: figures.times(AUTO, other, ratio)[0] for ratio in figures.ratios}
            yield line(f"≤ 0.2 × the best peer of each task {rows}, at {at}", lent, 0.2)
    yield from _smallest(figures)
    yield line(f"bytes within 1 % of the ratio, at {at}", off, 0.01, "{:.1%}")


def _smallest(figures: Figures) -> Iterator[str]:
    """Compare caches of 3 and 2 % of the bytes with 16-bit pairs at 10 %."""
    most = figures.mean_kl(OURS, 0.9)
    for ratio in (0.97, 0.98):
        own = Figures(figures.rows, [AUTO], [ratio])
        if own.samples.keys() == figures.samples.keys():
            kl = own.mean_kl(AUTO, ratio)
            (share,), verdict = percents([ratio]), "met" if kl <= most else "**missed**"
            yield f"| at {share} ≤ 16-bit pairs at 90 % | {kl:.4f}, there {most:.4f} | {verdict} |"


def _tasks(figures: Figures) -> Iterator[str]:
    """Write the KL of each task; the least of a ratio in bold."""
    shown = list(filter(figures.has, [AUTO, *FORMATS, *SETS]))
    yield f"| task | | {' | '.join(f'{r} removed' for r in percents(figures.ratios))} |"
    yield f"|---|---|{'---:|' * len(figures.ratios)}"
    for task in figures.tasks:
        for method in shown:
            texts = []
            for ratio in figures.ratios:
                kl = figures.kl(method, ratio, task)
                text = f"{kl:.4f}"
                if kl == min(figures.kl(other, ratio, task) for other in shown):
                    text = f"**{text}**"
                if method in (BEST, BEST_LENT, BEST_FOLDED):
                    name = figures.one(method, ratio, task)
                    text += f" {name.replace(', guarded', '').replace('Press', '')}"
                texts.append(text)
            first = task if method == shown[0] else ""
            yield f"| {first} | {label(method)} | {' | '.join(texts)} |"


def samples_of(figures: Figures) -> str:
    """Say how many tasks and samples there are."""
    least, most = min(figures.samples.values()), max(figures.samples.values())
    count = f"{least}" if least == most else f"{least} to {most}"
    each = "one sample" if most == 1 else f"{count} samples"
    return f"{len(figures.tasks)} tasks of 1,000 tokens, **{each} of each**, without intervals."


def where(meta: Mapping[str, Any]) -> str:
    """Say where answers were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return (
        f"{meta['model']}, {meta['dtype']}, seed {meta['seed']}; {meta['machine']} ({meta['cpu']}, "
        f"{meta['capability']}), {meta['threads']} thread; {versions}; commit {meta['commit']}, "
        f"{meta['date'][:10]}."
    )


def page(rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    """Write the page, in Markdown."""
    figures = all_figures(rows)
    chosen = ", ".join(
        f"{auto(ratio).rpartition('=')[2]} at {share}"
        for ratio, share in zip(figures.ratios, percents(figures.ratios), strict=True)
    )
    failed = sorted({(row["cell"]["method"], row["error"]) for row in rows if "error" in row})
    lines = [
        *NOTES.read_text(encoding="utf-8").splitlines(),
        "",
        f"{samples_of(figures)} A single cell says little, and means over tasks are rough, too.",
        "",
        "## Over all tasks",
        "",
        f'Geometric mean over tasks. `pairs="auto"` is {chosen}. "Lent" is '
        "what kvpress cannot do by itself: its press chooses the pairs, as many more as the rows "
        "make room for, and moekv stores and reads them "
        "(`moekv.ragged(press, pairs=..., fold=...)`).",
        "",
        *table(figures, [AUTO, UNFOLDED, *FORMATS, *SETS]),
        "",
        "## Which format",
        "",
        "Without folding: KL divergence over that of the format of moekv that loses least in the "
        "mean; in brackets on how many tasks a format loses least.",
        "",
        *_formats(figures),
        "",
        '## `pairs="auto"` beside others',
        "",
        "Its KL divergence as a multiple; in brackets that of the task where it is worst.",
        "",
        *_beside(figures),
        "",
        "## Targets",
        "",
        *_targets(figures),
        "",
        "## Task by task",
        "",
        "KL divergence, nats; bold is the least.",
        "",
        *_tasks(figures),
        "",
        "## Peer by peer",
        "",
        *table(figures, [*STRONG, *LENT, *LENT_FOLDED]),
        *(f"\n{method} failed: `{error}`." for method, error in failed),
        "",
        "## Where it was measured",
        "",
        where(meta),
    ]
    return "\n".join(lines) + "\n"


def recorded() -> tuple[list[Row], dict[str, Any]]:
    """Read the recorded answers, and where they were measured."""
    return read_results(ANSWERS), json.loads(ANSWERS.with_suffix(".meta.json").read_text())

"""What was aimed at, and what the answers say about it.

Every comparison is of the same samples. Intervals are 95 % intervals of ratios of KL divergence,
paired sample by sample (``metrics``): behind within the interval is who is behind in the mean, by a
ratio whose interval includes 1. The best of many others is picked on the samples on which it is
compared, which favours them: no interval takes that into account.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import Mean, geometric, log_kl, mean
from .metrics import over_tasks as mean_over_tasks
from .presses import PEERS
from .run import FULL

OURS, FREE = "moekv", "moekv training-free"
PROBE = "moekv, hidden states alone"
RATIOS = (0.25, 0.5, 0.75, 0.9)

Row = dict[str, Any]
Answers = dict[str, dict[str, dict[int, Row]]]  # by task, method and index


def answers_at(rows: Sequence[Row], length: int, ratio: float) -> Answers:
    """Find the answers of a length and a ratio, and those of the full cache."""
    found: Answers = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cell = row["cell"]
        wanted = cell["ratio"] == ratio or cell["method"] == FULL
        if "error" not in row and cell["length"] == length and wanted:
            found[cell["task"]][cell["method"]][cell["index"]] = row
    return found


def mean_kl(answers: dict[int, Row], indices: Iterable[int]) -> float:
    """Geometric mean of the KL of samples."""
    return geometric(answers[i]["kl"] for i in indices)


def log_ratio(own: dict[int, Row], other: dict[int, Row], indices: Iterable[int]) -> Mean:
    """Mean of log(KL / KL of the other), sample by sample."""
    return mean([log_kl(own[i]["kl"]) - log_kl(other[i]["kl"]) for i in indices])


def shown(ratio: Mean, digits: int) -> str:
    """Write a log ratio as a ratio, with its interval where there is one."""
    text, interval = f"{math.exp(ratio.value):.{digits}f}", ratio.interval()
    if interval is None:
        return text
    low, high = (math.exp(x) for x in interval)
    return f"{text} ({low:.2f} to {high:.2f})"


@dataclass
class Comparison:
    """A method beside the best of others, on one task at one ratio."""

    task: str
    ratio: float
    kl: float
    best: str
    best_kl: float
    log_ratio: Mean  # to the best
    samples: int

    @property
    def behind(self) -> bool:
        return self.kl > self.best_kl

    @property
    def surely_behind(self) -> bool:
        interval = self.log_ratio.interval()
        return self.behind and interval is not None and interval[0] > 0

    def __str__(self) -> str:
        return (
            f"{self.task} at {self.ratio:.0%} ({self.kl:.4f}; {self.best} {self.best_kl:.4f}; "
            f"ratio {shown(self.log_ratio, 2)})"
        )


def compare(
    rows: Sequence[Row], length: int, ratio: float, method: str, others: Iterable[str]
) -> list[Comparison]:
    """Compare a method with the best of others on each task, on the samples that most have."""
    result = []
    for task, table in answers_at(rows, length, ratio).items():
        own = table.get(method, {})
        shared = {other: sorted(own.keys() & table[other].keys()) for other in others}
        indices = max(shared.values(), key=len, default=[])
        if not indices:
            continue
        kls = {
            other: mean_kl(table[other], indices) for other in shared if shared[other] == indices
        }
        best = min(kls, key=lambda other: kls[other])
        logs = log_ratio(own, table[best], indices)
        kl = mean_kl(own, indices)
        result.append(Comparison(task, ratio, kl, best, kls[best], logs, len(indices)))
    return result


def over_tasks(found: Sequence[Comparison]) -> Mean:
    """Mean over tasks of the logs of the ratios."""
    return mean_over_tasks([c.log_ratio for c in found])


PARTS = {
    "moekv": "as it comes",
    "moekv, all parts": "all parts, fitted again",
    "moekv, even gates": "even gates: every token trusts `learned` and `expected` alike",
    "moekv, learned alone": "`learned` alone (also: one expert a token)",
    "moekv, hidden states alone": "hidden states alone, fitted: a linear probe",
    "moekv, learned without hidden states": "`learned` without hidden states",
    "moekv, learned without places": "`learned` without places",
    "moekv, learned without keys": "`learned` without keys",
    "moekv, and selective": "and `selective`, three experts a token",
    "moekv, and semantic": "and `semantic`, three experts a token",
    "moekv, and temporal": "and `temporal`, three experts a token",
    "moekv, all experts, top-k 3": "all five, three experts a token",
    "moekv, no load balancing": "no load-balancing loss",
    "moekv, one domain": "one domain: gates see what the fit knows",
    "moekv, scales not fitted": "`expected` on a scale of its own: its offset not fitted",
    "moekv budget=head": 'one budget a layer (`budget="head"`)',
    "moekv budget=uniform": 'one budget a head (`budget="uniform"`)',
    "moekv training-free": "training-free",
}
"""Methods that lack a part of the calibrated press, or have one more, by the names of the page."""

KEPT = {
    "moekv": "as it comes: the first 4 and the last 16 positions stay",
    "moekv sinks=0": "no sinks",
    "moekv recent=0": "no recent positions",
}
"""Methods without what stays in any case."""


def parts(
    rows: Sequence[Row], names: dict[str, str], samples: int, ratios: Sequence[float]
) -> list[str]:
    """Write the geometric mean of KL over the first samples of each task, as a markdown table."""
    kls: dict[tuple[str, float], list[float]] = defaultdict(list)
    length = min(row["cell"]["length"] for row in rows)
    for row in rows:
        cell = row["cell"]
        if "error" not in row and cell["length"] == length and cell["index"] < samples:
            kls[cell["method"], cell["ratio"]].append(row["kl"])
    lines = [
        f"| calibrated press | {' | '.join(f'{ratio:.0%}' for ratio in ratios)} |",
        f"|---|{'---:|' * len(ratios)}",
    ]
    for method, name in names.items():
        if all(kls[method, ratio] for ratio in ratios):
            texts = [f"{geometric(kls[method, ratio]):.4f}" for ratio in ratios]
            lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def _verdict(missed: object, what: str = "") -> str:
    return f"**missed** {what}".strip() if missed else "met"


def _each(found: Sequence[Comparison]) -> tuple[str, str]:
    """Say on how many tasks and ratios a method is not behind, and where it is."""
    behind = [c for c in found if c.behind]
    surely = [c for c in behind if c.surely_behind]
    text = f"{len(found) - len(behind)} of {len(found)} cells"
    if behind:
        text += f"; behind in {', '.join(map(str, behind))}"
    if not behind:
        return text, "met"
    if not surely:
        return text, "met within the intervals"
    return text, f"**missed** in {len(surely)} beyond the intervals"


def _exact(rows: Sequence[Row], length: int) -> tuple[str, str]:
    """Compare exact answers with the full cache's, where that has half of a task right."""
    texts, missed = [], []
    for ratio, points in ((0.5, 1), (0.75, 3), (0.9, 15)):
        ours = whole = 0
        for task, table in answers_at(rows, length, ratio).items():
            indices = sorted(table[FULL].keys() & table[OURS].keys())
            full = sum(table[FULL][i]["exact"] for i in indices)
            if not indices or 2 * full < len(indices):
                continue
            own = sum(table[OURS][i]["exact"] for i in indices)
            ours, whole = ours + own, whole + full
            if 100 * (full - own) > points * len(indices):
                missed.append(f"{task} at {ratio:.0%}: {own} of {full}")
        texts.append(f"{ours} of {whole}")
    return " / ".join(texts), _verdict(missed, f"({'; '.join(missed)})")


def _at_length(rows: Sequence[Row], length: int, first: int) -> list[tuple[str, str, str]]:
    """Compare the advantage at a length with that at the first, over the same tasks and peers."""
    texts, lost, surely = [], [], []
    for ratio in RATIOS:
        cells = (r["cell"] for r in rows if "error" not in r)
        here = {c["method"] for c in cells if (c["length"], c["ratio"]) == (length, ratio)}
        peers = [name for name in PEERS if name in here]
        own = compare(rows, length, ratio, OURS, peers)
        tasks = {c.task for c in own}
        short = [c for c in compare(rows, first, ratio, OURS, peers) if c.task in tasks]
        if not own or not short:
            continue
        there, before = over_tasks(own), over_tasks(short).value
        texts.append(f"{shown(there, 3)} at {ratio:.0%}, there {math.exp(before):.2f}")
        if there.value > before:
            interval = there.interval()
            beyond = interval is None or interval[0] > before
            (surely if beyond else lost).append(f"{ratio:.0%}")
    if not texts:
        return []
    verdict = "met within the intervals" if lost and not surely else ""
    aim = f"× the best peer's of each task at {length} tokens, no more than at {first}"
    return [(aim, "; ".join(texts), verdict or _verdict(surely, f"at {', '.join(surely)}"))]


def targets(rows: Sequence[Row], overall: Sequence[dict[str, Any]]) -> list[str]:
    """Write the targets as a markdown table: aim, measured, met or missed.

    Parameters
    ----------
    rows : sequence of dict
        The answers.
    overall : sequence of dict
        Of :func:`benchmarks.quality.report.overall`.
    """
    lengths = sorted({row["cell"]["length"] for row in rows if row["cell"]["method"] == OURS})
    if not lengths:
        return []
    first = lengths[0]
    lines: list[tuple[str, str, str]] = []

    def all_ratios(method: str, others: Iterable[str]) -> list[Comparison]:
        return [c for ratio in RATIOS for c in compare(rows, first, ratio, method, others)]

    def means(found: Sequence[Comparison]) -> dict[float, Mean]:
        ratios = sorted({c.ratio for c in found})
        return {r: over_tasks([c for c in found if c.ratio == r]) for r in ratios}

    def show(by_ratio: dict[float, Mean]) -> str:
        return " / ".join(f"{shown(logs, 3)} at {r:.0%}" for r, logs in by_ratio.items())

    if peers := all_ratios(OURS, PEERS):
        lines.append(("≤ the best single-prefill peer's, on each task", *_each(peers)))
        by_ratio = means(peers)
        missed = [f"{r:.0%}" for r, logs in by_ratio.items() if logs.value > math.log(0.2)]
        aim = "≤ 0.2 × the best peer's of each task, geometric mean"
        lines.append((aim, show(by_ratio), _verdict(missed, f"at {', '.join(missed)}")))
    if probe := all_ratios(OURS, [PROBE]):
        lines.append(("≤ the linear probe's, on each task", *_each(probe)))
        aim = "the same, geometric mean"
        by_ratio = means(probe)
        lines.append((aim, show(by_ratio), _verdict([d for d in by_ratio.values() if d.value > 0])))
    if anchor := all_ratios(OURS, ["KVzipPress"]):
        by_ratio = means(anchor)
        verdict = _verdict([logs for logs in by_ratio.values() if logs.value > 0])
        lines.append(("≤ KVzip's, geometric mean", show(by_ratio), verdict))
    aim = "exact answers of the full cache that remain at 50 / 75 / 90 %"
    lines.append((aim, *_exact(rows, first)))
    for length in lengths[1:]:
        lines += _at_length(rows, length, first)
    here = [o for o in overall if o["length"] == first and "regret" in o]
    texts, missed = [], []
    for ratio in sorted({o["ratio"] for o in here}):
        regrets = {o["method"]: o["regret"] for o in here if o["ratio"] == ratio}
        least = min((n for n in regrets if n in PEERS), key=lambda n: regrets[n], default=None)
        if FREE in regrets and least is not None:
            texts.append(f"{math.exp(regrets[FREE]):.2f}, {math.exp(regrets[least]):.2f} ({least})")
            missed += [ratio] * (regrets[FREE] >= regrets[least])
    if texts:
        aim = "training-free: mean regret lower than that of every peer"
        lines.append((aim, " / ".join(texts), _verdict(missed)))
    table = ["| target | measured | |", "|---|---|---|"]
    return [*table, *(f"| {' | '.join(line)} |" for line in lines)]

"""What was aimed at, and what the answers say about it.

Every comparison is of the same samples. Intervals are 95 % bootstrap intervals of ratios of mean KL
divergence, for which samples of a task are drawn for both sides alike: behind within the interval
is who is behind in the mean, by a ratio whose interval includes 1.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .metrics import LEAST_KL, draws, middle
from .presses import EXPERTS, PEERS
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


def mean_kl(answers: dict[int, Row], indices: Sequence[int], resamples: int = 500) -> Tensor:
    """Mean KL [1 + resamples] of samples, then of draws from them; the same draws for all."""
    own = torch.tensor([answers[i]["kl"] for i in indices], dtype=torch.float64)
    means = torch.cat([own.mean(0, keepdim=True), own[draws(len(own), resamples)].mean(1)])
    return means.clamp(min=LEAST_KL)


@dataclass
class Comparison:
    """A method beside the best of others, on one task at one ratio."""

    task: str
    ratio: float
    kl: float
    best: str
    best_kl: float
    logs: Tensor  # [1 + resamples], log(KL / KL of the best)
    samples: int

    @property
    def behind(self) -> bool:
        return self.kl > self.best_kl

    @property
    def surely_behind(self) -> bool:
        return self.behind and middle(self.logs[1:])[0] > 0

    def __str__(self) -> str:
        low, high = (math.exp(x) for x in middle(self.logs[1:]))
        return (
            f"{self.task} at {self.ratio:.0%} ({self.kl:.4f}; {self.best} {self.best_kl:.4f}; "
            f"ratio {low:.2f} to {high:.2f})"
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
        ours = mean_kl(own, indices)
        best = min(kls, key=lambda other: kls[other][0].item())
        logs = ours.log() - torch.stack(list(kls.values())).amin(0).log()
        kl, best_kl = ours[0].item(), kls[best][0].item()
        result.append(Comparison(task, ratio, kl, best, best_kl, logs, len(indices)))
    return result


def over_tasks(found: Sequence[Comparison]) -> Tensor:
    """Geometric mean over tasks of the ratios [1 + resamples]."""
    return torch.stack([c.logs for c in found]).mean(0).exp()


def _ratio(draws: Tensor) -> str:
    low, high = middle(draws[1:])
    return f"{draws[0]:.3f} ({low:.2f} to {high:.2f})"


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


def _beside_experts(rows: Sequence[Row], length: int) -> list[tuple[str, str, str]]:
    """Compare the training-free press with its experts alone."""
    ahead = cells = 0
    for ratio in RATIOS:
        for table in answers_at(rows, length, ratio).values():
            experts = [name for name in EXPERTS if name in table]
            common = set.intersection(*(set(table[name]) for name in [FREE, *experts]))
            if len(experts) < 2 or not common:
                continue
            indices = sorted(common)
            kls = [mean_kl(table[name], indices)[0].item() for name in experts]
            own = mean_kl(table[FREE], indices)[0].item()
            cells += 1
            ahead += own <= statistics.median(kls)
    if not cells:
        return []
    lines = [
        (
            "training-free ≤ the median of its experts alone, on each task",
            f"{ahead} of {cells} cells",
            _verdict(cells - ahead),
        )
    ]
    ratios = {}
    for name in EXPERTS:
        pairs = [c for ratio in RATIOS for c in compare(rows, length, ratio, FREE, [name])]
        if pairs:
            ratios[name] = over_tasks(pairs), min(c.samples for c in pairs)
    closest = max(ratios, key=lambda name: ratios[name][0][0].item())
    draws, samples = ratios[closest]
    lines.append(
        (
            "training-free ≤ its best expert alone, in the mean regret",
            f"{_ratio(draws)} times the KL of {closest}, {samples} samples of each task",
            _verdict(draws[0] > 1),
        )
    )
    return lines


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
        there, before = over_tasks(own), over_tasks(short)[0]
        texts.append(f"{_ratio(there)} at {ratio:.0%}, there {before:.2f}")
        if there[0] > before:
            (surely if middle(there[1:])[0] > before else lost).append(f"{ratio:.0%}")
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

    def means(found: Sequence[Comparison]) -> dict[float, Tensor]:
        ratios = sorted({c.ratio for c in found})
        return {r: over_tasks([c for c in found if c.ratio == r]) for r in ratios}

    def show(by_ratio: dict[float, Tensor]) -> str:
        return " / ".join(f"{_ratio(draws)} at {r:.0%}" for r, draws in by_ratio.items())

    if peers := all_ratios(OURS, PEERS):
        lines.append(("≤ the best single-prefill peer's, on each task", *_each(peers)))
        by_ratio = means(peers)
        missed = [f"{r:.0%}" for r, draws in by_ratio.items() if draws[0] > 0.2]
        aim = "≤ 0.2 × the best peer's of each task, geometric mean"
        lines.append((aim, show(by_ratio), _verdict(missed, f"at {', '.join(missed)}")))
    if probe := all_ratios(OURS, [PROBE]):
        lines.append(("≤ the linear probe's, on each task", *_each(probe)))
        aim = "the same, geometric mean"
        by_ratio = means(probe)
        lines.append((aim, show(by_ratio), _verdict([d for d in by_ratio.values() if d[0] > 1])))
    if anchor := all_ratios(OURS, ["KVzipPress"]):
        by_ratio = means(anchor)
        verdict = _verdict([draws for draws in by_ratio.values() if draws[0] > 1])
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
    lines += _beside_experts(rows, first)
    table = ["| target | measured | |", "|---|---|---|"]
    return [*table, *(f"| {' | '.join(line)} |" for line in lines)]

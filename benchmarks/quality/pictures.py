"""The three pictures of docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import equal_bytes
from .equal_bytes import AUTO, BEST_LENT, KVZIP, KVZIP_LENT, Figures, percents
from .presses import PEERS
from .report import overall
from .targets import OURS, compare

Rows = Sequence[dict[str, Any]]

LENGTH = 1000
BEST_NAME = "best one-pass press of kvpress on each task"
NAMED = {
    OURS: ("moekv, pairs in 16 bits", "C3", "-"),
    BEST_NAME: (BEST_NAME, "C0", "--"),
    "KVzipPress": ("KVzip, reads the text twice", "C2", "-"),
}


def _curves(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """Ratio and KL of every method that has answered all tasks, and of the best of each task."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in overall([row for row in rows if row["cell"]["length"] == LENGTH]):
        method, ratio, kl = (entry[name] for name in ("method", "ratio", "kl"))
        if method in PEERS or method in NAMED:
            curves.setdefault(method, []).append((ratio, kl))
        if method == OURS and "regret" in entry:
            best = ratio, kl / math.exp(entry["regret"])
            curves.setdefault(BEST_NAME, []).append(best)
    return curves


def _draw_curves(axis: Any, curves: dict[str, list[tuple[float, float]]]) -> list[float]:
    """Draw presses in grey and the named ones in colour; return the ratios."""
    ratios = sorted({ratio for points in curves.values() for ratio, _ in points})
    others = [method for method in curves if method not in NAMED]
    for method in [*others, *(method for method in NAMED if method in curves)]:
        name, color, style = NAMED.get(method, ("every press of kvpress", "0.8", "-"))
        points = [(ratios.index(ratio), kl) for ratio, kl in sorted(curves[method])]
        own = {"color": color, "linestyle": style, "linewidth": 1.0 + (method in NAMED)}
        shown = name if method in NAMED or method == others[0] else None
        axis.plot(*zip(*points, strict=True), **own, marker="o", markersize=4, label=shown)
    return ratios


def _finish(figure: Any, axes: Sequence[Any], path: Path, room: float) -> Path:
    """Put one legend below all axes, and write the picture."""
    found = [axis.get_legend_handles_labels() for axis in axes]
    unique = {x: h for handles, labels in found for h, x in zip(handles, labels, strict=True)}
    place = {"loc": "lower center", "ncols": 2, "frameon": False, "fontsize": 9}
    figure.legend(unique.values(), unique.keys(), **place)
    figure.tight_layout(rect=(0, room, 1, 1))
    figure.savefig(path, dpi=130)
    return path


def _label(axis: Any, removed: Sequence[float], title: str) -> None:
    axis.set_xticks(range(len(removed)), percents(removed))
    axis.set(yscale="log", xlabel="share of the cache removed")
    axis.set_title(title, fontsize=11)
    axis.grid(axis="y", color="0.93")
    axis.spines[["top", "right"]].set_visible(False)


def first_picture(rows: Rows, in_bytes: Rows, path: Path) -> Path:
    """Draw KL over the share removed, of pairs in 16 bits and in the same bytes."""
    import matplotlib.pyplot as plt

    figures = equal_bytes.all_figures(in_bytes)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.0), sharey=True)
    ratios = _draw_curves(left, _curves(rows))
    in_bytes_too = {
        AUTO: ('moekv, pairs="auto"', "C1", "-"),
        OURS: NAMED[OURS],
        equal_bytes.BEST: NAMED[BEST_NAME],
        BEST_LENT: ("the same of six, lent moekv's rows", "C4", "--"),
        KVZIP: NAMED["KVzipPress"],
        KVZIP_LENT: ("KVzip, lent moekv's rows", "C5", "-"),
    }
    for method, (name, color, style) in in_bytes_too.items():
        if figures.has(method):
            points = [(x, figures.mean_kl(method, r)) for x, r in enumerate(figures.ratios)]
            own = {"color": color, "linestyle": style, "linewidth": 2.0, "markersize": 4}
            right.plot(*zip(*points, strict=True), **own, marker="o", label=name)
    _label(left, ratios, "in as many pairs of 16 bits (ten tasks)")
    _label(right, figures.ratios, f"in the same bytes ({len(figures.tasks)} tasks)")
    left.set_ylabel("KL divergence, nats (less is better)")
    return _finish(figure, (left, right), path, 0.17)


def questions_picture(rows: Rows, seen: Figures, path: Path) -> Path:
    """Draw KL over the share removed where the question is not seen and where it is.

    Of the same tasks and, where the question is not seen, of all presses.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.8), sharey=True)
    same = [row for row in rows if row["cell"]["task"] in seen.tasks]
    ratios = _draw_curves(left, _curves(same))
    (best,) = seen.sets
    curves = {
        BEST_NAME if method == best else method: [(r, seen.mean_kl(method, r)) for r in seen.ratios]
        for method in [*seen.methods, best]
        if method == best or method in PEERS or method in NAMED or method in seen.sets[best]
    }
    _label(left, ratios, f"question not seen ({len(seen.tasks)} tasks)")
    _label(right, _draw_curves(right, curves), "question in the prompt (the same tasks)")
    left.set_ylabel("KL divergence, nats (less is better)")
    return _finish(figure, (left, right), path, 0.15)


def tasks_picture(rows: Rows, path: Path) -> Path:
    """Draw each task's KL as a multiple of that of its best one-pass press, with intervals."""
    import matplotlib.pyplot as plt

    ratios = (0.5, 0.75, 0.9)
    figure, axes = plt.subplots(1, len(ratios), figsize=(8.6, 4.2), sharex=True, sharey=True)
    for axis, ratio in zip(axes, ratios, strict=True):
        for shift, method in ((-0.15, OURS), (0.15, "KVzipPress")):
            name, color, _ = NAMED[method]
            for place, found in enumerate(compare(rows, LENGTH, ratio, method, PEERS)):
                middle, interval = math.exp(found.log_ratio.value), found.log_ratio.interval()
                if interval is not None:
                    ends = [math.exp(x) for x in interval]
                    axis.plot(ends, [place + shift] * 2, color=color, linewidth=1.0, alpha=0.6)
                label = name if place == 0 else None
                own = {"color": color, "linestyle": "", "markersize": 5, "label": label}
                axis.plot([middle], [place + shift], marker="o", **own)
        tasks = [found.task for found in compare(rows, LENGTH, ratio, OURS, PEERS)]
        axis.axvline(1.0, color="C0", linestyle="--", linewidth=1.2)
        axis.set_yticks(range(len(tasks)), tasks)
        axis.set(xscale="log", xlim=(3e-3, 30))
        axis.set_title(f"{percents([ratio])[0]} removed", fontsize=11)
        axis.grid(axis="x", color="0.93")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[1].set_xlabel("KL divergence as a multiple of the best one-pass press's (left is better)")
    return _finish(figure, axes, path, 0.07)


def draw_all(rows: Rows, in_bytes: Rows, seen: Figures, folder: Path) -> list[Path]:
    """Write the pictures of docs/results.md to a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = [
        first_picture(rows, in_bytes, folder / "first-screen.png"),
        tasks_picture(rows, folder / "results-tasks.png"),
        questions_picture(rows, seen, folder / "results-questions.png"),
    ]
    plt.close("all")
    return paths

"""Turn a run's lines into one summary: JSON, a markdown page and plots."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .metrics import bootstrap
from .presses import ANCHORS, EXCLUDED, EXPERTS, METHODS, PEERS
from .run import FULL, read_results

LEAST_KL = 1e-3  # nats: regrets below it would compare rounding


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average rows over samples, with bootstrap 95 % intervals.

    Returns
    -------
    dict
        `cells`: for each task, length, method and ratio the means of `kl`, `nll`, `exact`, their
        intervals, and the measured shares of pairs and bytes; `errors`: for each method the first
        error and how many answers it cost.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    errors: dict[str, dict[str, Any]] = {}
    full_bytes = {}
    for row in rows:
        cell = row["cell"]
        if "error" in row:
            error = errors.setdefault(cell["method"], {"error": row["error"], "answers": 0})
            error["answers"] += 1
            continue
        if cell["method"] == FULL:
            full_bytes[cell["task"], cell["length"], cell["index"]] = row["bytes"]
        key = cell["task"], cell["length"], cell["method"], cell["ratio"]
        groups[key].append(row)
    cells = []
    for (task, length, method, ratio), group in groups.items():
        summary: dict[str, Any] = {
            "task": task,
            "length": length,
            "method": method,
            "ratio": ratio,
            "samples": len(group),
        }
        for metric in ("kl", "nll", "exact"):
            values = [float(row[metric]) for row in group]
            summary[metric] = sum(values) / len(values)
            summary[f"{metric}_interval"] = bootstrap(values)
        summary["kept"] = sum(row["kept"] for row in group) / sum(row["pairs"] for row in group)
        whole = sum(full_bytes[task, length, row["cell"]["index"]] for row in group)
        summary["bytes"] = sum(row["bytes"] for row in group) / whole
        summary["seconds"] = sum(row["seconds"] for row in group) / len(group)
        cells.append(summary)
    return {"cells": cells, "errors": errors}


def regrets(cells: Sequence[dict[str, Any]]) -> dict[tuple[str, float], float]:
    """Mean over tasks of log(KL / KL of the task's best peer), for each method and ratio.

    0 is as good as the best single-prefill peer of every task. Methods that lack a task have none.
    """
    table = {(c["task"], c["length"], c["method"], c["ratio"]): c["kl"] for c in cells}
    columns = sorted({(task, length) for task, length, _, _ in table})
    result = {}
    for method, ratio in sorted({(m, r) for _, _, m, r in table if m != FULL}):
        logs = []
        for task, length in columns:
            peers = [
                table[task, length, p, ratio] for p in PEERS if (task, length, p, ratio) in table
            ]
            own = table.get((task, length, method, ratio))
            if peers and own is not None:
                logs.append(math.log(max(own, LEAST_KL) / max(min(peers), LEAST_KL)))
        if logs and len(logs) == len(columns):
            result[method, ratio] = sum(logs) / len(logs)
    return result


def markdown(summary: dict[str, Any]) -> str:
    """Write the tables."""
    cells, meta = summary["cells"], summary["meta"]
    ratios = sorted({c["ratio"] for c in cells} - {0.0})
    methods = [m for m in METHODS if any(c["method"] == m for c in cells)]
    removed = " / ".join(f"{ratio:.0%}" for ratio in ratios)
    lines = [
        "# Quality of compressed caches",
        "",
        f"{meta['model']}, {meta['dtype']}, seed {meta['seed']}; {meta['machine']}; "
        f"{', '.join(f'{k} {v}' for k, v in meta['versions'].items())}; commit {meta['commit']}.",
        "",
        "The question is unseen when the context is compressed. Bold: the best method that needs "
        "one prefill and is not moekv. Anchors, which read the context again: "
        f"{', '.join(ANCHORS)}.",
    ]
    for length in sorted({c["length"] for c in cells}):
        here = [c for c in cells if c["length"] == length]
        tasks = list(dict.fromkeys(c["task"] for c in here))
        found = {(c["task"], c["method"], c["ratio"]): c for c in here}
        samples = {c["samples"] for c in here}
        count = f"{min(samples)}" if len(samples) == 1 else f"{min(samples)} to {max(samples)}"
        lines += ["", f"## Contexts of about {length} tokens, {count} samples a task", ""]
        for metric, title, digits in (
            ("kl", "KL divergence from the full cache, nats per answer token", 3),
            ("exact", "Exact match", 2),
            ("nll", "Negative log-likelihood of the answer, nats per token", 2),
        ):
            lines += [f"### {title}", "", f"At {removed} removed.", ""]
            lines += _table(found, tasks, methods, ratios, metric, digits)
            lines.append("")
        lines += ["### Kept, measured: share of pairs, share of bytes", ""]
        lines += ["| method | " + " | ".join(f"{r:.0%} removed" for r in ratios) + " |"]
        lines += ["|---" * (len(ratios) + 1) + "|"]
        for method in methods:
            row = []
            for ratio in ratios:
                own = [found[t, method, ratio] for t in tasks if (t, method, ratio) in found]
                row.append(
                    f"{sum(c['kept'] for c in own) / len(own):.3f}, "
                    f"{sum(c['bytes'] for c in own) / len(own):.3f}"
                    if own
                    else "–"
                )
            lines.append(f"| {method} | " + " | ".join(row) + " |")
    lines += ["", "## Regret: mean over tasks of log(KL / KL of the best peer)", ""]
    regret = regrets(cells)
    lines += ["| method | " + " | ".join(f"{r:.0%} removed" for r in ratios) + " |"]
    lines += ["|---" * (len(ratios) + 1) + "|"]
    for method in methods:
        row = [f"{regret[method, r]:.2f}" if (method, r) in regret else "–" for r in ratios]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    if summary["errors"]:
        lines += ["", "## Methods that failed", ""]
        lines += [
            f"- **{method}** ({e['answers']} answers): `{e['error']}`"
            for method, e in summary["errors"].items()
        ]
    lines += ["", "## Not in the table", ""]
    lines += [f"- {name}: {why}" for name, why in EXCLUDED.items()]
    return "\n".join(lines) + "\n"


def _table(
    found: dict[tuple[str, str, float], dict[str, Any]],
    tasks: Sequence[str],
    methods: Sequence[str],
    ratios: Sequence[float],
    metric: str,
    digits: int,
) -> list[str]:
    sign = -1 if metric == "exact" else 1
    best = {
        (task, ratio): min(
            (round(sign * found[task, m, ratio][metric], digits))
            for m in methods
            if m in PEERS and (task, m, ratio) in found
        )
        for task in tasks
        for ratio in ratios
        if any(m in PEERS and (task, m, ratio) in found for m in methods)
    }

    def show(task: str, method: str, ratio: float) -> str:
        if (task, method, ratio) not in found:
            return "–"
        value = found[task, method, ratio][metric]
        text = f"{value:.{digits}f}"
        bold = method in PEERS and round(sign * value, digits) == best[task, ratio]
        return f"**{text}**" if bold else text

    rows = ["| method | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    if metric != "kl":
        rows.append(f"| {FULL} | " + " | ".join(show(t, FULL, 0.0) for t in tasks) + " |")
    for method in methods:
        entries = (" / ".join(show(task, method, r) for r in ratios) for task in tasks)
        rows.append(f"| {method} | " + " | ".join(entries) + " |")
    return rows


def plot(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Draw KL over ratio for each task, and regrets; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = summary["cells"]
    paths = []
    for length in sorted({c["length"] for c in cells}):
        here = [c for c in cells if c["length"] == length and c["method"] != FULL]
        tasks = list(dict.fromkeys(c["task"] for c in here))
        figure, axes = plt.subplots(
            2,
            math.ceil(len(tasks) / 2),
            figsize=(3.2 * math.ceil(len(tasks) / 2), 6),
            squeeze=False,
        )
        for task, axis in zip(tasks, axes.flat, strict=False):
            for method in dict.fromkeys(c["method"] for c in here):
                line = sorted(
                    (c["ratio"], c["kl"])
                    for c in here
                    if (c["task"], c["method"]) == (task, method)
                )
                label, color, width = _style(method)
                axis.plot(*zip(*line, strict=True), label=label, color=color, linewidth=width)
            axis.set(title=task, yscale="log", xlabel="removed", ylabel="KL, nats")
        for axis in axes.flat[len(tasks) :]:
            axis.set_axis_off()
        handles, labels = axes.flat[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="upper right")
        figure.tight_layout()
        paths.append(folder / f"kl-{length}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)

    regret = regrets(cells)
    for ratio in sorted({r for _, r in regret}):
        ranked = sorted(((v, m) for (m, r), v in regret.items() if r == ratio), reverse=True)
        figure, axis = plt.subplots(figsize=(7, 0.28 * len(ranked) + 1))
        axis.barh([m for _, m in ranked], [v for v, _ in ranked], color="0.7")
        for bar, (_, method) in zip(axis.patches, ranked, strict=True):
            bar.set_color(_style(method)[1])
        axis.set(xlabel=f"mean log(KL / best peer's KL), {ratio:.0%} removed")
        figure.tight_layout()
        paths.append(folder / f"regret-{round(100 * ratio)}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


def _style(method: str) -> tuple[str, str, int]:
    """Label, colour and width of a method's line."""
    if method.startswith("moekv"):
        return "moekv", "C3", 2
    if method in EXPERTS:
        return "single experts", "C1", 1
    return ("anchors", "C0", 2) if method in ANCHORS else ("peers", "0.7", 1)


def write_report(results: Path, folder: Path) -> list[Path]:
    """Read `results` and its `.meta.json`; write summary.json, results.md and plots to `folder`."""
    summary = summarise(read_results(results))
    summary["meta"] = json.loads(results.with_suffix(".meta.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "summary.json", folder / "results.md"]
    paths[0].write_text(json.dumps(summary, indent=1) + "\n")
    paths[1].write_text(markdown(summary))
    return paths + plot(summary, folder)

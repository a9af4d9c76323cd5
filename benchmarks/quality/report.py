"""Turn a run's lines into one summary: JSON, a markdown page and plots."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekv.calibration.router import SHIPPED

from .history import table
from .metrics import Mean, exponential, log_kl, mean, over_tasks, share_interval
from .presses import ANCHORS, EXCLUDED, EXPERTS, METHODS, PEERS
from .run import FULL, read_results
from .targets import KEPT, PARTS, RATIOS, parts, targets

NOTES = Path(__file__).with_name("results-notes.md")
CALIBRATION = "quality-calibration"
METRICS = ("kl", "tv", "nll", "exact", "score")
RISING = ("exact", "score")
"""Of which more is better."""


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average rows over samples, with 95 % intervals; of one sample there is none.

    Returns
    -------
    dict
        `cells`: for each task, length, method and ratio the geometric mean of `kl`, the means of
        `nll`, `exact`, and of `score` where the task has one, their intervals, and the measured
        shares of pairs and bytes;
        `errors`: for each method the first error and how many answers it cost.
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
        for metric in METRICS:
            if any(metric not in row for row in group):  # answers of before it was measured
                continue
            values = [float(row[metric]) for row in group]
            summary[metric], summary[f"{metric}_interval"] = _averaged(metric, values)
        summary["kept"] = sum(row["kept"] for row in group) / sum(row["pairs"] for row in group)
        whole = sum(full_bytes[task, length, row["cell"]["index"]] for row in group)
        summary["bytes"] = sum(row["bytes"] for row in group) / whole
        summary["seconds"] = sum(row["seconds"] for row in group) / len(group)
        cells.append(summary)
    return {"cells": cells, "errors": errors}


def _averaged(metric: str, values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Average a metric over samples, with its interval."""
    if metric == "exact":
        return sum(values) / len(values), share_interval(round(sum(values)), len(values))
    if metric != "kl":
        found = mean(values)
        return found.value, found.interval()
    found = mean([log_kl(kl) for kl in values])
    return math.exp(found.value), exponential(found.interval())


def overall(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare methods over all tasks of a length.

    Returns
    -------
    list of dict
        For each length, method and ratio that has all tasks: `kl`, the geometric mean of KL over
        samples and tasks; `regret`, the mean over tasks of log(KL / KL of the task's best peer), 0
        being as good as the best peer of every task, on the same samples; their 95 % intervals,
        None where a task has one sample; and `samples`, the least of a task.
    """
    answers: dict[tuple[int, float], dict[str, dict[str, dict[int, float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for row in rows:
        cell = row["cell"]
        if "error" not in row and cell["method"] != FULL:
            table = answers[cell["length"], cell["ratio"]]
            table[cell["task"]][cell["method"]][cell["index"]] = row["kl"]
    result = []
    for (length, ratio), tasks in sorted(answers.items()):
        methods = {m for own in tasks.values() for m in own}
        for method in [m for m in [*METHODS, *sorted(methods - set(METHODS))] if m in methods]:
            if any(method not in own for own in tasks.values()):
                continue
            compared = [_compare(own, method) for own in tasks.values()]
            logs = over_tasks([own for own, _, _ in compared])
            entry: dict[str, Any] = {
                "length": length,
                "ratio": ratio,
                "method": method,
                "samples": min(count for _, _, count in compared),
                "kl": math.exp(logs.value),
                "kl_interval": exponential(logs.interval()),
            }
            ratios = [ratio for _, ratio, _ in compared if ratio is not None]
            if len(ratios) == len(compared):
                regret = over_tasks(ratios)
                entry |= {"regret": regret.value, "regret_interval": regret.interval()}
            result.append(entry)
    return result


def _compare(task: dict[str, dict[int, float]], method: str) -> tuple[Mean, Mean | None, int]:
    """Mean log KL of a method, and of its ratio to the best peer, on the same samples."""
    own = task[method]
    peers = [p for p in PEERS if p in task]
    shared = [sorted(own.keys() & task[peer].keys()) for peer in peers]
    most = max(map(len, shared), default=0)  # a peer with fewer samples is no match
    indices = next((s for s in shared if len(s) == most), []) or sorted(own)
    matched = [peer for peer, s in zip(peers, shared, strict=True) if s == indices]
    logs = {name: [log_kl(task[name][i]) for i in indices] for name in (method, *matched)}
    if not matched:
        return mean(logs[method]), None, len(indices)
    best = min(matched, key=lambda peer: sum(logs[peer]))
    ratio = mean([a - b for a, b in zip(logs[method], logs[best], strict=True)])
    return mean(logs[method]), ratio, len(indices)


def markdown(summary: dict[str, Any], notes: str = "") -> str:
    """Write the tables, below notes."""
    cells, meta = summary["cells"], summary["meta"]
    tried = {c["method"] for c in cells} | set(summary["errors"])
    lines = [
        "# Every method, task by task",
        "",
        *notes.splitlines(),
        f"{meta['model']}, {meta['dtype']}, seed {meta['seed']}; {meta['machine']}; "
        f"{', '.join(f'{k} {v}' for k, v in meta['versions'].items())}; commit {meta['commit']}.",
        "",
        f"The question is {meta.get('question', 'unseen')} when the context is compressed. Bold: "
        "the best method that needs one prefill and is not moekv. Anchors, which read the context "
        "again: "
        f"{', '.join(name for name in ANCHORS if name in tried) or 'none'}.",
    ]
    for length in sorted({c["length"] for c in cells}):
        here = [c for c in cells if c["length"] == length]
        lines += _over_tasks([o for o in summary["overall"] if o["length"] == length], length)
        tasks = list(dict.fromkeys(c["task"] for c in here))
        ratios = sorted({c["ratio"] for c in here} - {0.0})
        removed = " / ".join(f"{ratio:.0%}" for ratio in ratios)
        methods = [m for m in METHODS if any(c["method"] == m for c in here) and m != FULL]
        found = {(c["task"], c["method"], c["ratio"]): c for c in here}
        samples = {c["samples"] for c in here}
        count = f"{min(samples)}" if len(samples) == 1 else f"{min(samples)} to {max(samples)}"
        lines += ["", f"## Task by task, {_contexts(length)}, {count} samples each", ""]
        for metric, title, digits in (
            ("score", "Score of the benchmark: its own metric, of what the model writes", 2),
            ("kl", "KL divergence from the full cache, nats per answer token", 3),
            ("tv", "Total variation from the full cache's next tokens", 3),
            ("exact", "Exact match", 2),
            ("nll", "Negative log-likelihood of the answer, nats per token", 2),
        ):
            scored = [t for t in tasks if all(metric in c for c in here if c["task"] == t)]
            if not scored:
                continue
            lines += [f"### {title}", "", f"At {removed} removed.", ""]
            lines += _table(found, scored, methods, ratios, metric, digits)
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
        lines += _intervals(found, tasks, ratios)
    if summary["errors"]:
        lines += ["", "## Methods that failed", ""]
        lines += [
            f"- **{method}** ({e['answers']} answers): `{e['error']}`"
            for method, e in summary["errors"].items()
        ]
    lines += ["", "## Not in the table", ""]
    lines += [f"- {name}: {why}" for name, why in EXCLUDED.items()]
    if missing := [name for name in PEERS | ANCHORS if name not in tried]:
        lines.append(f"- not run: {', '.join(missing)}")
    return "\n".join(lines) + "\n"


def _contexts(length: int) -> str:
    return f"contexts of about {length} tokens" if length else "contexts of their own lengths"


def _over_tasks(overall: Sequence[dict[str, Any]], length: int) -> list[str]:
    """One line for each method, those that lose least first."""
    ratios = sorted({o["ratio"] for o in overall})
    found = {(o["method"], o["ratio"]): o for o in overall}
    last = math.inf

    def order(method: str) -> float:
        regrets = [found[method, r].get("regret", last) for r in ratios if (method, r) in found]
        return sum(regrets) / len(regrets)

    head = " | ".join(f"{ratio:.0%} removed" for ratio in ratios)
    lines = [
        "",
        f"## Over all tasks, {_contexts(length)}",
        "",
        "KL divergence from the full cache, nats per answer token, geometric mean over samples and "
        "tasks, as a multiple of each task's best peer, with 95 % intervals (one sample has none); "
        "in brackets by itself. Below 1: better than to pick the best peer for every task.",
        "",
        f"| method | samples | {head} |",
        "|---" * (len(ratios) + 2) + "|",
    ]
    for method in sorted({o["method"] for o in overall}, key=lambda m: (order(m), m)):
        own = [found[method, r] for r in ratios if (method, r) in found]
        row = [_multiple(found.get((method, r))) for r in ratios]
        lines.append(f"| {method} | {min(o['samples'] for o in own)} | {' | '.join(row)} |")
    return lines


def _multiple(entry: dict[str, Any] | None) -> str:
    if entry is None or "regret" not in entry:
        return "–"
    interval = exponential(entry["regret_interval"])
    text = "" if interval is None else f", {interval[0]:.2f} to {interval[1]:.2f}"
    return f"**{math.exp(entry['regret']):.2f}**{text} ({entry['kl']:.4f})"


def _table(
    found: dict[tuple[str, str, float], dict[str, Any]],
    tasks: Sequence[str],
    methods: Sequence[str],
    ratios: Sequence[float],
    metric: str,
    digits: int,
) -> list[str]:
    sign = -1 if metric in RISING else 1
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


def _intervals(
    found: dict[tuple[str, str, float], dict[str, Any]],
    tasks: Sequence[str],
    ratios: Sequence[float],
) -> list[str]:
    """Show the press as it comes with its intervals, one line for each task and ratio."""
    own = [(t, r) for t in tasks for r in ratios if (t, "moekv", r) in found]
    if not own:
        return []

    def show(cell: dict[str, Any], metric: str, digits: int) -> str:
        text, interval = f"{cell[metric]:.{digits}f}", cell[f"{metric}_interval"]
        if interval is None:
            return text
        return f"{text}, {interval[0]:.{digits}f} to {interval[1]:.{digits}f}"

    lines = [
        "",
        "### moekv with 95 % intervals over samples",
        "",
        "| task | removed | KL | exact | full cache | NLL | full cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, ratio in own:
        cell, full = found[task, "moekv", ratio], found[task, FULL, 0.0]
        entries = [show(cell, "kl", 4)]
        entries += [show(c, m, 2) for m in ("exact", "nll") for c in (cell, full)]
        lines.append(f"| {task} | {ratio:.0%} | {' | '.join(entries)} |")
    return lines


def _comparable(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave, at each ratio, moekv's methods with the most samples, and others with theirs."""
    most: dict[tuple[float, bool], int] = {}
    for c in cells:
        key = c["ratio"], c["method"].startswith("moekv")
        most[key] = max(most.get(key, 0), c["samples"])
    return [c for c in cells if c["samples"] == most[c["ratio"], c["method"].startswith("moekv")]]


def plot(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Draw KL over ratio for each task and regrets, of the methods with the most samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = summary["cells"]
    paths = []
    for length in sorted({c["length"] for c in cells}):
        here = [c for c in cells if c["length"] == length and c["method"] != FULL]
        here = _comparable(here)
        tasks = list(dict.fromkeys(c["task"] for c in here))
        ratios = sorted({c["ratio"] for c in here})
        figure, axes = plt.subplots(
            2,
            math.ceil(len(tasks) / 2),
            figsize=(3.2 * math.ceil(len(tasks) / 2), 6),
            squeeze=False,
        )
        for task, axis in zip(tasks, axes.flat, strict=False):
            shown = dict.fromkeys(c["method"] for c in here)
            for method in sorted(shown, key=lambda m: _style(m)[2]):  # thick lines on top
                line = sorted(
                    (c["ratio"], c["kl"])
                    for c in here
                    if (c["task"], c["method"]) == (task, method)
                )
                if not line:
                    continue
                label, color, width = _style(method)
                style = {"color": color, "linewidth": width, "markersize": 2 + width}
                axis.plot(*zip(*line, strict=True), marker="o", label=label, **style)
            axis.set(title=task, yscale="log", xlabel="removed", ylabel="KL, nats")
            axis.set_xticks(ratios, [f"{ratio:.0%}" for ratio in ratios])
        for axis in axes.flat[len(tasks) :]:
            axis.set_axis_off()
        found = [axis.get_legend_handles_labels() for axis in axes.flat]
        unique = {x: h for handles, labels in found for h, x in zip(handles, labels, strict=True)}
        figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=len(unique))
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        paths.append(folder / f"kl-{length}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)

    for length, ratio in sorted({(o["length"], o["ratio"]) for o in summary["overall"]}):
        here = [o for o in summary["overall"] if (o["length"], o["ratio"]) == (length, ratio)]
        here = [o for o in here if "regret" in o]
        most = max((o["samples"] for o in here), default=0)
        ranked = sorted(
            ((o["regret"], o["method"]) for o in here if o["samples"] == most), reverse=True
        )
        if not ranked:
            continue
        figure, axis = plt.subplots(figsize=(7, 0.28 * len(ranked) + 1))
        axis.barh([m for _, m in ranked], [v for v, _ in ranked], color="0.7")
        for bar, (_, method) in zip(axis.patches, ranked, strict=True):
            bar.set_color(_style(method)[1])
        axis.set(
            xlabel="mean log(KL / best peer's KL)", title=f"{ratio:.0%} of {length} tokens removed"
        )
        axis.margins(y=0.01)
        figure.tight_layout()
        paths.append(folder / f"regret-{length}-{round(100 * ratio)}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


def _style(method: str) -> tuple[str, str, int]:
    """Label, colour and width of a method's line."""
    if method in ("moekv", "moekv training-free"):
        return method, {"moekv": "C3", "moekv training-free": "C2"}[method], 2
    if method.startswith("moekv"):
        return "moekv, otherwise", "#f2b8b5", 1
    if method in EXPERTS:
        return "single experts", "C1", 1
    return ("anchors", "C0", 2) if method in ANCHORS else ("peers", "0.7", 1)


def calibration_curve(model: str) -> list[dict[str, float]]:
    """Epochs of the calibration of the package's router for a model; none where it has none."""
    for path in sorted(SHIPPED.glob("*/config.json")):
        recipe = json.loads(path.read_text())["recipe"]
        if recipe["model_name"] == model:
            return list(recipe["curve"])
    return []


def _best(curve: Sequence[dict[str, float]]) -> dict[str, float]:
    """The epoch whose gates a calibration keeps."""
    return min(curve, key=lambda row: row["ranking_loss"])


def plot_calibration(curve: Sequence[dict[str, float]], path: Path) -> Path:
    """Draw the held-out ranking loss over the epochs of a calibration."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3))
    epochs, losses = zip(*((row["epoch"], row["ranking_loss"]) for row in curve), strict=True)
    axis.plot(epochs, losses, color="C3", marker="o")
    best = _best(curve)
    axis.plot(best["epoch"], best["ranking_loss"], "o", color="C3", markersize=10, label="kept")
    axis.set(xlabel="epoch (0: even gates)", ylabel="held-out ranking loss")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _calibration(curve: Sequence[dict[str, float]]) -> str:
    best = _best(curve)
    return (
        "\n## Calibration of the package's router\n\n"
        "Share of the choice which the gates learn (the oracle's and half of what `expected` says) "
        f"that is missed on held-out texts: {curve[0]['ranking_loss']:.4f} with even gates, "
        f"{best['ranking_loss']:.4f} after epoch {best['epoch']:.0f}, which is kept.\n\n"
        f"![{CALIBRATION}]({CALIBRATION}.png)\n"
    )


def _history(path: Path) -> str:
    results = json.loads(path.read_text())
    interval = results["cache_update_interval"]
    lines = [
        "\n## The history of hit rates\n",
        f"Mean KL divergence without and with it, `cache_aware` False and True, of a `pikv` router "
        f"over {results['num_experts']} experts. One press serves the contexts of all tasks in "
        f"turn, {results['samples']} of each; the first {interval} of them, which find no history "
        "yet, do not count. Last line: geometric mean over contexts, with 95 % intervals. "
        f"`python -m benchmarks.quality.history`, seed {results['seed']}, commit "
        f"{results['commit']}.\n",
        *table(results),
    ]
    return "\n".join(lines) + "\n"


def page_text(results: Path, summary: dict[str, Any], images: Sequence[str]) -> str:
    """Write the page of docs: notes, pictures, tables, and what lies beside the answers."""
    shown = "\n".join(f"![{name}](quality-{name}.png)" for name in images)
    rows = read_results(results)
    tables = {
        "{targets}": targets(rows, summary["overall"]),
        "{parts}": parts(rows, PARTS, 1, (0.5, 0.75, 0.9)),
        "{kept}": parts(rows, KEPT, 2, RATIOS),
    }
    notes = NOTES.read_text()
    for mark, lines in tables.items():
        notes = notes.replace(mark, "\n".join(lines))
    text = markdown(summary, f"{notes}\n{shown}\n\n")
    if (history := results.with_name("history.json")).exists():
        text += _history(history)
    if curve := calibration_curve(summary["meta"]["model"]):
        text += _calibration(curve)
    return text


def summarise_file(results: Path) -> dict[str, Any]:
    """Summarise a file of answers and its `.meta.json`."""
    rows = read_results(results)
    meta = json.loads(results.with_suffix(".meta.json").read_text())
    return summarise(rows) | {"overall": overall(rows), "meta": meta}


def write_report(results: Path, folder: Path, page: Path | None = None) -> list[Path]:
    """Read `results` and its `.meta.json`; write summary.json, results.md and plots to `folder`.

    With `page` the tables are written there, too, below what `results-notes.md` says, and the plots
    beside it, with what `history.json` beside `results` holds, and the curve of the calibration of
    the package's router for this model, if there are such.
    """
    summary = summarise_file(results)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "summary.json", folder / "results.md"]
    paths[0].write_text(json.dumps(summary, indent=1) + "\n")
    paths[1].write_text(markdown(summary))
    images = plot(summary, folder)
    paths += images
    if page is not None:
        for path in images:
            shutil.copyfile(path, page.with_name(f"quality-{path.name}"))
        if curve := calibration_curve(summary["meta"]["model"]):
            paths.append(plot_calibration(curve, page.with_name(f"{CALIBRATION}.png")))
        page.write_text(page_text(results, summary, [path.stem for path in images]))
        paths.append(page)
    return paths

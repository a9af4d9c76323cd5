"""The README's table and picture: how far answers move, beside presses that people know.

``python -m benchmarks.quality.first_screen`` makes both from the recorded answers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .presses import PEERS
from .report import overall
from .run import FULL, read_results
from .targets import OURS

LENGTH = 1000
RATIOS = (0.5, 0.75, 0.9)
BEST = "the best of kvpress's one-pass presses on each task"
ROWS = {
    OURS: "**moekv**",
    "KVzipPress": "KVzip, which reads the text twice",
    BEST: BEST,
    "AdaKV(Compactor)": "AdaKV(Compactor), the best of them over all tasks",
    "SnapKVPress": "SnapKV",
}
BEGIN, END = "<!-- first screen -->", "<!-- end of first screen -->"


def first_figures(rows: Sequence[dict[str, Any]]) -> dict[str, dict[float, dict[str, float]]]:
    """KL, and share of bytes and right answers, of each method at each ratio.

    Returns
    -------
    dict
        By method and ratio: `kl`, the geometric mean over tasks of the mean KL in nats; `bytes`,
        the share of the full cache's that is held; `right`, the share of answers that hold the
        right words, of those that do with the full cache. ``BEST`` has `kl` alone.
    """
    rows = [row for row in rows if row["cell"]["length"] == LENGTH and "error" not in row]
    full = {
        (cell["task"], cell["index"]): row
        for row in rows
        if (cell := row["cell"])["method"] == FULL
    }
    answers = defaultdict(list)
    for row in rows:
        answers[row["cell"]["method"], row["cell"]["ratio"]].append(row)
    figures: dict[str, dict[float, dict[str, float]]] = defaultdict(dict)
    for entry in overall(rows, resamples=2):
        method, ratio, kl = (entry[name] for name in ("method", "ratio", "kl"))
        pairs = [
            (row, full[row["cell"]["task"], row["cell"]["index"]]) for row in answers[method, ratio]
        ]
        known = [row["exact"] for row, whole in pairs if whole["exact"]]
        figures[method][ratio] = {
            "kl": kl,
            "bytes": sum(r["bytes"] for r, _ in pairs) / sum(w["bytes"] for _, w in pairs),
            "right": sum(known) / len(known),
        }
        if method == OURS and "regret" in entry:
            figures[BEST][ratio] = {"kl": kl / math.exp(entry["regret"])}
    return figures


def first_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write the table, in Markdown."""
    figures = first_figures(rows)
    heads = [f"{ratio:.0%} removed" for ratio in RATIOS]
    lines = [
        f"| KL divergence from the full cache, nats | {' | '.join(heads)} | bytes held at 75 % |",
        f"|---|{'---:|' * (len(RATIOS) + 1)}",
    ]
    for method, name in ROWS.items():
        own = figures[method]
        kl = " | ".join(f"{own[ratio]['kl']:.4f}" for ratio in RATIOS)
        held = f"{own[0.75]['bytes']:.0%}" if "bytes" in own[0.75] else ""
        lines.append(f"| {name} | {kl} | {held} |")
    return lines


def fill(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """Put the table into a page, between its marks.

    Raises
    ------
    ValueError
        The page has no such marks.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"expected {BEGIN} and {END} in the page")
    return text[: begin + len(BEGIN)] + "\n" + "\n".join(first_table(rows)) + "\n" + text[end:]


def first_picture(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw KL over the share removed: moekv, the best peer of each task, KVzip, all others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = first_figures(rows)
    figure, axis = plt.subplots(figsize=(8.6, 3.6))
    named = {
        OURS: ("moekv", "C3", 2.6),
        BEST: ("best one-pass press on each task", "C0", 1.8),
        "KVzipPress": ("KVzip, reads the text twice", "C2", 1.8),
    }
    others = [method for method in figures if method in PEERS]
    for method in [*others, *named]:
        label, color, width = named.get(method, ("kvpress's presses", "0.8", 1.0))
        points = sorted((ratio, own["kl"]) for ratio, own in figures[method].items())
        axis.plot(
            *zip(*points, strict=True),
            color=color,
            linewidth=width,
            marker="o",
            markersize=2 + width,
            linestyle="--" if method == BEST else "-",
            label=label if method in named or method == others[0] else None,
        )
    ratios = sorted({ratio for own in figures.values() for ratio in own})
    axis.set_xticks(ratios, [f"{ratio:.0%}" for ratio in ratios])
    axis.set(
        yscale="log",
        xlabel="share of the cache removed",
        ylabel="KL divergence, nats",
        title="How far answers move (lower is better)",
    )
    axis.grid(axis="y", color="0.93")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main() -> None:
    """Fill the README, and draw its picture, from the recorded answers."""
    root = Path(__file__).parents[2]
    rows = read_results(root / "benchmarks" / "results" / "quality" / "answers.jsonl")
    page = root / "README.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(page)
    print(first_picture(rows, root / "docs" / "first-screen.png"))


if __name__ == "__main__":
    main()

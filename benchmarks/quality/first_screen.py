"""The README's table and picture, and docs/results.md: how far answers move, on one screen.

``python -m benchmarks.quality.first_screen`` makes them, docs/results-bytes.md and
docs/results-other.md, from the recorded answers.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import RESULTS, ROOT
from benchmarks.report import share

from . import equal_bytes, other
from .equal_bytes import AUTO, BEST_FOLDED, BEST_LENT, KVZIP, KVZIP_LENT, Figures, cells, percents
from .pictures import LENGTH, draw_all
from .presses import PEERS
from .report import overall
from .run import FULL, read_results
from .targets import OURS, compare

ANSWERS = RESULTS / "quality" / "answers.jsonl"
README, PAGE, BYTES = ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/results-bytes.md"

RATIOS = (0.5, 0.75, 0.9)
BEST = "the best of kvpress's one-pass presses on each task"
ROWS = {
    OURS: "**moekv**",
    "KVzipPress": KVZIP,
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
        By method and ratio: `kl`, the geometric mean over samples and tasks in nats; `bytes`, the
        share of the full cache's that is held; `right`, the share of answers that hold the right
        words, of those that do with the full cache. ``BEST`` has `kl` alone.
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
    for entry in overall(rows):
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


def pairs_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write the table of 16-bit pairs, in Markdown."""
    figures = first_figures(rows)
    heads = [f"{share} removed" for share in percents(RATIOS)]
    lines = [
        f"| KL divergence from the full cache, nats | {' | '.join(heads)} | bytes held at 75 % |",
        f"|---|{'---:|' * (len(RATIOS) + 1)}",
    ]
    for method, name in ROWS.items():
        own = figures[method]
        kl = " | ".join(f"{own[ratio]['kl']:.4f}" for ratio in RATIOS)
        held = f"{100 * own[0.75]['bytes']:.0f} %" if "bytes" in own[0.75] else ""
        lines.append(f"| {name} | {kl} | {held} |")
    return lines


def fill(text: str, table: Sequence[str]) -> str:
    """Put a table into a page, between its marks.

    Raises
    ------
    ValueError
        The page has no such marks.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"expected {BEGIN} and {END} in the page")
    return text[: begin + len(BEGIN)] + "\n" + "\n".join(table) + "\n" + text[end:]


def press_time() -> str:
    """Say what the press takes of a prefill, of the recorded measurement with most threads."""
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("prefill-smollm2*.json"))]
    rows = [row for file in files for row in file["rows"] if "error" not in row]
    most = max(row["threads"] for row in rows)
    own, snapkv = (
        share(row)
        for method in (OURS, "SnapKVPress")
        for row in rows
        if (row["method"], row["length"], row["threads"]) == (method, 2048, most)
    )
    return f"{100 * own:.0f} % of a prefill of 2,048 tokens, SnapKV {100 * snapkv:.0f} %"


def screen(
    rows: Sequence[dict[str, Any]],
    in_bytes: Sequence[dict[str, Any]],
    seen: Figures,
    second: Figures,
) -> str:
    """Write docs/results.md: what wins, where moekv loses, the tables."""
    figures = equal_bytes.all_figures(in_bytes)
    ratios = sorted({row["cell"]["ratio"] for row in rows} - {0.0})
    peers, kvzip = (
        [c for ratio in ratios for c in compare(rows, LENGTH, ratio, OURS, others)]
        for others in (PEERS, ["KVzipPress"])
    )
    lost, lost_kvzip = ([(c.task, c.ratio) for c in found if c.behind] for found in (peers, kvzip))

    def times(of: str) -> str:
        return " / ".join(f"{figures.times(AUTO, of, r)[0]:.2f}" for r in figures.ratios)

    def behind(of: str, name: str) -> str:
        found = figures.behind(AUTO, of)
        count = len(figures.tasks) * len(figures.ratios)
        ahead = f"ahead in {len(found)} of {count} cells ({cells(found)})"
        return f"- In the same bytes, {name}: {ahead}."

    removed = " / ".join(percents(figures.ratios))
    last = figures.ratios[-1]
    worst = max(figures.tasks, key=lambda task: figures.kl(AUTO, last, task))
    lines = [
        "# Results",
        "",
        "How far answers move when the cache is compressed before the question is known: KL "
        "divergence from the full cache, nats per answer token, geometric mean over tasks. "
        "SmolLM2-135M-Instruct, contexts of 1,000 tokens. Less is better.",
        "",
        "## In the same bytes",
        "",
        *equal_bytes.first_table(in_bytes),
        "",
        "AdaKV and KVzip only mask what they remove, and hold it. *Lent*: kvpress has no such "
        "rows; its presses choose, and moekv stores. [Quality at equal bytes](results-bytes.md) "
        "has every task and press.",
        "",
        "## In as many pairs of 16 bits",
        "",
        *pairs_table(rows),
        "",
        "Ten tasks, four samples each; moekv with the calibrated router that comes for this model. "
        "[Every method, task by task](results-detail.md), with intervals, longer contexts, and "
        "what each part of the press is worth.",
        "",
        "![KL divergence against the share removed](first-screen.png)",
        "",
        "Each task beside its best one-pass press, with 95 % intervals:",
        "",
        "![KL divergence of each task as a multiple of its best press's](results-tasks.png)",
        "",
        "With the question in the prompt, and without:",
        "",
        "![KL divergence where the question is seen and where it is not](results-questions.png)",
        "",
        "## Where moekv wins",
        "",
        f'- `pairs="auto"` comes to {times(equal_bytes.BEST)} of the KL of the best of six '
        f"one-pass presses of kvpress on each task, with {removed} of the bytes removed, and to "
        f"{times(OURS)} of that of its own 16-bit pairs.",
        f"- With 16-bit pairs it is ahead of the best one-pass press of each task in "
        f"{len(peers) - len(lost)} of {len(peers)} cells, of KVzip in "
        f"{len(kvzip) - len(lost_kvzip)} of {len(kvzip)}.",
        *map(other.comparison, filter(other.is_ahead, (seen, second))),
        "- What is removed is freed: bytes are counted on storages.",
        "",
        "## Where it loses",
        "",
        behind(BEST_LENT, "the best of six presses on each task, lent moekv's rows"),
        behind(BEST_FOLDED, "the same, lent folding as well"),
        *(
            behind(name, name)
            for name in (KVZIP, KVZIP_LENT)
            if figures.has(name) and figures.behind(AUTO, name)
        ),
        *(other.comparison(found) for found in (seen, second) if not other.is_ahead(found)),
        *map(other.losses, (seen, second)),
        f"- With {percents([last])[0]} removed answers are no longer those of the full cache: KL "
        f"{figures.mean_kl(AUTO, last):.2f} in the mean, {figures.kl(AUTO, last, worst):.2f} in "
        f"{worst}.",
        "- On the same tasks with pairs in 16 bits, the best of the six is ahead in "
        f"{cells(figures.behind(OURS, equal_bytes.BEST))}.",
        f"- On the ten tasks the best one-pass press is ahead in {cells(lost)}; KVzip in "
        f"{cells(lost_kvzip)}.",
        f"- Time: on this CPU the press takes {press_time()} ([performance](performance.md)).",
        "- Not known: larger models, and GPUs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the README's table, the pages and the picture, from the recorded answers."""
    rows, (in_bytes, meta) = read_results(ANSWERS), equal_bytes.recorded()
    text = fill(README.read_text(encoding="utf-8"), equal_bytes.first_table(in_bytes))
    README.write_text(text, encoding="utf-8")
    PAGE.write_text(screen(rows, in_bytes, *other.recorded_figures()), encoding="utf-8")
    BYTES.write_text(equal_bytes.page(in_bytes, meta), encoding="utf-8")
    other.PAGE.write_text(other.page(*other.recorded()), encoding="utf-8")
    print(README, PAGE, BYTES, other.PAGE)
    print(*draw_all(rows, in_bytes, other.recorded_figures()[0], PAGE.parent))


if __name__ == "__main__":
    main()

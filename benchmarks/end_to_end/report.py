"""Write the tables of docs/memory.md from benchmarks/results; a test compares them.

    python -m benchmarks.end_to_end.report

A table stands between `<!-- decode-smollm2 token -->` and `<!-- end -->`: a file of results, and
which of its rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks.measure import RESULTS, ROOT

PAGE = ROOT / "docs" / "memory.md"
_BLOCK = re.compile(r"(<!-- (\S+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Rows = list[dict[str, Any]]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _memory(rows: Rows) -> list[list[str]]:
    """Bytes of each method, and processor time until the first token."""
    table = [
        [
            *("context", "method", "first token, s", "of the full one"),
            *("cache, MiB", "of the full one", "its peak, MiB"),
            *("resident, MiB, before", "after", "at the peak"),
        ]
    ]
    for row in rows:
        full = next(r for r in rows if r["length"] == row["length"])  # measured first
        before = row["rss_before"]
        table.append(
            [
                f"{row['length']:,}",
                row["method"],
                f"{row['cpu_s'][1]:.2f}",
                f"{row['cpu_s'][1] / full['cpu_s'][1]:.1%}",
                _mib(row["cache_bytes"]),
                f"{row['cache_bytes'] / full['cache_bytes']:.1%}",
                _mib(row["cache_peak_bytes"]),
                _mib(before),
                f"+{_mib(row['rss_after'] - before)}",
                f"+{_mib(row['rss_peak_extra'])}",
            ]
        )
    return table


def _times(
    rows: Rows,
    head: list[str],
    cells: Callable[[dict[str, Any]], list[str]],
    *,
    behind: str = "context",
) -> Any:
    """Medians of each method, by the clock and of processor time, and ratios to the first."""
    fast = ["ms", "quartiles", "times as fast", "processor, ms", "times as fast"]
    table = [[behind, "method", *head, *fast]]
    for row in rows:
        full = next(r for r in rows if r["length"] == row["length"])
        first, median, third = (1e3 * x for x in row["wall_s"])
        table.append(
            [
                f"{row['length']:,}",
                row["method"],
                *cells(row),
                f"{median:.1f}",
                f"{first:.1f} to {third:.1f}",
                f"{full['wall_s'][1] / row['wall_s'][1]:.2f}",
                f"{1e3 * row['cpu_s'][1]:.1f}",
                f"{full['cpu_s'][1] / row['cpu_s'][1]:.2f}",
            ]
        )
    return table


def _token(rows: Rows) -> list[list[str]]:
    rows = [row for row in rows if row["step"] == "token"]
    return _times(rows, ["cache, MiB"], lambda row: [_mib(row["cache_bytes"])])


def _attention(rows: Rows) -> list[list[str]]:
    return _times([row for row in rows if row["step"] == "attention"], [], lambda row: [])


def _batch(rows: Rows) -> list[list[str]]:
    return _times(rows, ["cache, MiB"], lambda row: [_mib(row["cache_bytes"])], behind="rows")


def _whole(rows: Rows) -> list[list[str]]:
    """KL divergence of whole caches in fewer bits, over all tasks and on the worst."""
    table = [["cache", "MiB", "of the full one", "KL divergence, nats", "of the worst task"]]
    full = rows[0]["cache_bytes"]
    for row in rows:
        kl = f"{row['mean_kl']:.2g}", f"{max(row['kl'].values()):.2g}"
        size = _mib(row["cache_bytes"]), f"{row['cache_bytes'] / full:.1%}"
        table.append([row["method"], *size, *kl])
    return table


TABLES: dict[str, Callable[[Rows], list[list[str]]]] = {
    "memory": _memory,
    "token": _token,
    "attention": _attention,
    "batch": _batch,
    "whole": _whole,
}


def render(results: dict[str, Any], kind: str) -> str:
    """One table in markdown, and where it was measured."""
    head, *body = TABLES[kind](results["rows"])
    names = 1 if kind == "whole" else 2
    lines = [head, ["---"] * names + ["---:"] * (len(head) - names), *body]
    where, threads = results["environment"], results["rows"][0]["threads"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    about = (
        f"`{results['command']}`\non {where['cpu']} ({where['capability']}), {threads} "
        f"thread{'s' if threads > 1 else ''}, {versions}, commit {where['commit']}."
    )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{about}\n"


def update(page: str) -> str:
    """Fill in the tables of a page."""

    def fill(block: re.Match[str]) -> str:
        results = json.loads((RESULTS / f"{block[2]}.json").read_text())
        return f"{block[1]}{render(results, block[3])}{block[4]}"

    return _BLOCK.sub(fill, page)


def main() -> None:
    """Write the tables."""
    PAGE.write_text(update(PAGE.read_text()))


if __name__ == "__main__":
    main()

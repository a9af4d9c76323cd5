"""Render the measured table of docs/serving.md from what `benchmarks.serving.concurrency` wrote.

python -m benchmarks.serving.table
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.measure import RESULTS, ROOT

PAGE = ROOT / "docs" / "serving.md"
MARKS = "<!-- measured -->\n", "<!-- /measured -->\n"
COLUMNS = (
    ("", lambda row, plain: row["case"]),
    ("requests at once", lambda row, plain: row["most_running"]),
    ("engine steps", lambda row, plain: row["steps"]),
    ("tokens/s", lambda row, plain: f"{row['tokens_per_second']:.1f}"),
    ("first token, median", lambda row, plain: f"{row['first_token_s'][1]:.1f} s"),
    ("prompt", lambda row, plain: _beside(row, plain, "prompt_step_s")),
    ("decoding two", lambda row, plain: _beside(row, plain, "decode_step_of_two_s")),
    ("right answers", lambda row, plain: f"{row['right']} of {row['asked']}"),
    ("from transformers", lambda row, plain: f"{row['fidelity']['mean_difference']:.3f}"),
)


def _beside(row: dict[str, Any], plain: dict[str, Any], name: str) -> str:
    """A median time, and how it compares with vLLM's own."""
    own, other = row[name][1], plain[name][1]
    return f"{1e3 * own:.0f} ms" + ("" if row is plain else f" ({own / other:.2f} ×)")


def table() -> str:
    """Render the table."""
    rows = json.loads((RESULTS / "serving-smollm2.json").read_text())["rows"]
    lines = ["| " + " | ".join(name for name, _ in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = (str(cell(row, rows[0])) for _, cell in COLUMNS)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """Put the table into the page, between its marks."""
    before, rest = page.split(MARKS[0])
    return before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))

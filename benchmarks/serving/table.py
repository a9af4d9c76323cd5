"""The measured part of docs/serving.md.

``python -m benchmarks.serving.table`` makes it from what `benchmarks.serving.concurrency` recorded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT

RECORDED = RESULTS / "serving" / "smollm2.json"
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"

AT_ONCE, PREFILL = 3.0, 0.05  # at a ratio of .75, at most


def overhead(row: dict[str, Any], name: str) -> float:
    """Median time, of that of requests that were left alone in the same engine, beyond it."""
    return float(row[name][1] / row[f"left_alone_{name}"][1]) - 1


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write the table and what targets were met, in Markdown."""
    plain, *compressed = rows
    assert plain["options"] is None
    lines = [
        "| | requests at once | steps | tokens/s | first token, s | two prompts | two decode | "
        "right | same likeliest |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = ["", ""]
        if row["options"] is not None:
            names = ("two_prompts_step_s", "decode_step_of_two_s")
            times = [f"{round(100 * overhead(row, name)):+d} %" for name in names]
        lines.append(
            f"| {_name(row)} | {row['most_running']} | {row['steps']} | "
            f"{row['tokens_per_second']:.1f} | {row['first_token_s'][1]:.1f} | {times[0]} | "
            f"{times[1]} | {row['right']} of {row['asked']} | "
            f"{row['fidelity']['same_likeliest']:.3f} |"
        )
    at_once = [
        row["most_running"] / plain["most_running"]
        for row in compressed
        if row["options"]["compression_ratio"] == 0.75
    ]
    lines += [
        "",
        f"At a ratio of 0.75, {_span(at_once, '{:.1f}')} times as many requests run at once",
    ]
    lines[-1] += _said(min(at_once) >= AT_ONCE, f"{AT_ONCE:g} times or more") + "."
    for what, name, most in (
        ("A step of prompts takes {} % more time", "two_prompts_step_s", PREFILL),
        ("A step of two requests that decode takes {} % more", "decode_step_of_two_s", 0.0),
    ):
        found = [overhead(row, name) for row in compressed]
        percents = _span([round(100 * x) for x in found], "{:+d}")
        bound = f"{100 * most:g} % at most" if most else "no more"
        lines.append(what.format(percents) + _said(max(found) <= most, bound) + ".")
    return lines


def _name(row: dict[str, Any]) -> str:
    options = row["options"]
    if options is None:
        return "vLLM"
    return f'{options["compression_ratio"]:.0%} removed, `"{options["budget"]}"`'.replace("%", " %")


def _span(values: Sequence[float], form: str) -> str:
    low, high = (form.format(x) for x in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _said(is_met: bool, target: str) -> str:
    return f" (the target, {target}, is {'met' if is_met else '**missed**'})"


def fill(text: str, lines: Sequence[str]) -> str:
    """Put lines between the marks of a page.

    Raises
    ------
    ValueError
        The page lacks the marks.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"expected {BEGIN} and {END} in the page")
    return text[: begin + len(BEGIN)] + "\n" + "\n".join(lines) + "\n" + text[end:]


def recorded(path: Path = RECORDED) -> list[dict[str, Any]]:
    """Read the recorded rows."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def main() -> None:
    """Fill the page."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(fill(page, table(recorded())), encoding="utf-8")


if __name__ == "__main__":
    main()

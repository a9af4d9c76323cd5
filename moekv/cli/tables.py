"""What the demo shows: its answers, its costs, and three lines of outcome."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from moekv.cli.trial import Question, Result
from moekv.units import size


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def run_title(ratio: float) -> str:
    """Name a run by its compression ratio, 0 for the full cache."""
    return f"{100 * ratio:g} % removed" if ratio else "Full cache"


def _results_table(title: str, first: str, results: Sequence[Result], **options: Any) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", **options)
    table.add_column(first, ratio=1, overflow="fold")
    for result in results:
        table.add_column(run_title(result.ratio), ratio=1, overflow="fold")
    return table


_MARKS = {None: ("", "", ""), True: ("✓ ", "right: ", "green"), False: ("✗ ", "wrong: ", "red")}


def answers_table(
    questions: Sequence[Question], results: Sequence[Result], plain: bool = False
) -> Table:
    """Show the answers side by side; a right one is green, a wrong one red; plain in ASCII."""
    table = _results_table("Answers", "Question", results, show_lines=True, expand=True)
    for number, question in enumerate(questions):
        cells = []
        for result in results:
            answer = " ".join(result.answers[number].split())
            mark, word, style = _MARKS[question.is_right(answer)]
            cells.append(Text((word if plain else mark) + answer, style))
        table.add_row(question.text, *cells)
    return table


def costs_table(questions: Sequence[Question], results: Sequence[Result]) -> Table:
    """Show what each run cost: bytes and times."""
    full = results[0].cache_bytes
    table = _results_table("Costs, measured", "", results)

    def row(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *cells)

    row("KV cache", (size(result.cache_bytes) for result in results))
    row("  of the full cache's bytes", (_percent(result.cache_bytes / full) for result in results))
    row("Prefill", (f"{result.prefill_seconds:.2f} s" for result in results))
    row(
        "  of it in the press",
        (
            f"{result.press_seconds:.3f} s "
            f"({_percent(result.press_seconds / result.prefill_seconds)})"
            if result.ratio
            else "-"
            for result in results
        ),
    )
    row(
        "Decoding",
        (
            f"{result.decode_steps / result.decode_seconds:.1f} tokens/s"
            if result.decode_steps
            else "-"
            for result in results
        ),
    )
    if all(question.facts for question in questions):
        right = (_count_right(questions, result) for result in results)
        row("Right answers", (f"{count} of {len(questions)}" for count in right))
    return table


def outcome(questions: Sequence[Question], results: Sequence[Result]) -> list[str]:
    """Say in three lines what the smallest cache costs and gives."""
    full, last = results[0], results[-1]
    if last is full:
        return []
    lines = [
        f"Cache   {size(full.cache_bytes)} -> {size(last.cache_bytes)}, "
        f"{_percent(last.cache_bytes / full.cache_bytes)} of the full one",
        f"Press   {_percent(last.press_seconds / last.prefill_seconds)} of the prefill's time",
    ]
    if all(question.facts for question in questions):
        right, before = (_count_right(questions, result) for result in (last, full))
        lines.append(f"Answers {right} of {len(questions)} right, {before} with the full cache")
    else:
        same = sum(a == b for a, b in zip(last.answers, full.answers, strict=True))
        lines.append(f"Answers {same} of {len(questions)} word for word as with the full cache")
    return lines


def _count_right(questions: Sequence[Question], result: Result) -> int:
    pairs = zip(questions, result.answers, strict=True)
    return sum(bool(question.is_right(answer)) for question, answer in pairs)

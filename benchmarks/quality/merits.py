"""What routers, experts and lists of experts are worth: the page docs/results-routers.md.

``python -m benchmarks.quality.merits`` makes it from the recorded answers in
benchmarks/results/routers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT
from benchmarks.report import share

from .equal_bytes import Figures, percents, where
from .presses import CALIBRATED_LISTS, EXPERTS, IN_LISTS, LISTS, MEMBERS, MERITS, ROUTED
from .run import read_results
from .targets import FREE, OURS

ANSWERS = RESULTS / "routers" / "answers.jsonl"
TIMES = RESULTS / "routers" / "prefill.json"
NOTES = Path(__file__).with_name("merits-notes.md")
PAGE = ROOT / "docs/results-routers.md"

RATIOS, LIST_RATIOS = (0.5, 0.75, 0.9), (0.75, 0.9)
CALL, FREE_CALL, MANY = "moekv pikv", "pikv, four experts", "num_experts=auto"
CALLS = {
    OURS: "no options, with the calibrated router",
    CALL: "the mixture-of-experts call beside that router",
    FREE: "no options, without a calibrated router",
    FREE_CALL: "the mixture-of-experts call without one",
    MANY: '`num_experts="auto"` without one',
}

Row = Mapping[str, Any]


def _shares(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the rest of a prefill that each method took."""
    return {row["method"]: share(row) for row in rows if "error" not in row}


def _table(
    figures: Figures,
    methods: Mapping[str, str],
    over: Mapping[str, str],
    times: Mapping[str, float],
) -> Iterator[str]:
    """KL of methods, in brackets as a multiple of that of another, and shares of a prefill."""
    heads = " | ".join(f"{ratio} removed" for ratio in percents(figures.ratios))
    yield f"| | {heads} | of a prefill |"
    yield f"|---|{'---:|' * (len(figures.ratios) + 1)}"
    for method, name in methods.items():
        texts = []
        for ratio in figures.ratios:
            kl = figures.mean_kl(method, ratio)
            base = over.get(method)
            times_base = f" ({kl / figures.mean_kl(base, ratio):.2f} ×)" if base else ""
            texts.append(f"{kl:.4f}{times_base}")
        took = f"{times[method]:.1%}" if method in times else ""
        yield f"| {name} | {' | '.join(texts)} | {took} |"


def list_figures(figures: Figures, name: str, ratio: float) -> tuple[float, float, float]:
    """KL of a list as a multiple of its best member's and of its median member's, and calibrated.

    The last is the KL of the list beside the calibrated router over that of its best member.
    """
    alone = [figures.mean_kl(f"expert {member}", ratio) for member in LISTS[name]]
    kl, best = figures.mean_kl(name, ratio), min(alone)
    calibrated = figures.mean_kl(f"calibrated beside {name}", ratio)
    return kl / best, kl / statistics.median(alone), calibrated / best


def _lists(figures: Figures) -> Iterator[str]:
    heads = " | ".join(f"{ratio} removed" for ratio in percents(figures.ratios))
    yield f"| list | {heads} |"
    yield f"|---|{'---:|' * len(figures.ratios)}"
    for name in LISTS:
        found = [list_figures(figures, name, ratio) for ratio in figures.ratios]
        texts = " | ".join(" / ".join(f"{x:.2f}" for x in each) for each in found)
        yield f"| {name.replace('Press', '')} | {texts} |"


def _targets(figures: Figures, lists: Figures) -> Iterator[str]:
    yield "| target | measured | |"
    yield "|---|---|---|"

    def line(what: str, found: Sequence[float], most: Sequence[float]) -> str:
        missed = any(value > limit for value, limit in zip(found, most, strict=True))
        shown = " / ".join(f"{value:.2f}" for value in found)
        return f"| {what} | {shown} | {'**missed**' if missed else 'met'} |"

    def times(method: str, other: str) -> list[float]:
        return [figures.mean_kl(method, r) / figures.mean_kl(other, r) for r in figures.ratios]

    at = " / ".join(percents(figures.ratios))
    for name, method, other in (
        ("calibrated", CALL, OURS),
        ("training-free", FREE_CALL, FREE),
    ):
        what = f"the call, {name}: ≤ 1.0 / 1.0 / 1.1 × the KL of no options, at {at}"
        yield line(what, times(method, other), (1.0, 1.0, 1.1))
    for name, methods, other in (
        ("calibrated", list(ROUTED), OURS),
        ("training-free", [m for m in MERITS if m.endswith("four experts")], FREE),
    ):
        worst = [max(x) for x in zip(*(times(m, other) for m in methods), strict=True)]
        what = f"each router type with four experts, {name}: ≤ 1.5 ×, the worst of six at {at}"
        yield line(what, worst, (1.5,) * len(worst))
    what = f'`num_experts="auto"`: ≤ 1.2 × four experts, at {at}'
    yield line(what, times(MANY, FREE_CALL), (1.2,) * len(figures.ratios))
    for index, (what, most) in enumerate(
        (
            ("each list ≤ 1.5 / 2 × its best member alone: the worst of 20", (1.5, 2.0)),
            ("each list ≤ its median member alone: the worst of 20", (1.0, 1.0)),
            (
                "each list beside the calibrated router ≤ 1.1 × its best member: the worst",
                (1.1,) * 2,
            ),
        )
    ):
        worst = [max(list_figures(lists, name, r)[index] for name in LISTS) for r in lists.ratios]
        held = [
            sum(list_figures(lists, name, r)[index] <= limit for name in LISTS)
            for r, limit in zip(lists.ratios, most, strict=True)
        ]
        counts = " / ".join(f"{count}" for count in held)
        at = " / ".join(percents(lists.ratios))
        yield line(f"{what}, at {at} (held by {counts})", worst, most)


def page(rows: Sequence[Row], meta: Mapping[str, Any], timed: Sequence[Row]) -> str:
    """Write the page, in Markdown."""
    figures = Figures(rows, [*CALLS, *ROUTED, *MERITS, *EXPERTS], RATIOS)
    lists = Figures(rows, [*IN_LISTS, *CALIBRATED_LISTS, *MEMBERS], LIST_RATIOS)
    times = _shares(timed)
    failed = sorted({(row["cell"]["method"], row["error"]) for row in rows if "error" in row})
    count = max(figures.samples.values())
    lines = [
        *NOTES.read_text(encoding="utf-8").splitlines(),
        "",
        f"{len(figures.tasks)} tasks of 1,000 tokens ({', '.join(figures.tasks)}), **{count} "
        f"sample{'s' if count > 1 else ''} of each**: differences of a tenth say nothing.",
        "",
        "## The calls",
        "",
        "In brackets: times the KL divergence of no options.",
        "",
        *_table(figures, CALLS, {CALL: OURS, FREE_CALL: FREE, MANY: FREE}, times),
        "",
        "## Routers without calibration",
        "",
        "Beside `expected`, which all tokens share; two experts a token.",
        "",
        *_table(
            figures,
            {m: m for m in MERITS if m != MANY},
            {m: FREE for m in MERITS},
            times,
        ),
        "",
        "## Routers beside the calibrated one",
        "",
        "Four experts, two a token.",
        "",
        *_table(
            figures,
            {m: m.removeprefix("moekv ") for m in ROUTED},
            {m: OURS for m in ROUTED},
            times,
        ),
        "",
        "## Each expert alone",
        "",
        "`expected` under a budget over the model, which its scores serve, the others with as many "
        "pairs in every head.",
        "",
        *_table(figures, {m: m.removeprefix("expert ") for m in EXPERTS}, {}, times),
        "",
        "## Lists at random",
        "",
        "Twenty lists of two or three of our experts and of kvpress's scorers, to which every "
        "token is routed. KL divergence as a multiple: of the best member alone / of the median "
        "member alone / the list beside the calibrated router, of the best member alone.",
        "",
        *_lists(lists),
        "",
        "## Targets",
        "",
        *_targets(figures, lists),
        *(f"\n{method} failed: `{error}`." for method, error in failed),
        "",
        "## Where it was measured",
        "",
        where(meta),
    ]
    return "\n".join(lines) + "\n"


def recorded() -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
    """Read the recorded answers, where they were measured, and the recorded times."""
    meta = json.loads(ANSWERS.with_suffix(".meta.json").read_text())
    return read_results(ANSWERS), meta, json.loads(TIMES.read_text())["rows"]


def main() -> None:
    """Write the page from what is recorded."""
    PAGE.write_text(page(*recorded()), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()

"""Render docs/performance.md and the pages below it, tables and plots, from JSON.

    python -m benchmarks.report                                 # of benchmarks/results
    python -m benchmarks.report --results build/bench/results   # what `make bench` measured
    python -m benchmarks.report --cpp build/bench/bench-cpp.json   # and what `make bench-cpp` did

The notes about what was measured are about the recorded results, and go with these alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import overview
from benchmarks.kernels.cases import COMPILED, COPY, MOEKV, REFERENCE
from benchmarks.measure import RESULTS, ROOT, write_results

PAGE = ROOT / "docs" / "performance.md"
PREFILL_NOTES = Path(__file__).with_name("performance-prefill-notes.md")
OPS_NOTES = Path(__file__).with_name("performance-ops-notes.md")

SNAPKV = "kvpress SnapKVPress.score"
EAGER_GATE = "softmax, topk, renormalise, bincount"

Row = dict[str, Any]


@dataclass
class Kernels:
    """Rows of the op benchmark."""

    rows: Sequence[Row]

    @property
    def threads(self) -> int:
        """The largest number of threads that was measured."""
        return max((row["threads"] for row in self.rows), default=1)

    def of(self, threads: int) -> Kernels:
        """Keep the rows of a number of threads."""
        return Kernels([row for row in self.rows if row["threads"] == threads])

    def cells(self, **wanted: Any) -> Iterator[tuple[Row, dict[str, Row]]]:
        """Cases with these properties: one of their rows, and all of them by contender."""
        keys = ("op", "variant", "shape", "length", "dtype", "threads")
        cases: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in self.rows:
            if all(row[key] == value for key, value in wanted.items()):
                cases.setdefault(tuple(row[key] for key in keys), {})[row["contender"]] = row
        for case in cases.values():
            yield case[MOEKV], case

    def judged(self, **wanted: Any) -> Iterator[tuple[Row, dict[str, Row]]]:
        """Cases of the lengths that targets are about, short ones first."""
        cases = [found for found in self.cells(**wanted) if found[0]["length"] >= 8192]
        yield from sorted(cases, key=lambda found: found[0]["length"])

    def seconds(self, row: Row | None) -> float | None:
        """Median time, see :func:`clock`."""
        return None if row is None or "error" in row else float(row[clock(row)][1])


def clock(row: Row) -> str:
    """On one thread processor time, which other processes do not stretch; else the wall's."""
    return "cpu_s" if row["threads"] == 1 else "wall_s"


def share(row: Row) -> float:
    """Median time of a press, of the rest of its prefill, by the same clock."""
    return float(row["cpu_share" if row["threads"] == 1 else "share"][1])


@dataclass
class Target:
    """Something to reach.

    `values` finds (label, number) in the results; `met` says whether a number will do.
    """

    what: str
    aim: str
    values: Callable[[Kernels], Iterator[tuple[str, float]]]
    met: Callable[[float], bool]
    digits: int = 1


def ratio(
    other: str, *, inverse: bool = False, **wanted: Any
) -> Callable[[Kernels], Iterator[tuple[str, float]]]:
    """Time of another contender over moekv's (or the inverse), for each case."""

    def values(kernels: Kernels) -> Iterator[tuple[str, float]]:
        for row, case in kernels.judged(**wanted):
            ours, theirs = kernels.seconds(row), kernels.seconds(case.get(other))
            if ours and theirs:
                label = row["shape"] if row["op"] == "gating_topk" else f"{row['length'] // 1024}k"
                yield label, ours / theirs if inverse else theirs / ours

    return values


def memory(other: str, **wanted: Any) -> Callable[[Kernels], Iterator[tuple[str, float]]]:
    """Peak extra memory of moekv over another contender's."""

    def values(kernels: Kernels) -> Iterator[tuple[str, float]]:
        for row, case in kernels.judged(**wanted):
            theirs = case.get(other, {}).get("peak_bytes")
            if theirs:
                yield f"{row['length'] // 1024}k", row["peak_bytes"] / theirs

    return values


def extra_bytes(**wanted: Any) -> Callable[[Kernels], Iterator[tuple[str, float]]]:
    """Peak extra memory in MiB."""

    def values(kernels: Kernels) -> Iterator[tuple[str, float]]:
        for row, _ in kernels.judged(**wanted):
            yield f"{row['length'] // 1024}k", row["peak_bytes"] / 2**20

    return values


def scaling(shortest: int, **wanted: Any) -> Callable[[Kernels], Iterator[tuple[str, float]]]:
    """Time per token at 128k over that at a shorter length."""

    def values(kernels: Kernels) -> Iterator[tuple[str, float]]:
        by_op: dict[str, dict[int, float]] = {}
        for row, _ in kernels.cells(**wanted):
            if seconds := kernels.seconds(row):
                label = f"{row['op']}, {row['shape' if row['op'] == 'gating_topk' else 'variant']}"
                by_op.setdefault(label, {})[row["length"]] = seconds / row["length"]
        for label, per_token in by_op.items():
            if shortest in per_token and 131072 in per_token:
                yield label, per_token[131072] / per_token[shortest]

    return values


LLAMA = {"shape": "Llama-3.1-8B"}
COMPACT = {"op": "kv_compact_", **LLAMA, "dtype": "bf16"}
WINDOW = {"op": "expert_scores", "variant": "window attention", **LLAMA, "dtype": "bf16"}
GATE = {"op": "gating_topk", "length": 32768, "dtype": "bf16"}
RAGGED = {"op": "ragged_attention", **LLAMA, "dtype": "bf16"}


def at_least(bound: float) -> Callable[[float], bool]:
    """What says that a number has reached a bound."""
    return lambda value: value >= bound


def at_most(bound: float) -> Callable[[float], bool]:
    """What says that a number is within a bound."""
    return lambda value: value <= bound


def all_scalings(shortest: int) -> Callable[[Kernels], Iterator[tuple[str, float]]]:
    """Scaling of every op, in the dtype that it works on."""

    def values(kernels: Kernels) -> Iterator[tuple[str, float]]:
        yield from scaling(shortest, op="gating_topk", dtype="bf16")(kernels)
        for op, dtype in (
            *(("expert_scores", "bf16"), ("expected_attention", "bf16"), ("mix_scores", "fp32")),
            *(("select_kept", "fp32"), ("kv_compact_", "bf16"), ("ragged_attention", "bf16")),
            ("project_tokens", "bf16"),
        ):
            yield from scaling(shortest, op=op, dtype=dtype, **LLAMA)(kernels)

    return values


TARGETS = [
    Target(
        "`kv_compact_`, of the copy bandwidth", "≥ 0.8", ratio(COPY, **COMPACT), at_least(0.8), 2
    ),
    Target(
        "… times as fast as kvpress's gather, 8k",
        "≥ 10",
        ratio("torch.gather", **COMPACT, length=8192),
        at_least(10),
    ),
    Target("… 32k", "≥ 30", ratio("torch.gather", **COMPACT, length=32768), at_least(30)),
    Target("… extra MiB", "0", extra_bytes(**COMPACT), at_most(0.1)),
    *(
        Target(
            f"`select_kept` {variant}, times as fast as topk and sort",
            "≥ 8",
            ratio("torch.topk and sort", op="select_kept", variant=variant, dtype="fp32", **LLAMA),
            at_least(8),
        )
        for variant in ("per head", "over heads")
    ),
    Target(
        "`gating_topk`, 32k tokens, times as fast as eager",
        "≥ 10",
        ratio(EAGER_GATE, **GATE),
        at_least(10),
    ),
    Target("… as under torch.compile", "≥ 2", ratio(COMPILED + EAGER_GATE, **GATE), at_least(2)),
    Target(
        "`expert_scores`, window attention, times as fast as `SnapKVPress.score`",
        "≥ 6",
        ratio(SNAPKV, **WINDOW),
        at_least(6),
    ),
    Target(
        "… of the speed of a bf16 matmul of the products, once",
        "≥ 0.5",
        ratio("torch.matmul of the products alone", **WINDOW),
        at_least(0.5),
        2,
    ),
    Target(
        "… extra memory, of `SnapKVPress.score`'s",
        "≤ 0.05",
        memory(SNAPKV, **WINDOW),
        at_most(0.05),
        3,
    ),
    Target(
        "`expert_scores`, all kinds, times window attention alone",
        "≤ 1.5",
        ratio(
            "moekv, window attention alone", inverse=True, **WINDOW | {"variant": "all four kinds"}
        ),
        at_most(1.5),
        2,
    ),
    Target(
        "`ragged_attention`, one query, of the copy bandwidth",
        "≥ 0.5",
        ratio(COPY, **RAGGED),
        at_least(0.5),
        2,
    ),
    Target(
        "… times as fast as SDPA with `enable_gqa`",
        "≥ 10",
        ratio("SDPA, enable_gqa", **RAGGED),
        at_least(10),
    ),
    Target(
        "… as SDPA on repeated keys and values",
        "≥ 10",
        ratio("SDPA, keys and values repeated", **RAGGED),
        at_least(10),
    ),
    Target("time per token, 128k over 8k", "≤ 1.1", all_scalings(8192), at_most(1.1), 2),
    Target(
        "… 128k over 32k, past the processor's caches",
        "≤ 1.1",
        all_scalings(32768),
        at_most(1.1),
        2,
    ),
]


@dataclass
class Judged:
    """What was measured of a target."""

    found: Sequence[tuple[str, float]]
    target: Target

    @property
    def met(self) -> bool:
        """Whether all of it will do."""
        return all(self.target.met(value) for _, value in self.found)

    def __str__(self) -> str:
        """All numbers, or of many those that will not do."""
        shown = list(self.found)
        if len(shown) > 6:
            shown = [(label, value) for label, value in shown if not self.target.met(value)]
        texts = [f"{label} {value:.{self.target.digits}f}" for label, value in shown]
        if rest := len(self.found) - len(shown):
            texts.append(f"{'all' if not shown else 'the other'} {rest} met")
        return ", ".join(texts)


def verdict(met: bool) -> str:
    """A word for the table."""
    return "met" if met else "**missed**"


def targets_table(kernels: Kernels, imports: Sequence[Row]) -> Iterator[str]:
    """What was to be reached, and what was measured; the most threads decide."""
    yield "| what | target | 2 threads, by the clock | 1 thread, processor time | |"
    yield "|---|---|---|---|---|"
    for target in TARGETS:
        two, one = (Judged(list(target.values(kernels.of(n))), target) for n in (2, 1))
        if two.found or one.found:
            met = (two if two.found else one).met
            yield f"| {target.what} | {target.aim} | {two} | {one} | {verdict(met)} |"
    if imports:
        shown = ", ".join(f"{row['what']} {1e3 * row['cpu_s'][1]:.0f}" for row in imports)
        met = all(row["cpu_s"][1] < 0.05 for row in imports)
        what = "imports beyond torch, transformers and kvpress, ms"
        yield f"| {what} | < 50 | | {shown} | {verdict(met)} |"


def op_tables(kernels: Kernels) -> Iterator[str]:
    """One table per op and variant: a line per case, a column per contender."""
    tables: dict[tuple[str, str], list[tuple[Row, dict[str, Row]]]] = {}
    for row, case in kernels.cells():
        tables.setdefault((row["op"], row["variant"]), []).append((row, case))
    for (op, variant), cases in tables.items():
        others = list(dict.fromkeys(name for _, case in cases for name in case if name != MOEKV))
        yield from ["", f"## `{op}`, {variant}", ""]
        columns = ["shape", "tokens", "", "threads", "moekv: ms (IQR)", "GB/s", "MiB", *others]
        yield f"| {' | '.join(columns)} |"
        yield f"|---|--:|---|--:|--:|--:|--:|{'--:|' * len(others)}"
        shapes = list(dict.fromkeys(row["shape"] for row, _ in cases))
        for row, case in sorted(cases, key=lambda found: _place(found[0], shapes)):
            ours = kernels.seconds(row)
            assert ours is not None
            first, _, third = row[clock(row)]
            yield (
                f"| {row['shape']} | {row['length']:,} | {row['dtype']} | {row['threads']} "
                f"| **{1e3 * ours:.3g}** ({1e3 * (third - first):.2g}) "
                f"| {row['moved'] / ours / 1e9:.1f} | {row['peak_bytes'] / 2**20:.1f} "
                f"| {' | '.join(_beside(kernels, ours, case.get(name)) for name in others)} |"
            )


def _place(row: Row, shapes: Sequence[str]) -> tuple[Any, ...]:
    """Where a case stands in its table."""
    return shapes.index(row["shape"]), row["dtype"], row["threads"], row["length"]


def _beside(kernels: Kernels, ours: float, other: Row | None) -> str:
    """Another contender's time as a multiple of moekv's, and its extra memory."""
    if other is None:
        return ""
    seconds = kernels.seconds(other)
    if seconds is None:
        return f"failed: {other['error'].split(':')[0]}"
    once = "*" if other["calls"] == 1 else ""
    return f"{seconds / ours:.2f}{once} ({other['peak_bytes'] / 2**20:.1f})"


def plot_ops(kernels: Kernels, path: Path) -> bool:
    """Draw time over length for every op on one model's shape; False: too few lengths."""
    gate, select = {"op": "gating_topk", "dtype": "bf16"}, {"op": "select_kept", "dtype": "fp32"}
    panels = [
        ("gating_topk, 8 experts", gate | {"shape": "8 experts"}),
        ("gating_topk, 128 experts", gate | {"shape": "128 experts"}),
        ("expert_scores, window attention", WINDOW),
        ("expert_scores, all kinds", WINDOW | {"variant": "all four kinds"}),
        ("mix_scores", {"op": "mix_scores", "dtype": "fp32", **LLAMA}),
        ("select_kept, per head", select | {"variant": "per head", **LLAMA}),
        ("kv_compact_", COMPACT),
        ("ragged_attention, one query", RAGGED),
    ]
    figure, axes = plt.subplots(2, 4, figsize=(17, 8.5))
    drawn = 0
    for (title, wanted), axis in zip(panels, axes.flat, strict=True):
        axis.set_prop_cycle(
            color=["tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown"]
        )  # red is moekv's
        lines: dict[str, list[tuple[int, float]]] = {}
        for row, case in kernels.cells(**wanted):
            for name, other in case.items():
                if seconds := kernels.seconds(other):
                    lines.setdefault(name, []).append((row["length"], 1e3 * seconds))
        for name, points in lines.items():
            color, width, style = {
                MOEKV: ("C3", 2.5, "-"),
                COPY: ("black", 1.5, ":"),
                REFERENCE: ("0.6", 1.5, "-"),
            }.get(name, (None, 1.2, "--" if name.startswith(COMPILED) else "-"))
            axis.plot(
                *zip(*sorted(points), strict=True),
                *("o",),
                label=name.removeprefix("kvpress "),
                color=color,
                linewidth=width,
                linestyle=style,
                markersize=3.5,
            )
            drawn = max(drawn, len(points))
        axis.set(title=title, xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
        lengths = sorted({length for points in lines.values() for length, _ in points})
        axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if lines:
            bottom, top = axis.get_ylim()
            axis.set_ylim(bottom, top * (top / bottom) ** 0.45)  # room for the legend
            axis.legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    if drawn > 1:
        figure.savefig(path, dpi=80)
    plt.close(figure)
    return drawn > 1


def prefill_tables(rows: Sequence[Row]) -> Iterator[str]:
    """Each method's prefill and its press, and moekv's stages."""
    yield ""
    yield (
        "Of each method: seconds of the prefill, the press included; time in the press's hooks, of "
        "the rest of the prefill; MiB at the peak. *ops* are operations of PyTorch in the hooks, "
        "per layer (`operations` in the results). KVComposePress does most of its work outside of "
        "hooks, where this does not see it."
    )
    for model, threads in dict.fromkeys((row["model"], row["threads"]) for row in rows):
        here = [row for row in rows if (row["model"], row["threads"]) == (model, threads)]
        lengths = sorted({row["length"] for row in here})
        found = {(row["method"], row["length"]): row for row in here if "error" not in row}
        measured = "processor time" if threads == 1 else "by the clock"
        yield from ["", f"### {model}, {threads} thread{'s' * (threads > 1)}, {measured}", ""]
        yield "| method | " + " | ".join(f"{n:,} tokens" for n in lengths) + " | ops |"
        yield "|---" + "|--:" * (len(lengths) + 1) + "|"
        for method in dict.fromkeys(row["method"] for row in here):
            of_method = [found[method, n] for n in lengths if (method, n) in found]
            if not of_method:
                continue
            entries = []
            for length in lengths:
                row = found.get((method, length))
                entries.append(
                    f"{row[clock(row)][1]:.2f} s, {share(row):.1%}, {row['peak_bytes'] / 2**20:.0f}"
                    if row
                    else "–"
                )
            name = f"**{method}**" if method.startswith("moekv") else method
            entries.append(f"{of_method[0].get('operations', 0):.0f}")
            yield f"| {name} | " + " | ".join(entries) + " |"
        failed = {row["method"]: row["error"] for row in here if "error" in row}
        if failed:
            yield ""
            yield "Not measured here: " + "; ".join(
                f"{method} ({error.split(':')[0]})" for method, error in failed.items()
            )
        yield from stages_table([found["moekv", n] for n in lengths if ("moekv", n) in found])


def stages_table(rows: Sequence[Row]) -> Iterator[str]:
    """Where moekv's press spends its time, and how that grows."""
    if not rows:
        return
    stages = [stage for stage in rows[0]["stages_s"] if stage != "press"]
    yield from ["", "Stages of moekv, ms by the clock:", ""]
    yield "| tokens | prefill | press | " + " | ".join(stages) + " | rest |"
    yield "|--:" * (len(stages) + 4) + "|"
    for row in rows:
        times = {stage: 1e3 * row["stages_s"].get(stage, [0] * 3)[1] for stage in stages}
        press = 1e3 * row["stages_s"]["press"][1]
        yield (
            f"| {row['length']:,} | {1e3 * row['wall_s'][1]:.0f} | {press:.1f} | "
            + " | ".join(f"{times[stage]:.1f}" for stage in stages)
            + f" | {press - sum(times.values()):.1f} |"
        )
    if len(rows) > 2:
        lengths = [row["length"] for row in rows]
        fit = statistics.linear_regression(lengths, [row["stages_s"]["press"][1] for row in rows])
        peaks = [(row["length"], row["peak_bytes"]) for row in rows]
        yield ""
        yield (
            f"The line through these times of the press (least squares): {1e3 * fit.intercept:.0f} "
            f"ms whatever the length, and {1e6 * fit.slope:.0f} ms for each 1,000 tokens. As a "
            f"power of the length, through logarithms: the press {exponent(_presses(rows)):.2f}, "
            f"the rest of the prefill {exponent(_others(rows)):.2f}, memory at the peak "
            f"{exponent(peaks):.2f}."
        )


def _presses(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """Length and seconds in the press."""
    return [(row["length"], row["stages_s"]["press"][1]) for row in rows]


def _others(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """Length and seconds of the prefill beside the press."""
    return [(row["length"], row["wall_s"][1] - row["stages_s"]["press"][1]) for row in rows]


def plot_prefill(rows: Sequence[Row], path: Path) -> bool:
    """Draw the share of every method at the length that has most of them."""
    here = [row for row in rows if row["model"] == "smollm2" and "error" not in row]
    # KVComposePress works outside of its hooks, too: its share says little.
    here = [row for row in here if row["method"] not in ("no press", "KVComposePress")]
    if not here:
        return False
    # All bars of one run: the length and the number of threads that have most methods.
    runs = [(row["length"], row["threads"]) for row in here]
    length, threads = max(runs, key=lambda run: (runs.count(run), run[0] == 2048))
    here = [row for row in here if (row["length"], row["threads"]) == (length, threads)]
    ranked = sorted(((share(row), row["method"]) for row in here), reverse=True)
    figure, axis = plt.subplots(figsize=(7.5, 0.26 * len(ranked) + 1))
    bars = axis.barh([m for _, m in ranked], [100 * part for part, _ in ranked], color="0.7")
    for bar, (part, method) in zip(bars, ranked, strict=True):
        bar.set_color("C3" if method.startswith("moekv") else "0.7")
        axis.text(100 * part, bar.get_y() + 0.4, f" {part:.1%}", va="center", fontsize=7)
    axis.set(
        xlabel=f"time in the press, % of the rest of a {length:,}-token prefill of SmolLM2, "
        f"{threads} thread{'s' * (threads > 1)}"
    )
    axis.margins(x=0.12)
    axis.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def origin(results: dict[str, Any]) -> str:
    """Where results come from."""
    found = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = sorted({row["threads"] for row in results["rows"]})
    return (
        f"`{results['command']}`: {found['cpu']}, {found['cores']} cores, kernels for "
        f"{found['capability']}, {' and '.join(map(str, threads))} thread(s), {found['system']}, "
        f"Python {found['python']}, {versions}; commit {found['commit']}, {found['date'][:10]}."
    )


def growth_table(rows: Sequence[Row]) -> Iterator[str]:
    """How time and memory of the ops grow with the tokens: exponents of fitted power laws."""
    series: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["contender"] == MOEKV and "error" not in row:
            label = row["shape"] if row["op"] == "gating_topk" else row["variant"]
            series.setdefault((row["op"], label, row["dtype"]), []).append(row)
    if not series:
        return
    lengths = sorted({row["length"] for row in rows})
    yield from ["", "## How time and memory grow", ""]
    yield (
        f"Least squares through logarithms, {lengths[0]:,} to {lengths[-1]:,} tokens of SmolLM2's "
        "shape, one thread: 1 is linear. Short rows lie below the line for what a call costs "
        "whatever its size, long ones above it once they leave the processor's caches. Memory is "
        "what a call takes beside its arguments, results included; below a MiB it is not fitted."
    )
    ends = f"ms at {lengths[0]:,} | at {lengths[-1]:,}"
    yield from ["", f"| op | | | exponent of time | {ends} | exponent of memory | MiB |"]
    yield "|---|---|---|--:|--:|--:|--:|--:|"
    for (op, label, dtype), found in series.items():
        found.sort(key=lambda row: row["length"])
        times = [(row["length"], row["cpu_s"][1]) for row in found]
        sizes = [(row["length"], row["peak_bytes"]) for row in found if row["peak_bytes"] > 2**20]
        memory = f"{exponent(sizes):.2f}" if len(sizes) > 1 else "–"
        yield (
            f"| `{op}` | {label} | {dtype} | {exponent(times):.2f} | {1e3 * times[0][1]:.3g} "
            f"| {1e3 * times[-1][1]:.3g} | {memory} | {found[-1]['peak_bytes'] / 2**20:.1f} |"
        )


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Slope of a line through logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def threads_table(kernels: Kernels) -> Iterator[str]:
    """By how much two threads are faster than one, of the cases measured on both."""
    gains: dict[str, list[float]] = {}
    one = {_case(row): row for row, _ in kernels.of(1).cells()}
    for row, _ in kernels.of(2).cells():
        if (same := one.get(_case(row))) is not None:
            gain = same["cpu_s"][1] / row["wall_s"][1]
            gains.setdefault(f"{row['op']}, {row['variant']}", []).append(gain)
    if not gains:
        return
    yield from ["", "## From one thread to two", ""]
    yield (
        "Two threads by the clock over one's processor time, in runs of their own, other processes "
        "beside them: read them as rough. Beyond two threads there is arithmetic alone: keys are "
        "cut into blocks of at most 384 of a head, 32,768 tokens of 8 heads into 688 units or "
        "more. 16 threads have 43 each and finish together, until the memory's bandwidth is the "
        "limit."
    )
    yield from [
        "",
        "| op | cases | times as fast, median | least | most |",
        "|---|--:|--:|--:|--:|",
    ]
    for op, found in gains.items():
        numbers = f"{statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f}"
        yield f"| {op} | {len(found)} | {numbers} |"


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("op", "variant", "shape", "length", "dtype"))


def cpp_table(rows: Sequence[Row]) -> Iterator[str]:
    """The C++ kernels alone, on every instruction set, beside a copy of as many bytes."""
    if not rows:
        return
    yield from ["", "## The C++ kernels alone", ""]
    yield (
        "`make bench-cpp` (libbenchmark-dev; `-Dbenchmark_DIR=` for another place): no PyTorch, no "
        "Python, one thread, Llama-3.1-8B's attention in bf16. What a kernel writes is compared "
        "with what the one without vector instructions writes before it is timed. Nanoseconds a "
        "token, GB/s of what has to be read and written, and times the speed of `memcpy` over as "
        "many bytes."
    )
    isas = list(dict.fromkeys(row["isa"] for row in rows if row["isa"] != "copy"))
    found = {(row["kernel"], row["tokens"], row["isa"]): row for row in rows}
    yield from ["", f"| kernel | tokens | {' | '.join(isas)} |", f"|---|--:{'|--:' * len(isas)}|"]
    for kernel, tokens in dict.fromkeys((row["kernel"], row["tokens"]) for row in rows):
        copy = found[kernel, tokens, "copy"]["bytes_per_s"]
        cells = []
        for isa in isas:
            row = found[kernel, tokens, isa]
            speed, ns = row["bytes_per_s"], 1e9 * row["cpu_s"] / tokens
            shown = f"{ns:,.0f}" if ns >= 100 else f"{ns:.3g}"
            cells.append(f"{shown} ns, {speed / 1e9:.2f}, {speed / copy:.2g} x")
        yield f"| {kernel} | {tokens:,} | {' | '.join(cells)} |"


def record_cpp(path: Path) -> None:
    """Take over what `make bench-cpp` has written: the median of repetitions, if there are any."""
    found = json.loads(path.read_text())["benchmarks"]
    if any(each["run_type"] == "aggregate" for each in found):
        found = [each for each in found if each.get("aggregate_name") == "median"]
    scale = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
    rows = []
    for each in found:
        kernel, isa, tokens = each["run_name"].rsplit("/", 2)
        seconds = each["cpu_time"] * scale[each["time_unit"]]
        row = {"kernel": kernel, "isa": isa, "tokens": int(tokens), "cpu_s": seconds}
        rows.append(row | {"threads": 1, "bytes_per_s": each["bytes_per_second"]})
    write_results(RESULTS / "cpp.json", "make bench-cpp", rows)


def render(folder: Path, page: Path) -> None:
    """Write the pages and their plots."""
    files = {
        name: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}*.json"))]
        for name in ("kernels", "prefill", "imports", "decode", "memory", "growth", "cpp")
    }
    rows = {
        name: [row | {"run": file["command"]} for file in files[name] for row in file["rows"]]
        for name in files
    }
    recorded = folder.resolve() == RESULTS
    steps = [row for row in rows["decode"] if "step" in row]  # batches have none
    measured = overview.Measured(rows["prefill"], steps, rows["memory"])
    pages = {
        "": overview.page(measured, page),
        "-prefill": prefill_page(rows["prefill"], files["prefill"], page, recorded),
        "-ops": ops_page(rows, files, page, recorded),
    }
    for kind, lines in pages.items():
        page.with_stem(page.stem + kind).write_text("\n".join(lines) + "\n")


def _notes(path: Path, recorded: bool) -> Sequence[str]:
    """What was written about the recorded results goes with these alone."""
    return ["", path.read_text().strip()] if recorded else []


def prefill_page(
    rows: Sequence[Row], files: Sequence[dict[str, Any]], page: Path, recorded: bool
) -> Iterator[str]:
    """What a press adds to a prefill."""
    yield from ["# What a press adds to a prefill", ""]
    yield (
        f"What [{page.name}]({page.name}) sums up. All methods of a table took turns in one "
        "process. Medians: on one thread of processor time, which other processes do not stretch, "
        "on two by the clock."
    )
    if rows and plot_prefill(rows, page.with_name("performance-prefill.png")):
        yield from ["", "![share of the press in a prefill](performance-prefill.png)"]
    yield from _notes(PREFILL_NOTES, recorded)
    if rows:
        yield from ["", "## Prefill"]
        yield from prefill_tables(rows)
    yield from ["", "## Where it was measured", ""]
    yield from (f"- {origin(file)}" for file in files)


def ops_page(
    rows: dict[str, list[Row]],
    files: dict[str, list[dict[str, Any]]],
    page: Path,
    recorded: bool,
) -> Iterator[str]:
    """All tables of the ops."""
    kernels = Kernels(rows["kernels"])
    yield from ["# Every op beside its peers", ""]
    yield (
        f"What [{page.name}]({page.name}) sums up. All contenders of a table took turns in one "
        "process, and moekv's results were checked before anything was timed."
    )
    yield from ["", "## Targets", "", *targets_table(kernels, rows["imports"])]
    yield from _notes(OPS_NOTES, recorded)
    if plot_ops(kernels.of(kernels.threads), page.with_name("performance-ops.png")):
        yield from ["", "![time of every op over the number of tokens](performance-ops.png)"]
    yield from growth_table(rows["growth"])
    yield from threads_table(kernels)
    yield from cpp_table(rows["cpp"])
    yield from ["", "# Tables", ""]
    yield (
        "Beside moekv's milliseconds (and their "
        "interquartile range, IQR) each contender's time as a multiple of them, and its extra MiB "
        "in brackets; with an asterisk where it was called once, being slow. One thread: "
        "processor time; two: by the clock. GB/s counts the bytes that must be read or written, "
        "each as often as the algorithm needs it; *copy* is a plain copy that reads and writes as "
        "many. Extra memory is what the process's resident set grows by at its peak, results "
        "included."
    )
    yield from op_tables(kernels)
    yield from ["", "## Where it was measured", ""]
    for name in ("kernels", "growth", "cpp", "imports"):
        yield from (f"- {origin(file)}" for file in files[name])


def main() -> None:
    """Render the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--cpp", type=Path, help="record these results of make bench-cpp first")
    args = parser.parse_args()
    if args.cpp:
        record_cpp(args.cpp)
    render(args.results, args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

"""Render docs/performance.md, tables and plots, from the JSON in benchmarks/results.

python -m benchmarks.report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.kernels.cases import COMPILED, COPY, MOEKV, REFERENCE
from benchmarks.measure import RESULTS, ROOT

PAGE = ROOT / "docs" / "performance.md"
NOTES = Path(__file__).with_name("performance-notes.md")

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

    def of_most_threads(self) -> Kernels:
        """Keep the rows of the largest number of threads."""
        return Kernels([row for row in self.rows if row["threads"] == self.threads])

    def cells(self, **wanted: Any) -> Iterator[tuple[Row, dict[str, Row]]]:
        """Cases with these properties: one of their rows, and all of them by contender."""
        keys = ("op", "variant", "shape", "length", "dtype", "threads")
        cases: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in self.rows:
            if all(row[key] == value for key, value in wanted.items()):
                cases.setdefault(tuple(row[key] for key in keys), {})[row["contender"]] = row
        for case in cases.values():
            yield case[MOEKV], case

    def seconds(self, row: Row | None) -> float | None:
        """Median time, see :func:`clock`."""
        return None if row is None or "error" in row else float(row[clock(row)][1])


def clock(row: Row) -> str:
    """On one thread processor time, which other processes do not stretch; else the wall's."""
    return "cpu_s" if row["threads"] == 1 else "wall_s"


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
        for row, case in kernels.cells(**wanted):
            ours, theirs = kernels.seconds(row), kernels.seconds(case.get(other))
            if ours and theirs:
                label = row["shape"] if row["op"] == "gating_topk" else f"{row['length'] // 1024}k"
                yield label, ours / theirs if inverse else theirs / ours

    return values


def memory(other: str, **wanted: Any) -> Callable[[Kernels], Iterator[tuple[str, float]]]:
    """Peak extra memory of moekv over another contender's."""

    def values(kernels: Kernels) -> Iterator[tuple[str, float]]:
        for row, case in kernels.cells(**wanted):
            theirs = case.get(other, {}).get("peak_bytes")
            if theirs:
                yield f"{row['length'] // 1024}k", row["peak_bytes"] / theirs

    return values


def extra_bytes(**wanted: Any) -> Callable[[Kernels], Iterator[tuple[str, float]]]:
    """Peak extra memory in MiB."""

    def values(kernels: Kernels) -> Iterator[tuple[str, float]]:
        for row, _ in kernels.cells(**wanted):
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


def targets_table(
    kernels: Kernels, prefill: Sequence[Row], imports: Sequence[Row]
) -> Iterator[str]:
    """What was to be reached, and what was measured."""
    yield "| what | target | measured | |"
    yield "|---|---|---|---|"
    for target in TARGETS:
        found = list(target.values(kernels))
        if not found:
            continue
        shown = ", ".join(f"{label} {value:.{target.digits}f}" for label, value in found)
        good = all(target.met(value) for _, value in found)
        yield f"| {target.what} | {target.aim} | {shown} | {'met' if good else '**missed**'} |"
    for row in prefill:
        if (row["model"], row["length"], row["method"]) == ("smollm2", 2048, "moekv"):
            share = row["cpu_share" if row["threads"] == 1 else "share"][1]
            verdict = "met" if share <= 0.02 else "**missed**"
            what = "whole press, of a prefill of 2,048 tokens of SmolLM2"
            yield f"| {what} | ≤ 2 % | {share:.1%} | {verdict} |"
    if imports:
        shown = ", ".join(f"{row['what']} {1e3 * row['cpu_s'][1]:.0f}" for row in imports)
        verdict = "met" if all(row["cpu_s"][1] < 0.05 for row in imports) else "**missed**"
        what = "imports beyond torch, transformers and kvpress, ms"
        yield f"| {what} | < 50 | {shown} | {verdict} |"


def op_tables(kernels: Kernels) -> Iterator[str]:
    """One table per op and variant: a line per case, a column per contender."""
    tables: dict[tuple[str, str], list[tuple[Row, dict[str, Row]]]] = {}
    for row, case in kernels.cells():
        tables.setdefault((row["op"], row["variant"]), []).append((row, case))
    for (op, variant), cases in tables.items():
        others = list(dict.fromkeys(name for _, case in cases for name in case if name != MOEKV))
        yield from ["", f"### `{op}`, {variant}", ""]
        columns = ["shape", "tokens", "", "threads", "moekv: ms (IQR)", "GB/s", "MiB", *others]
        yield f"| {' | '.join(columns)} |"
        yield f"|---|--:|---|--:|--:|--:|--:|{'--:|' * len(others)}"
        for row, case in cases:
            ours = kernels.seconds(row)
            assert ours is not None
            first, _, third = row[clock(row)]
            yield (
                f"| {row['shape']} | {row['length']:,} | {row['dtype']} | {row['threads']} "
                f"| **{1e3 * ours:.3g}** ({1e3 * (third - first):.2g}) "
                f"| {row['moved'] / ours / 1e9:.1f} | {row['peak_bytes'] / 2**20:.1f} "
                f"| {' | '.join(_beside(kernels, ours, case.get(name)) for name in others)} |"
            )


def _beside(kernels: Kernels, ours: float, other: Row | None) -> str:
    """Another contender's time as a multiple of moekv's, and its extra memory."""
    if other is None:
        return ""
    seconds = kernels.seconds(other)
    if seconds is None:
        return f"failed: {other['error'].split(':')[0]}"
    return f"{seconds / ours:.2f} ({other['peak_bytes'] / 2**20:.1f})"


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
    """Share of the prefill by method, and moekv's stages."""
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model]
        lengths = sorted({row["length"] for row in here})
        found = {(row["method"], row["length"]): row for row in here if "error" not in row}
        key = "cpu_share" if here[0]["threads"] == 1 else "share"
        yield from ["", f"### {model}", ""]
        yield (
            "Time in the press's hooks, of the rest of the prefill (peak extra memory in MiB). "
            "KVComposePress does most of its work outside of hooks, where this does not see it:"
        )
        yield ""
        yield "| method | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |"
        yield "|---" + "|--:" * len(lengths) + "|"
        for method in dict.fromkeys(row["method"] for row in here):
            entries = []
            for length in lengths:
                row = found.get((method, length))
                entries.append(
                    f"{row[key][1]:.1%} ({row['peak_bytes'] / 2**20:.0f})" if row else "–"
                )
            if any(entry != "–" for entry in entries):
                name = f"**{method}**" if method.startswith("moekv") else method
                yield f"| {name} | " + " | ".join(entries) + " |"
        failed = {row["method"]: row["error"] for row in here if "error" in row}
        if failed:
            yield ""
            yield "Not measured here: " + "; ".join(
                f"{method} ({error.split(':')[0]})" for method, error in failed.items()
            )
        stages = [
            s for s in found.get(("moekv", lengths[0]), {}).get("stages_s", {}) if s != "press"
        ]
        if stages:
            yield from ["", "Stages of moekv, ms:", ""]
            yield "| tokens | prefill | press | " + " | ".join(stages) + " | rest |"
            yield "|--:" * (len(stages) + 4) + "|"
            for length in lengths:
                if row := found.get(("moekv", length)):
                    times = {
                        stage: 1e3 * row["stages_s"].get(stage, [0] * 3)[1] for stage in stages
                    }
                    press = 1e3 * row["stages_s"]["press"][1]
                    yield (
                        f"| {length:,} | {1e3 * row['wall_s'][1]:.0f} | {press:.1f} | "
                        + " | ".join(f"{times[stage]:.1f}" for stage in stages)
                        + f" | {press - sum(times.values()):.1f} |"
                    )


def plot_prefill(rows: Sequence[Row], path: Path) -> bool:
    """Draw the share of every method at the length that has most of them."""
    here = [row for row in rows if row["model"] == "smollm2" and "error" not in row]
    # KVComposePress works outside of its hooks, too: its share says little.
    here = [row for row in here if row["method"] not in ("no press", "KVComposePress")]
    if not here:
        return False
    lengths = [row["length"] for row in here]
    length = 2048 if 2048 in lengths else max(lengths, key=lengths.count)
    key = "cpu_share" if here[0]["threads"] == 1 else "share"
    ranked = sorted(((r[key][1], r["method"]) for r in here if r["length"] == length), reverse=True)
    figure, axis = plt.subplots(figsize=(7.5, 0.26 * len(ranked) + 1))
    bars = axis.barh([m for _, m in ranked], [100 * share for share, _ in ranked], color="0.7")
    for bar, (share, method) in zip(bars, ranked, strict=True):
        bar.set_color("C3" if method.startswith("moekv") else "0.7")
        axis.text(100 * share, bar.get_y() + 0.4, f" {share:.1%}", va="center", fontsize=7)
    axis.set(xlabel=f"time in the press, % of the rest of a {length:,}-token prefill of SmolLM2")
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


def render(folder: Path, page: Path) -> None:
    """Write the page and its plots."""
    kernel_files = [json.loads(p.read_text()) for p in sorted(folder.glob("kernels*.json"))]
    prefill_files = [json.loads(p.read_text()) for p in sorted(folder.glob("prefill*.json"))]
    import_files = [json.loads(p.read_text()) for p in sorted(folder.glob("imports*.json"))]
    kernels = Kernels([row for file in kernel_files for row in file["rows"]])
    imports = [row for file in import_files for row in file["rows"]]
    prefill = [row for file in prefill_files for row in file["rows"]]
    lines = [
        "# Performance",
        "",
        "Rendered by `python -m benchmarks.report` from `benchmarks/results/`; `make bench` "
        "measures a subset anew. All contenders of a table took turns in one process, each result "
        "was checked before anything was timed, and only ratios within a table mean something. "
        "Medians, with the interquartile range (IQR) in brackets; on one thread of processor time, "
        "which other processes do not stretch, on two by the clock.",
        "",
        *(f"- {origin(file)}" for file in kernel_files + prefill_files + import_files),
        "",
        "## Targets",
        "",
        *targets_table(kernels.of_most_threads(), prefill, imports),
        "",
        NOTES.read_text().strip(),
        "",
        "## Ops",
        "",
        "Beside moekv's milliseconds each contender's time as a multiple of them, and its extra "
        "MiB in brackets. GB/s counts the bytes that must be read or written, each as often as the "
        "algorithm needs it; *copy* is a plain copy that reads and writes as many. Extra memory is "
        "what the process's resident set grows by at its peak, results included.",
    ]
    if plot_ops(kernels.of_most_threads(), page.with_name("performance-ops.png")):
        lines += ["", "![time of every op over the number of tokens](performance-ops.png)"]
    lines += op_tables(kernels)
    if prefill:
        lines += ["", "## Prefill"]
        if plot_prefill(prefill, page.with_name("performance-prefill.png")):
            lines += ["", "![share of the press in a prefill](performance-prefill.png)"]
        lines += prefill_tables(prefill)
    page.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Render the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    render(args.results, args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

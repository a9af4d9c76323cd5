"""The first page of performance: what people ask first, in one picture and one table.

`python -m benchmarks.report` writes it, with the pages below it. A target that was not measured in
a folder of results has no line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]

CALIBRATED, FREE, NONE = "moekv", "moekv training-free", "no press"
FULL, FLOOR, MODEL = "full cache", "16 tokens of context", "moekv, budget=model"
LARGE = "llama-shape"

PRESSES = {
    CALIBRATED: "moekv, calibrated router",
    FREE: "moekv, training-free",
    "SnapKVPress": "SnapKV",
    "ExpectedAttentionPress": "expected attention",
    "TOVAPress": "TOVA",
    "KeyDiffPress": "KeyDiff",
    "StreamingLLMPress": "StreamingLLM",
}
CACHES = {
    MODEL: "moekv, 16-bit pairs",
    f"{MODEL}, k8v4": "moekv, k8v4",
    "kvpress KeyDiff, uniform": "kvpress, one size for all heads",
    "kvpress AdaKV(KeyDiff), masked": "kvpress, head-wise: masked",
    "QuantizedCache, 8 bits (HQQ)": "QuantizedCache, 8 bits",
    "QuantizedCache, 4 bits (quanto)": "QuantizedCache, 4 bits",
    FLOOR: "no context: the model alone",
}


@dataclass
class Measured:
    """Rows of the end-to-end benchmarks, on one thread, by processor time."""

    prefill: Sequence[Row]
    decode: Sequence[Row]
    memory: Sequence[Row]

    def share(self, method: str, length: int, model: str = "smollm2") -> float | None:
        """Find a press's share of a prefill; of two runs that with more rounds."""
        wanted = (model, method, length)
        found = [r for r in self.prefill if (r["model"], r["method"], r["length"]) == wanted]
        found = [r for r in found if r["threads"] == 1 and "error" not in r]
        row = max(found, key=lambda row: row["calls"], default=None)
        return None if row is None else float(row["cpu_share"][1])

    def faster(self, method: str, other: str, length: int, step: str = "token") -> float | None:
        """Return how many times as fast a method is as another, in a run of SmolLM2 with both."""
        rows = [r for r in self.decode if (r["model"], r["length"]) == ("smollm2", length)]
        pair = _of_one_run([row for row in rows if row["step"] == step], other, method)
        return pair and pair[0]["cpu_s"][1] / pair[1]["cpu_s"][1]

    def first(self, method: str, length: int, model: str, *keys: str) -> float | None:
        """Return a number of a first token over that with the full cache, of a run with both."""
        rows = [r for r in self.memory if (r["model"], r["length"]) == (model, length)]
        pair = _of_one_run(rows, method, FULL)
        if pair is None:
            return None
        one, full = (row[keys[0]] if keys else row["cpu_s"][1] for row in pair)
        return float(one / full)

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Return the contexts of SmolLM2 in some rows."""
        return sorted({row["length"] for row in rows if row["model"] == "smollm2"})


def _of_one_run(rows: Sequence[Row], *methods: str) -> list[Row] | None:
    """Find the rows of these methods in the run that has most of any: only there they compare."""
    runs: dict[str, dict[str, Row]] = {}
    for row in rows:
        runs.setdefault(row.get("run", ""), {})[row["method"]] = row
    able = [run for run in runs.values() if set(methods) <= set(run)]
    return [max(able, key=len)[name] for name in methods] if able else None


@dataclass
class Question:
    """What is asked, the target, and the numbers that answer it, each with a label."""

    what: str
    aim: str
    numbers: Callable[[Measured], Iterator[tuple[str, float | None]]]
    met: Callable[[float], bool]
    form: str = "{:.2f}"

    def line(self, measured: Measured) -> str | None:
        """Answer it; None: it was not measured."""
        found = [(label, x) for label, x in self.numbers(measured) if x is not None]
        if not found:
            return None
        texts = ", ".join(f"{label} {self.form.format(number)}".strip() for label, number in found)
        verdict = "met" if all(self.met(number) for _, number in found) else "**missed**"
        return f"| {self.what} | {self.aim} | {texts} | {verdict} |"


def _size(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)


def _shares(length: int, model: str, names: Sequence[str]) -> Any:
    def numbers(measured: Measured) -> Iterator[tuple[str, float | None]]:
        for name in names:
            share = measured.share(name, length, model)
            # Of a single press there is no more to say: no router fits random weights.
            yield PRESSES[name].removeprefix("moekv, ") if len(names) > 1 else "", share

    return numbers


def _tokens(method: str, other: str = FULL) -> Any:
    def numbers(measured: Measured) -> Iterator[tuple[str, float | None]]:
        for length in measured.lengths(measured.decode):
            yield _size(length), measured.faster(method, other, length)

    return numbers


def _attention(pairs: str) -> Any:
    ours = "ragged_attention, a quarter, ragged"

    def numbers(measured: Measured) -> Iterator[tuple[str, float | None]]:
        for length in (8192, 32768):
            yield (
                _size(length),
                measured.faster(f"{ours}, {pairs}", ours, length, "attention"),
            )

    return numbers


def _streaming(*keys: str) -> Any:
    def numbers(measured: Measured) -> Iterator[tuple[str, float | None]]:
        for budget in ("uniform", "budget=head", "budget=model"):
            name = f"moekv, {budget}, streaming"
            yield budget, measured.first(name, 32768, "smollm2", *keys)

    return numbers


def _chunks(measured: Measured) -> Iterator[tuple[str, float | None]]:
    for size in (512, 4096):
        name = f"{MODEL}, chunks of {size}"
        yield f"of {size:,}", measured.first(name, 131072, "small-shape")


def at_most(bound: float) -> Callable[[float], bool]:
    """What says that a number is within a bound."""
    return lambda number: number <= bound


def at_least(bound: float) -> Callable[[float], bool]:
    """What says that a number reaches a bound."""
    return lambda number: number >= bound


QUESTIONS = [
    Question(
        "the press, of the rest of a prefill of 2,048 tokens of SmolLM2",
        "≤ 3 %",
        _shares(2048, "smollm2", (CALIBRATED, FREE)),
        at_most(0.03),
        "{:.1%}",
    ),
    Question(
        "… of 8,192 tokens of Llama-3.1-8B's shape",
        "≤ 0.7 %",
        _shares(8192, LARGE, (CALIBRATED,)),
        at_most(0.007),
        "{:.2%}",
    ),
    Question(
        "a token, times as fast as with the full cache",
        "≥ 1.05",
        _tokens(MODEL),
        at_least(1.05),
    ),
    Question(
        "… as with kvpress's, of one size for all heads",
        "≥ 1",
        _tokens(MODEL, "kvpress KeyDiff, uniform"),
        at_least(1),
    ),
    Question(
        "… as with transformers' `QuantizedCache` of 8 bits",
        "≥ 1",
        _tokens(MODEL, "QuantizedCache, 8 bits (HQQ)"),
        at_least(1),
    ),
    Question(
        "a token of a compiled model, times as fast as of one that is not",
        "≥ 1",
        _tokens(f"{MODEL}, compiled", MODEL),
        at_least(1),
    ),
    Question(
        "… as with the full cache, compiled",
        "≥ 1.05",
        _tokens(f"{MODEL}, compiled", f"{FULL}, compiled"),
        at_least(1.05),
    ),
    Question(
        "attention over k8v8 pairs, times as fast as over 16 bits",
        "≥ 1.8 at 32k",
        _attention("k8v8"),
        at_least(1.8),
    ),
    Question("… over k8v4 pairs", "≥ 1.8 at 32k", _attention("k8v4"), at_least(1.8)),
    Question(
        "first token of 32k while streaming, of a plain prefill's time",
        "≤ 1.05",
        _streaming(),
        at_most(1.05),
    ),
    Question(
        "… the cache at its peak, of the full one's",
        "≤ 0.5",
        _streaming("cache_peak_bytes"),
        at_most(0.5),
    ),
    Question(
        "128k tokens in chunks, of one forward's time (two layers)",
        "≤ 1.2",
        _chunks,
        at_most(1.2),
    ),
]


def table(measured: Measured) -> Iterator[str]:
    """Questions and answers."""
    lines = [line for question in QUESTIONS if (line := question.line(measured))]
    if lines:
        yield "| three quarters removed, one thread, processor time | target | measured | |"
        yield "|---|---|---|---|"
        yield from lines


def draw(measured: Measured, path: Path) -> bool:
    """Draw the share of prefill and the speed of decoding over the context; False: too little."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    drawn = 0
    for axis, names, value in (
        (left, PRESSES, lambda name, n: (share := measured.share(name, n)) and 100 * share),
        (right, CACHES, lambda name, n: measured.faster(name, FULL, n)),
    ):
        rows = measured.prefill if axis is left else measured.decode
        axis.set_prop_cycle(color=["tab:blue", "tab:orange", "tab:green", "tab:purple", "0.5"])
        ticks: set[int] = set()
        for name, label in names.items():
            points = [(n, x) for n in measured.lengths(rows) if (x := value(name, n)) is not None]
            if len(points) < 2:
                continue
            drawn += 1
            ticks |= {length for length, _ in points}
            ours = name.startswith("moekv")
            style = {"color": "C3", "linewidth": 2.2} if ours else {"linewidth": 1.2}
            if name == FLOOR:
                style = {"color": "black", "linestyle": ":", "linewidth": 1.2}
            elif name in (FREE, f"{MODEL}, k8v4"):
                style["linestyle"] = "--"
            axis.plot(
                *zip(*points, strict=True),
                "o",
                ls=style.pop("linestyle", "-"),
                ms=3.5,
                label=label,
                **style,
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens of context")
        axis.set_xticks(sorted(ticks), [_size(n) for n in sorted(ticks)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if axis.lines:
            bottom, top = axis.get_ylim()
            room = (top / bottom) ** 0.35  # for the legend, where no line is
            axis.set_ylim(*((bottom / room, top) if axis is left else (bottom, top * room)))
            axis.legend(fontsize=8, loc="lower left" if axis is left else "upper left", ncols=2)
    left.set(title="what the press adds to a prefill, %")
    right.set(title="a token, times as fast as with the full cache")
    for axis, ticks in ((left, (1, 2, 5, 10, 20, 50)), (right, (0.25, 0.5, 1, 2, 4))):
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    figure.tight_layout()
    if drawn:
        figure.savefig(path, dpi=90)
    plt.close(figure)
    return drawn > 0


def page(measured: Measured, path: Path) -> Iterator[str]:
    """Write the first page, and its picture beside it."""
    yield from ["# Performance", ""]
    yield (
        "What a press costs before the first token and saves from then on: SmolLM2-135M on one "
        "thread of a CPU, all contenders taking turns in one process, medians of processor time. "
        "Only ratios within a run mean something."
    )
    picture = path.with_suffix(".png")
    if draw(measured, picture):
        yield from ["", f"![share of a prefill, speed of a token]({picture.name})"]
    yield from ["", *table(measured)]
    yield from [
        "",
        "Below: [the prefill](performance-prefill.md), where its time goes and why targets are "
        "missed; [every op](performance-ops.md) beside its peers, how time and memory grow, and "
        "the C++ kernels alone; [memory and decoding](memory.md), every method, batches and "
        "compiled models. `make bench` measures a subset anew in five minutes.",
    ]

"""``MoERouterPress.summary``: the main statistics in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moekv.press.reports import Stats
from moekv.units import size


def print_summary(name: str, stats: Stats) -> None:
    """Print statistics in about ten lines.

    Parameters
    ----------
    name : str
        Of the press, with its options.
    stats : Stats
        See ``MoERouterPress.get_stats``.
    """
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, line in _lines(stats).items():
        table.add_row(label, Text(line))
    console = Console()
    console.print(Text(name))
    console.print(table)


def _lines(stats: Stats) -> dict[str, str]:
    """Return the lines of the summary, by label."""
    budget, compression, cache = stats["budget"], stats["compression"], stats["cache"]
    layers = stats["layer_stats"]
    lines = {
        "router": stats["router"],
        "budget": f"{budget['used'] or 'not used yet'} (asked for: {budget['asked']})",
    }
    if not layers:
        return lines | {"so far": "nothing has been compressed"}
    pairs, removed = stats["pairs"], "no pair"
    if cache["evictions"]:
        removed = f"{compression['evicted']:.1%} of the pairs ({cache['evictions']:,})"
        if compression["folded"]:
            removed += f", {compression['folded']:.1%} of which joined others"
        elif pairs["used"] != "16":
            removed += f", which joined no others ({stats['fold']['why_not']})"
    if pairs["used"] not in (None, "16"):
        removed = f"{compression['ratio']:.1%} of the bytes, {removed}"
        lines["pairs"] = f"{pairs['used']} (asked for: {pairs['asked']})"
        if cache["bits_per_number"] is not None:
            lines["pairs"] += f", {cache['bits_per_number']:.1f} bits a number"
    ratings = stats["forward_count"]
    lines["removed"] = (
        f"{removed}: {size(compression['bytes_freed'])} of "
        f"{size(compression['bytes_before'])} in {ratings} rating{'s'[: ratings != 1]}"
    )
    held, allowed = cache["bytes_held"], cache["bytes_allowed"]
    lines["cache"] = "gone" if held is None else f"{size(held)} held"
    lines["cache"] += "" if allowed is None else f", {size(allowed)} allowed"
    if kept := {i: x["kept_pairs"] for i, x in layers.items() if x["kept_pairs"]}:
        sums = {i: sum(heads) for i, heads in kept.items()}
        least, most = min(sums, key=sums.__getitem__), max(sums, key=sums.__getitem__)
        heads = [n for numbers in kept.values() for n in numbers]
        lines["kept by layer"] = (
            f"{sums[least]:,} pairs (layer {least}) to {sums[most]:,} (layer {most})"
        )
        lines["kept by head"] = f"{min(heads):,} to {max(heads):,} pairs"
    parts = [x["expert_compression_stats"] for x in layers.values()]
    rates = _means([x["cache_hit_rates"] for x in parts])
    shares = _means([x["expert_usage"] for x in parts])
    lines["shares"] = _written({name: shares[name] for name in rates})  # of those that have acted
    lines["hit rates"] = _written(rates)
    if later := _means([x["later_hit_rates"] for x in parts]):
        lines["hit rates"] += f"; of later queries {_written(later)}"
    moved = [
        (abs(by), f"{name} {by:+.1%} in layer {index}")
        for index, layer in layers.items()
        for name, by in layer["router_stats"]["history_bias"].items()
    ]
    if moved and max(moved)[0]:
        lines["router"] += f"; hits move it: {max(moved)[1]}"
    lines["never chosen"] = ", ".join(stats["never_chosen"]) or "none"
    return lines


def _means(layers: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return each expert's mean over the layers in which it was measured."""
    known = {name: [x[name] for x in layers if not math.isnan(x[name])] for name in layers[0]}
    return {name: sum(found) / len(found) for name, found in known.items() if found}


def _written(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items())

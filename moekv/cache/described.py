"""Validation of a cache layer's description in a file, before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekv import ops
from moekv.cache.layer import CompressedLayer
from moekv.cache.parts import DTYPES, KINDS, OPTIONAL, WAITS, backend_of, notes_of

FLOATING = ("F32", "F16", "BF16")
"""Dtypes of pairs, hidden states and queries, as safetensors calls them."""

_MOST = 2**40  # tokens or pairs
_MOST_SLOTS = 2**24  # which are allocated
_NUMBERS = {"context_length", "run", "most", "first", "counted", "backend"}
_OPTIONAL = {"recent", "notes", "reader"}


def check(
    description: Any, found: Mapping[str, tuple[str, Sequence[int]]], *, within: str
) -> tuple[int, int, int, int, int]:
    """Validate the description of a layer before any tensor is read.

    Parameters
    ----------
    description : Any
        As a file has it.
    found : mapping
        Dtypes, as safetensors calls them, and shapes of the layer's tensors, by their names.
    within : str
        Names the layer, for messages.

    Returns
    -------
    batch, heads, key_dim, value_dim, length : int

    Raises
    ------
    ValueError
        It cannot have come from :func:`take_apart`; the message names the fault.
    """
    if not isinstance(description, dict) or description.get("kind") not in (*KINDS,):
        kind = description.get("kind") if isinstance(description, dict) else description
        raise ValueError(f"{within}: expected a kind among {', '.join(KINDS)}, got {kind!r:.99}")
    kind = KINDS[description["kind"]]
    compressed = issubclass(kind.layer, CompressedLayer)
    wanted = {"kind", *kind.numbers} | (_NUMBERS if compressed else set())
    named = set(description) - (_OPTIONAL if compressed else set())
    if "begin" in kind.tensors:
        named -= {WAITS}
    if named != wanted:
        raise ValueError(f"{within}: expected {sorted(wanted)}, got {sorted(named)!r:.300}")
    for name in (*kind.numbers, *(("context_length", "run", "most") if compressed else ())):
        if name == "pairs":
            _check_pairs(description[name], within)
        elif not (name == "most" and description[name] is None):
            _check_number(description[name], f"{within}: expected {name}")
    shapes = dict(kind.tensors)
    if compressed:
        _check_beside(description, within)
        shapes |= {"recent": "BMC", "asked": "BMQE"} if "recent" in description else {}
    own = {name: x for name, x in found.items() if not name.startswith("notes.")}
    if "begin" in shapes:
        shapes |= {name: letters for name, letters in OPTIONAL.items() if name in own}
    size = _sizes(own, shapes, within)
    if "pairs" in kind.numbers:
        _check_widths(description["pairs"], size, within)
    if WAITS in description:
        _check_waits(description, size, within)
    length = kind.length(description, size)
    _check_counts(description, size, length, within)
    if "notes" in description:
        _check_notes(description, found, size, length, within)
    elif len(own) != len(found):
        raise ValueError(f"{within}: expected no notes, got tensors of some")
    reader = description.get("reader")
    if not (reader is None or ("notes" in description and isinstance(reader, str))):
        raise ValueError(f"{within}: expected the name of a router for notes, got {reader!r:.99}")
    return size["B"], size["H"], size["D"], size["V"], length


def _check_number(number: Any, expected: str, least: int = 0, most: int = _MOST) -> None:
    if type(number) is not int or not least <= number <= most:
        raise ValueError(f"{expected} an integer from {least} to {most}, got {number!r:.99}")


def _check_pairs(pairs: Any, within: str) -> None:
    if pairs not in ops.PAIRS[1:]:
        known = ", ".join(ops.PAIRS[1:])
        raise ValueError(f"{within}: expected pairs among {known}, got {pairs!r:.99}")


def _check_widths(pairs: str, size: Mapping[str, int], within: str) -> None:
    """Check that codes and scales are those of keys and values of their size."""
    try:
        layout = ops.pair_layout(pairs, size["D"], size["V"])
    except ValueError as error:
        raise ValueError(f"{within}: {error}") from None
    wanted = layout.key_codes, layout.value_codes, layout.num_scales
    found = size["K"], size["W"], size["G"]
    if found != wanted:
        raise ValueError(
            f"{within}: expected codes and scales of {wanted} numbers for pairs {pairs!r}, got "
            f"{found}"
        )


def _check_rows(numbers: Any, batch: int, most: int, expected: str) -> None:
    if not isinstance(numbers, list) or len(numbers) != batch:
        raise ValueError(f"{expected} of {batch} rows, got {numbers!r:.99}")
    for number in numbers:
        _check_number(number, expected, most=most)


def _check_beside(description: dict[str, Any], within: str) -> None:
    """Check what only compressed layers have."""
    match description["counted"]:
        case [None | str(), int()]:
            pass
        case other:
            raise ValueError(f"{within}: expected counted pairs of statistics, got {other!r:.99}")
    if not isinstance(description["backend"], str):
        raise ValueError(f"{within}: expected a backend, got {description['backend']!r:.99}")
    backend_of(description)
    if "recent" in description:
        recent = description["recent"]
        if not isinstance(recent, dict) or set(recent) != {"size", "end", "counts"}:
            raise ValueError(
                f"{within}: expected size, end and counts of inputs, got {recent!r:.99}"
            )
        _check_number(recent["size"], f"{within}: expected remembered inputs", 1, _MOST_SLOTS)
        _check_number(recent["end"], f"{within}: expected an end of inputs")


def _check_waits(description: dict[str, Any], size: Mapping[str, int], within: str) -> None:
    """Check which tokens of a tail wait."""
    waits = description[WAITS]
    if not isinstance(waits, dict) or set(waits) != {"tokens", "stored"}:
        raise ValueError(f"{within}: expected tokens that wait, and stored ones, got {waits!r:.99}")
    most = min(size["N"], description["context_length"])
    _check_number(waits["tokens"], f"{within}: expected waiting tokens", most=most)
    expected = f"{within}: expected numbers of waiting tokens that are stored"
    _check_rows(waits["stored"], size["B"], waits["tokens"], expected)


def _sizes(
    found: Mapping[str, tuple[str, Sequence[int]]], shapes: Mapping[str, str], within: str
) -> dict[str, int]:
    """Sizes by their letters, of tensors which have to agree on them."""
    if set(found) != set(shapes):
        raise ValueError(f"{within}: expected tensors {sorted(shapes)}, got {sorted(found)!r:.300}")
    size: dict[str, int] = {}
    for name, letters in shapes.items():
        dtype, shape = found[name]
        dtypes = (DTYPES[name],) if name in DTYPES else FLOATING
        if dtype not in dtypes:
            raise ValueError(f"{within}: expected {name} in {' or '.join(dtypes)}, got {dtype}")
        wanted = [size.get(letter, n) for letter, n in zip(letters, shape, strict=False)]
        if list(shape) != wanted or len(shape) != len(letters):
            known = ", ".join(str(size.get(letter, letter)) for letter in letters)
            raise ValueError(f"{within}: expected {name} [{known}], got {list(shape)}")
        size |= zip(letters, shape, strict=True)
    if not all(size[letter] for letter in "BHDV"):
        raise ValueError(f"{within}: expected rows, heads and sizes above 0, got {size}")
    return size


def _check_counts(
    description: dict[str, Any], size: Mapping[str, int], length: int, within: str
) -> None:
    """Check that the numbers of a layer go together."""
    held = size["N"]
    context, run = description.get("context_length", 0), description.get("run", 0)
    evicted = description.get("evicted", 0)
    if not run <= context <= length or (evicted > context and "context_length" in description):
        raise ValueError(
            f"{within}: expected a context of at most {length} positions, with {evicted} pairs "
            f"evicted and a run of {run} within, got {context}"
        )
    if size.get("P", wanted := -(-context // 8)) != wanted:
        raise ValueError(
            f"{within}: expected {wanted} bytes for {context} positions, got {size['P']}"
        )
    if "window" in description:
        _check_number(description["window"], f"{within}: expected a window", 1)
        window = description["window"]
        most = length if window == 1 else min(length, window - 1)
        if held != most:
            raise ValueError(f"{within}: expected {most} pairs in a window, got {held}")
    if "slots" in description:
        slots = description["slots"]
        _check_number(slots, f"{within}: expected slots", max(held, 1), _MOST_SLOTS)
        if "seen" in description and held != slots:
            raise ValueError(f"{within}: expected {slots} slots, got {held}")
    if (first := description.get("first")) is not None:
        _check_rows(first, size["B"], length, f"{within}: expected first positions")
    if "recent" in description:
        recent = description["recent"]
        _check_rows(recent["counts"], size["B"], size["M"], f"{within}: expected counts of inputs")
        if size["M"] > recent["size"]:
            raise ValueError(f"{within}: expected {recent['size']} inputs, got {size['M']}")


def _check_notes(
    description: dict[str, Any],
    found: Mapping[str, tuple[str, Sequence[int]]],
    size: Mapping[str, int],
    length: int,
    within: str,
) -> None:
    notes, within = description["notes"], f"{within}, notes"
    if not isinstance(notes, dict) or not _OPTIONAL.isdisjoint(notes):
        raise ValueError(f"{within}: expected notes without notes, got {notes!r:.99}")
    kind = description["kind"].removesuffix(", biased")
    if notes.get("kind") != ("ragged" if kind == "quantised" else kind):
        raise ValueError(f"{within}: expected those of their layer, got {notes!r:.99}")
    noted = check(notes, notes_of(found), within=within)
    if noted[:4] != (size["B"], size["H"], 1, 1) or noted[4] > length:
        raise ValueError(
            f"{within}: expected one number for each of {length} positions, got {noted}"
        )
    # Where heads differ, tables say which pairs are theirs: see `put_together`.
    for name in ("keys", "stored_keys", "tail_keys", "key_codes"):
        noted_as = "notes.stored_keys" if name == "key_codes" else f"notes.{name}"
        if name not in found:
            continue
        shape = list(found[name][1][:-1])
        if name in ("keys", "tail_keys"):  # the last tokens may be without
            shape[2] -= length - noted[4]
        if list(found[noted_as][1][:-1]) != shape:
            raise ValueError(f"{within}: expected one for each pair, got other shapes")

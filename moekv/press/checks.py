"""Checks of single values, which name what was expected and what came."""

from collections.abc import Sequence


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless a value is among the choices."""
    if value not in choices:
        raise ValueError(f"expected {name} among {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: object, least: int) -> None:
    """Raise ``ValueError`` unless a value is an integer of 64 bits that is large enough."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected {name} an integer >= {least}, got {value!r}")
    if value >= 2**63:
        raise ValueError(f"expected {name} an integer of 64 bits, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise ``TypeError`` unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} True or False, got {value!r}")

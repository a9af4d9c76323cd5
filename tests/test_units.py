"""Numbers as people read them."""

import pytest

from moekv.units import kind, size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1,024.0 KiB"),
        (2**20, "1.0 MiB"),
        (5 * 2**28, "1.2 GiB"),
        (1234 * 2**30, "1,234.0 GiB"),
    ],
)
def test_bytes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_kinds() -> None:
    assert kind(3) == "int"
    assert kind(int) == "the class int, no instance of it"

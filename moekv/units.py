"""Numbers as people read them."""


def size(nbytes: int) -> str:
    """Write a number of bytes, in KiB, MiB or GiB of 1,024 of the one before."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << power:
            return f"{nbytes / (1 << power):,.1f} {unit}"
    return f"{nbytes / (1 << 10):,.1f} KiB"

"""Numbers and values as people read them."""


def size(nbytes: int) -> str:
    """Write a number of bytes, in KiB, MiB or GiB of 1,024 of the one before."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << power:
            return f"{nbytes / (1 << power):,.1f} {unit}"
    return f"{nbytes / (1 << 10):,.1f} KiB"


def kind(value: object) -> str:
    """Name what came in the place of something else: its type, or the class that it is."""
    if isinstance(value, type):
        return f"the class {value.__name__}, no instance of it"
    return type(value).__name__

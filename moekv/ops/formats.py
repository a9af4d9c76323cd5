"""How cached pairs are stored: in their own dtype, or quantised."""

from typing import NamedTuple

PAIRS = ("16", "k8v8", "k8v4", "k4v4")
"""Formats of stored pairs: 16, those of the model, and the bits of a quantised key and value."""

GROUP = 32
"""Channels that share a lo and a step in 4 bits."""

MAX_HEAD_DIM = 256
"""Channels of a head, at most, for which there are kernels that rate pairs."""

MAX_DIM = 1024
"""Channels of a quantised key or value, at most."""


MAX_FOLD_QUERIES = 256
"""Queries of a KV head by which evicted pairs are folded, at most."""


class PairLayout(NamedTuple):
    """What one quantised pair takes: bytes of codes, float16 scales."""

    key_bits: int
    value_bits: int
    key_codes: int
    value_codes: int
    key_scales: int
    value_scales: int

    @property
    def num_scales(self) -> int:
        """Scales of a pair: those of its key, and behind them those of its value."""
        return self.key_scales + self.value_scales

    @property
    def num_bytes(self) -> int:
        """Bytes of a pair, all told."""
        return self.key_codes + self.value_codes + 2 * self.num_scales


def pair_layout(pairs: str, head_dim: int, value_dim: int) -> PairLayout:
    """Return what one quantised pair takes.

    Parameters
    ----------
    pairs : str
        One of ``PAIRS``, but ``"16"``.
    head_dim, value_dim : int
        Channels of a key and of a value.

    Returns
    -------
    PairLayout

    Raises
    ------
    ValueError
        ``pairs`` is no quantised format, or a dim is odd where 4 bits share a byte.
    """
    if pairs not in PAIRS[1:]:
        raise ValueError(f"expected pairs to be one of {', '.join(PAIRS[1:])}, got {pairs!r}")
    bits = int(pairs[1]), int(pairs[3])
    codes, scales = [], []
    for name, dim, width in zip(("keys", "values"), (head_dim, value_dim), bits, strict=True):
        if width == 4 and dim % 2:
            raise ValueError(f"expected an even head dim of {name} in 4 bits, got {dim}")
        codes.append(dim * width // 8)
        scales.append(1 if width == 8 else 2 * -(-dim // GROUP))
    return PairLayout(*bits, *codes, *scales)


def largest_power_of_two(dim: int) -> int:
    """Return the largest power of two that divides a head dim: the width of its transform."""
    return dim & -dim

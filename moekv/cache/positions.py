"""Positions that the pairs of each head stand for: a bit for each position.

Pairs stand in the order of their positions, so that bits tell which is whose. A number for each
pair would take more: bits of T positions take ``T / 8`` bytes, a number 4 for each of the pairs
that are left of them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_MOST = 32  # positions for each pair: more than a number for each would take is not spent


def is_worth(shape: Sequence[int], num_pairs: int) -> bool:
    """Whether bits for heads and positions [B, H, T] are few enough beside so many pairs."""
    return math.prod(shape) <= _MOST * num_pairs


def pack(stays: Tensor) -> Tensor:
    """Pack [..., T] bool into [..., ceil(T / 8)] uint8, position 8 i + j in bit j of byte i."""
    *heads, length = stays.shape
    bits = functional.pad(stays.to(torch.uint8), (0, -length % 8)).view(*heads, -(-length // 8), 8)
    return (bits << _bit(stays)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, length: int) -> Tensor:
    """Read :func:`pack`'s bits as [..., T] bool."""
    bits: Tensor = packed[..., None] >> _bit(packed) & 1
    return bits.flatten(-2)[..., :length].bool()


def _bit(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def places_of(stays: Tensor, longest: int) -> Tensor:
    """Say where the pairs of positions stand among those of their head, right-aligned.

    Parameters
    ----------
    stays : Tensor [B, H, T], bool
        The positions that have pairs.
    longest : int
        L, at least as many as a head has.

    Returns
    -------
    Tensor [B, H, T], int64
        Of others, any place from 0 on.
    """
    stand = stays.cumsum(-1)
    return stand.add_(longest - 1 - stand[..., -1:]).clamp_(min=0)


def positions_of(stays: Tensor, longest: int) -> Tensor:
    """List the positions at which a mask is True.

    Parameters
    ----------
    stays, longest
        As of :func:`places_of`.

    Returns
    -------
    Tensor [B, H, L], int64
        Those of a shorter head at the right, behind zeros.
    """
    place = places_of(stays, longest).masked_fill_(~stays, longest)  # beyond the end
    position = torch.arange(stays.shape[-1], device=stays.device).expand_as(place)
    listed = place.new_zeros(*place.shape[:-1], longest + 1)
    return listed.scatter_(-1, place, position)[..., :longest]

"""Reference of ``expected_attention``."""

import torch
from torch import Tensor
from torch.nn import functional

from moekv.ops import checks
from moekv.ops.reference.common import TILE, widened
from moekv.ops.reference.precision import exact

REACH = 4
"""Pairs behind its own that a query is asked about in expected attention."""

SINKS = 4
"""First keys, which take much of every attention."""

SAMPLES = 60
"""Keys that stand for all others in the softmax's sum."""

_LEAST_SQUARE = 1e-36  # its root is a normal number


def sample_places(length: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the keys that represent a row, and the number of keys each represents.

    Short rows are taken whole. Longer ones have one place in each of ``SAMPLES`` equal parts,
    at an irregular offset (fractions of multiples of the golden ratio), so that no period of the
    text coincides with the sampling.

    Parameters
    ----------
    length : Tensor [...], int64

    Returns
    -------
    tuple of two Tensor [..., SINKS + SAMPLES]
        Places, int64, from 0, and weights, float32: 0 where a row has fewer keys.
    """
    length = length[..., None]
    i = torch.arange(SINKS + SAMPLES, device=length.device)
    part = i - SINKS
    fixed_point = part * 65536 + part * 40503 % 65536
    place = SINKS + fixed_point * (length - SINKS) // (SAMPLES * 65536)
    whole = length <= SINKS + SAMPLES
    place = torch.where(whole | (part < 0), i, place)
    weight = torch.where(part < 0, 1.0, (length - SINKS) / SAMPLES)
    return place, torch.where(whole, (i < length).float(), weight)


def rotated(queries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries [B, Hq, T, D] by [B or 1, T, R] in fp32, or float64 as they are."""
    numbers, count = widened(queries), cos.shape[-1]
    left, right = numbers[..., : count // 2], numbers[..., count // 2 : count]
    other = torch.cat([-right, left], -1)
    turned = numbers[..., :count] * cos[:, None] + other * sin[:, None]
    return torch.cat([turned, numbers[..., count:]], -1)


@exact
def expected_attention(
    queries: Tensor,
    keys: Tensor,
    start: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    scaling: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """Log of the attention [B, H, T] that pairs get from the queries of the tokens before them."""
    checks.expected_attention(queries, keys, start, cos, sin, scaling, softcap)
    if cos is not None and sin is not None:
        queries = rotated(queries, cos, sin).to(queries.dtype)
    batch, num_heads, num_keys, dim = keys.shape
    if keys.numel() == 0:
        return widened(keys).new_empty(batch, num_heads, num_keys)
    if start is None:
        start = torch.zeros(batch, dtype=torch.int32, device=keys.device)
    start = start.long().clamp(0, num_keys)[:, None]  # [B, 1]
    places, weight = sample_places(num_keys - start[:, 0])
    places = (start + places).clamp(max=num_keys - 1)[:, None, :, None]
    sample = widened(keys.gather(2, places.expand(-1, num_heads, -1, dim)))
    weight = weight[:, None, None, None]  # [B, 1, 1, 1, S]
    sampled = (num_keys - start > SINKS + SAMPLES)[..., None, None]  # [B, 1, 1, 1]
    near = functional.pad(keys, (0, 0, 0, REACH)).unfold(2, REACH + 1, 1)  # [B, H, T, D, REACH + 1]
    queries = queries.view(batch, num_heads, -1, num_keys, dim)
    position = torch.arange(num_keys, device=keys.device)
    steps = torch.arange(REACH + 1, device=keys.device)

    def logits(equation: str, a: Tensor, b: Tensor) -> Tensor:
        s = scaling * torch.einsum(equation, widened(a), widened(b))
        return softcap * torch.tanh(s / softcap) if softcap > 0 else s

    squares = []
    for begin in range(0, num_keys, TILE):
        tile, at = queries[:, :, :, begin : begin + TILE], position[begin : begin + TILE]
        band = logits("bhgtd,bhtdj->bhgtj", tile, near[:, :, begin : begin + TILE])
        all_keys = logits("bhgtd,bhsd->bhgts", tile, sample)
        # A key that is a sample, too, is one number: rounded alike where it is large.
        place = (at[:, None] + steps - start[..., None]).clamp(0, SINKS + SAMPLES - 1)  # [B, T, J]
        same = all_keys.gather(-1, place[:, None, None].expand_as(band))
        band = torch.where(sampled[..., None], band, same)
        band = band.masked_fill(at[:, None] + steps >= num_keys, -torch.inf)
        peak = torch.maximum(band.amax(-1), all_keys.amax(-1))[..., None]
        band = (band - peak).exp()
        total = ((all_keys - peak).exp() * weight).sum(-1)
        total = total + band.sum(-1).where(sampled, 0.0)  # the sample may have missed just those
        square = (band / total[..., None]).square().mean(2)
        squares.append(square.where((at >= start)[:, None, :, None], 0.0))
    square = torch.cat(squares, 2)  # [B, H, T, REACH + 1]
    got = [functional.pad(square[..., j], (j, 0))[..., :num_keys] for j in range(REACH + 1)]
    scores = sum(got[1:], got[0]).clamp(min=_LEAST_SQUARE).log() / 2
    return scores.where((position >= start)[:, None], 0.0)

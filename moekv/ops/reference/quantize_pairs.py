"""Reference of ``quantize_pairs``, and the way back."""

import torch
from torch import Tensor

from moekv.ops import row_checks
from moekv.ops.formats import GROUP, largest_power_of_two, pair_layout
from moekv.ops.reference.common import widened
from moekv.ops.reference.precision import exact


@exact
def quantize_pairs(keys: Tensor, values: Tensor, *, pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of keys and of values, and the scales of both."""
    row_checks.quantize_pairs(keys, values, pairs)
    layout = pair_layout(pairs, keys.shape[1], values.shape[1])
    encode = {8: _encode_8, 4: _encode_4}
    key_codes, key_scales = encode[layout.key_bits](widened(keys.detach()))
    value_codes, value_scales = encode[layout.value_bits](widened(values.detach()))
    return key_codes, value_codes, torch.cat([key_scales, value_scales], 1)


@exact
def dequantize_pairs(
    key_codes: Tensor,
    value_codes: Tensor,
    scales: Tensor,
    *,
    pairs: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Decode keys and values in fp32 (fp64 where that is asked for), then round."""
    row_checks.dequantize_pairs(key_codes, value_codes, scales, pairs, head_dim, value_dim, dtype)
    layout = pair_layout(pairs, head_dim, value_dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    decode = {8: _decode_8, 4: _decode_4}
    key_scales, value_scales = scales.to(wide).tensor_split([layout.key_scales], 1)
    keys = decode[layout.key_bits](key_codes, key_scales)
    values = decode[layout.value_bits](value_codes, value_scales)
    return keys.to(dtype), values.to(dtype)


def hadamard(rows: Tensor) -> Tensor:
    """Form sums and differences over each block of a power of two of channels, not normalised.

    Twice gives the rows again, times the width of the blocks.
    """
    num_rows, dim = rows.shape
    block = largest_power_of_two(dim)
    mixed, width = rows, block // 2
    while width > 0:
        first, second = mixed.reshape(num_rows, dim // (2 * width), 2, width).unbind(2)
        mixed = torch.stack([first + second, first - second], 2)
        width //= 2
    return mixed.reshape(num_rows, dim)


def _round_up(x: Tensor) -> Tensor:
    """Round to the float16 at or above, to infinity beyond the last."""
    near = x.half()
    bits = near.view(torch.int16).int()
    # Floats of one sign are ordered like their bits; above the last negative one is -0.
    above = torch.where(near == 0, 1, torch.where(bits < 0, bits - 1, bits + 1))
    moved = torch.where(near.to(x.dtype) < x, above, bits).to(torch.int16).view(torch.float16)
    return torch.where(near.isfinite(), moved, near)


def _all_or_none(scales: Tensor) -> Tensor:
    """Give NaN for all scales of a row of which one is none."""
    return torch.where(scales.isfinite().all(1, keepdim=True), scales, torch.nan)


def _codes(numbers: Tensor, steps: Tensor, least: int, most: int) -> Tensor:
    """Round ``numbers / steps``; 0 where there is no step, or it is none."""
    codes = (numbers / steps.to(numbers.dtype)).round().clamp(least, most)
    codes = torch.where((steps > 0) & codes.isfinite(), codes, 0.0)
    return codes.to(torch.int8)


def _encode_8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = _all_or_none(_round_up(rows.abs().amax(1, keepdim=True) / 127))
    return _codes(rows, scales, -127, 127).view(torch.uint8), scales


def _decode_8(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.view(torch.int8).to(scales.dtype) * scales


def _encode_4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Code the mean of sums and differences, which is never beyond the largest of the row.

    A byte holds a channel of a group's first half in its low bits, and the one as far into the
    second half in its high bits.
    """
    rows = hadamard(rows) / largest_power_of_two(rows.shape[1])
    groups = torch.split(rows, GROUP, 1)
    low = [-_round_up(-group.amin(1, keepdim=True)) for group in groups]
    steps = [
        _round_up((group.amax(1, keepdim=True) - lo.to(rows.dtype)) / 15)
        for group, lo in zip(groups, low, strict=True)
    ]
    both = [x for pair in zip(low, steps, strict=True) for x in pair]
    scales = _all_or_none(torch.cat(both, 1))
    packed = []
    for i, group in enumerate(groups):
        lo, step = scales[:, 2 * i, None], scales[:, 2 * i + 1, None]
        first, second = _codes(group - lo.to(rows.dtype), step, 0, 15).chunk(2, 1)
        packed.append((first | second << 4).view(torch.uint8))
    return torch.cat(packed, 1), scales


def _decode_4(codes: Tensor, scales: Tensor) -> Tensor:
    parts = []
    for i, part in enumerate(torch.split(codes, GROUP // 2, 1)):
        lo, step = scales[:, 2 * i, None], scales[:, 2 * i + 1, None]
        parts.append(torch.cat([part & 15, part >> 4], 1).to(scales.dtype) * step + lo)
    return hadamard(torch.cat(parts, 1))

"""The op ``quantize_pairs``, and the way back."""

import torch
from torch import Tensor

from moekv.ops import checks, reference, row_checks
from moekv.ops.backends import implementation
from moekv.ops.formats import pair_layout
from moekv.ops.registration import register, without_gradient

_refusing = without_gradient("quantize_pairs", reference.quantize_pairs)


def quantize_pairs(
    keys: Tensor, values: Tensor, *, pairs: str, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode cached pairs in 8 or 4 bits a channel, for ``ragged_attention``.

    8 bits: each key or value has one scale, its largest magnitude over 127. 4 bits: channels are
    mixed by a Hadamard transform [1]_ over blocks of the largest power of two that divides the head
    dim, which spreads outliers; every 32 channels then share a lo and a step. No number moves by
    more than half a scale, or half a step before the transform is undone.

    Parameters
    ----------
    keys : Tensor [N, D], float32, float16 or bfloat16
    values : Tensor [N, Dv], dtype of ``keys``
    pairs : str
        ``"k8v8"``, ``"k8v4"`` or ``"k4v4"``: the bits of a key's channel and of a value's.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``keys``.

    Returns
    -------
    tuple of Tensor
        ``key_codes [N, KB]`` and ``value_codes [N, VB]`` uint8, ``scales [N, M]`` float16, those of
        the key first. ``pair_layout`` gives KB, VB and M. A key or value with NaN, an infinity, or
        a scale beyond float16 has NaN for all its scales, and no other pair sees that: it
        decodes to NaN, and ``bias`` of ``ragged_attention`` can hide it. In 4 bits that begins
        beyond 65,504, the last float16, in 8 bits beyond 8.3 million. There is no gradient.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``keys`` are elsewhere.
    RuntimeError
        The backend is not available, ``pairs`` is no quantised format, an argument has a wrong
        shape, dtype or device, or a head dim is odd that is to have 4 bits.

    References
    ----------
    .. [1] Ashkboos et al., "QuaRot: Outlier-free 4-bit inference in rotated LLMs", 2024.
    """
    op = implementation("quantize_pairs", keys, backend)
    needs_gradient = keys.requires_grad or values.requires_grad
    if op is reference.quantize_pairs and torch.is_grad_enabled() and needs_gradient:
        op = _refusing
    key_codes, value_codes, scales = op(keys, values, pairs=pairs)
    return key_codes, value_codes, scales


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
    """Decode what ``quantize_pairs`` encoded, in plain PyTorch on any device.

    Parameters
    ----------
    key_codes, value_codes, scales : Tensor [N, KB], [N, VB] and [N, M]
    pairs : str
        The format that they are in.
    head_dim, value_dim : int
        Channels of a key and of a value.
    dtype : torch.dtype
        Of the result; arithmetic is float32, or float64 for float64.

    Returns
    -------
    tuple of Tensor
        ``keys [N, D]`` and ``values [N, Dv]``, NaN where a pair could not be encoded.

    Raises
    ------
    RuntimeError
        ``pairs`` is no quantised format, or a tensor has another shape or dtype than it has.
    """
    return reference.dequantize_pairs(
        key_codes,
        value_codes,
        scales,
        pairs=pairs,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
    )


def _fake(keys: Tensor, values: Tensor, *, pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    checks.native("quantize_pairs", "keys", keys)
    row_checks.quantize_pairs(keys, values, pairs)
    layout = pair_layout(pairs, keys.shape[1], values.shape[1])
    return (
        keys.new_empty(len(keys), layout.key_codes, dtype=torch.uint8),
        keys.new_empty(len(keys), layout.value_codes, dtype=torch.uint8),
        keys.new_empty(len(keys), layout.num_scales, dtype=torch.float16),
    )


register("quantize_pairs", _fake)

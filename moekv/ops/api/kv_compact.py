"""The op ``kv_compact_``."""

from torch import Tensor

from moekv.ops import checks
from moekv.ops.backends import implementation
from moekv.ops.registration import register


def kv_compact_(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    packed: bool = False,
    backend: str = "auto",
) -> None:
    """Move the kept pairs to the front, in place: no second buffer, as indices ascend.

    Parameters
    ----------
    keys : Tensor [B, H, T, D], float32, float16 or bfloat16
        The last dimension is dense. Written.
    values : Tensor [B, H, T, Dv]
        Like ``keys``. Written.
    indices : Tensor [B, H, n], or flat with ``offsets``, int32
        Kept positions, ascending in each row.
    offsets : Tensor [B * H + 1], int32, optional
        Where each row begins in ``indices``, as from :func:`select_kept`.
    packed : bool
        False: to the front of each row, whose other pairs keep their old contents or have been
        overwritten. True: all rows one after another to the front of the storage, of contiguous
        ``keys`` and ``values``.
    backend : str
        One of ``BACKENDS``; ``auto``: native kernels where they are, by the device of ``keys``.

    Raises
    ------
    ValueError
        ``backend`` is unknown, or ``keys`` are elsewhere.
    RuntimeError
        The backend is not available, or an argument has a wrong shape, dtype or device, or needs a
        gradient, or shares memory with another. On the CPU also where indices do not ascend or are
        not in [0, T): before anything has moved. On CUDA, where to check would be to wait, such an
        index is neither read nor moved.
    """
    op = implementation("kv_compact_", keys, backend)
    op(keys, values, indices, offsets, packed=packed)


def _fake(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    packed: bool = False,
) -> None:
    checks.native("kv_compact_", "keys", keys)
    checks.kv_compact_(keys, values, indices, offsets, packed)
    checks.native_rows("kv_compact_", "keys", keys)
    checks.native_rows("kv_compact_", "values", values)


register("kv_compact_", _fake, written=(0, 1))

"""Reference of ``kv_compact_``."""

import torch
from torch import Tensor

from moekv.ops import checks
from moekv.ops.reference.common import assert_on_cpu


def kv_compact_(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    packed: bool = False,
) -> None:
    """Move each row's kept pairs to the front, of the row or (``packed``) of the storage."""
    checks.kv_compact_(keys, values, indices, offsets, packed)
    batch, num_kv_heads, num_keys, _ = keys.shape
    if offsets is None:
        rows = torch.arange(batch * num_kv_heads + 1, device=keys.device)
        offsets = rows * indices.shape[2]
    offsets = offsets.long()
    position = indices.flatten().long()
    item = torch.arange(position.numel(), device=keys.device)
    row = torch.searchsorted(offsets[1:], item, right=True)
    valid = (position >= 0) & (position < num_keys)
    rising = (position.diff() > 0) | (row.diff() > 0)
    ends = (offsets[0] == 0) & (offsets[-1] == position.numel())
    assert_on_cpu(
        ends & (offsets.diff() >= 0).all(),
        f"moekv::kv_compact_: expected offsets ascending from 0 to {position.numel()}",
    )
    assert_on_cpu(
        valid.all() & rising.all(),
        f"moekv::kv_compact_: expected indices ascending in each row, between 0 and {num_keys - 1}",
    )
    target = item if packed else row * num_keys + item - offsets[row]
    source = torch.where(valid, row * num_keys + position, target)  # not valid: left in place

    def unravel(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row = flat // num_keys
        return row // num_kv_heads, row % num_kv_heads, flat % num_keys

    for pairs in (keys, values):
        pairs[unravel(target)] = pairs[unravel(source)]

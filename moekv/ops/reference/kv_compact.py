"""Reference of ``kv_compact_``."""

import torch
from torch import Tensor

from moekv.ops import checks
from moekv.ops.reference.common import assert_on_cpu
from moekv.ops.reference.precision import exact


@exact
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
    _check_memory(keys, values, indices, offsets)
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


def _check_memory(keys: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None) -> None:
    """Raise where moving pairs would write over others, or over what says where they go.

    By the addresses, as the kernels do: of tensors that have none nothing is known.
    """
    if torch.compiler.is_compiling() or type(keys) is not Tensor or keys.is_meta:
        return
    op = "moekv::kv_compact_"
    for name, pairs in (("keys", keys), ("values", values)):
        if _holds_twice(pairs):
            raise RuntimeError(
                f"{op}: expected {name} whose elements do not overlap, got strides {pairs.stride()}"
            )
    moved = _extent(keys), _extent(values)
    if _overlap(*moved):
        raise RuntimeError(
            f"{op}: expected keys and values in separate memory, got overlapping ranges"
        )
    for name, tensor in (("indices", indices), ("offsets", offsets)):
        if tensor is not None and any(_overlap(_extent(tensor), extent) for extent in moved):
            raise RuntimeError(
                f"{op}: expected {name} in memory apart from keys and values, got overlapping "
                "ranges"
            )


def _holds_twice(tensor: Tensor) -> bool:
    """Whether a dimension's step is shorter than what the dimensions with shorter ones span."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and tensor.numel():
            if stride < extent:
                return True
            extent += (size - 1) * stride
    return False


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    last = sum((size - 1) * stride for stride, size in steps)
    return begin, begin + (last + 1) * tensor.itemsize


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]

"""Buffers that grow, and copies of rows: shared by all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moekv.budget import Kept

_LEAST_ROOM = 64  # tokens


def storage_bytes(*tensors: Tensor) -> int:
    """Bytes of the storages under tensors, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def size_of(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Count the bytes and the numbers of tensors."""
    return sum(t.nbytes for t in tensors), sum(t.numel() for t in tensors)


def append(buffer: Tensor, length: int, states: Tensor, most: int | None) -> Tensor:
    """Write new pairs behind the first ``length`` of a buffer, or of a larger one if need be.

    A full buffer grows by an eighth, so that a pair is copied a bounded number of times however
    many tokens follow, and little memory is reserved in vain; where no more than ``most`` are
    expected, no more is reserved.

    As concatenating would, pairs of a wider dtype (under autocast, of any) promote the buffer's,
    and pairs that are to get gradients get them: then, and where the buffer may not be written to,
    it is copied.
    """
    batch, num_kv_heads, capacity, dim = buffer.shape
    if states.shape[:2] != (batch, num_kv_heads) or states.shape[3] != dim:
        raise ValueError(
            f"expected new pairs [{batch}, {num_kv_heads}, num_queries, {dim}] for this cache, "
            f"got {list(states.shape)}"
        )
    dtype = torch.promote_types(buffer.dtype, states.dtype)
    mixes = dtype == states.dtype or torch.is_autocast_enabled(states.device.type)
    if states.device != buffer.device or not mixes:
        raise ValueError(
            f"expected new pairs of {buffer.dtype} on {buffer.device} like the cache, "
            f"got {states.dtype} on {states.device}"
        )
    if torch.is_grad_enabled() and (states.requires_grad or buffer.requires_grad):
        return torch.cat([buffer[:, :, :length], states], dim=2)
    needed = length + states.shape[2]
    if needed > capacity or dtype != buffer.dtype or not is_writable(buffer):
        room = needed + max(needed // 8, _LEAST_ROOM)
        room = room if most is None else max(needed, min(room, most))
        grown = buffer.new_empty((batch, num_kv_heads, room, dim), dtype=dtype)
        grown[:, :, :length] = buffer[:, :, :length].detach()
        buffer = grown
    buffer.narrow(2, length, states.shape[2]).copy_(states.detach())  # less work than brackets
    return buffer


def is_writable(buffer: Tensor) -> bool:
    """Whether a tensor may be written to in place: in this mode, and without undoing gradients."""
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return not buffer.requires_grad


def writable(buffer: Tensor) -> Tensor:
    """Return a tensor that may be written to in place, or a copy of it."""
    return buffer if is_writable(buffer) else buffer.detach().clone()


def first_kept(kept: Kept) -> Tensor:
    """Find the first place that any head of each row keeps: [B], int64; T where none does."""
    batch, num_heads, length = kept.shape
    begin, end = kept.offsets[:-1].long(), kept.offsets[1:]
    place = functional.pad(kept.indices, (0, 1)).index_select(0, begin)
    return torch.where(begin < end, place, length).view(batch, num_heads).amin(1).long()


def gather_rows(pairs: Tensor, rows: Tensor) -> Tensor:
    """Copy rows of [B, H, T, D], numbered flat, into [n, D]."""
    # Whole rows of a flat view: several times faster on a CPU than torch.gather, and one pass where
    # compaction in place, which needs a copy to give memory back, takes two.
    return pairs.detach().reshape(-1, pairs.shape[-1]).index_select(0, rows)

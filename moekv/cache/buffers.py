"""What the layers share: buffers that grow, and rows that are copied."""

from torch import Tensor

_LEAST_ROOM = 64  # tokens


def storage_bytes(*tensors: Tensor) -> int:
    """Bytes of the storages under tensors, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def append(buffer: Tensor, length: int, states: Tensor, most: int | None) -> Tensor:
    """Write new pairs behind the first ``length`` of a buffer, or of a larger one if need be.

    A full buffer grows by an eighth, so that a pair is copied a bounded number of times however
    many tokens follow, and little memory waits in vain; where no more than ``most`` are expected,
    there is room for no more.
    """
    batch, num_kv_heads, capacity, dim = buffer.shape
    if states.shape[:2] != (batch, num_kv_heads) or states.shape[3] != dim:
        raise ValueError(
            f"expected new pairs [{batch}, {num_kv_heads}, num_queries, {dim}] for this cache, "
            f"got {list(states.shape)}"
        )
    if states.dtype != buffer.dtype or states.device != buffer.device:
        raise ValueError(
            f"expected new pairs of {buffer.dtype} on {buffer.device} like the cache, "
            f"got {states.dtype} on {states.device}"
        )
    needed = length + states.shape[2]
    if needed > capacity:
        room = needed + max(needed // 8, _LEAST_ROOM)
        room = room if most is None else max(needed, min(room, most))
        grown = buffer.new_empty((batch, num_kv_heads, room, dim))
        grown[:, :, :length] = buffer[:, :, :length]
        buffer = grown
    # Detached: a cache that recorded gradients would hold every step of a generation.
    buffer[:, :, length:needed] = states.detach()
    return buffer


def gather_rows(pairs: Tensor, rows: Tensor) -> Tensor:
    """Copy rows of [B, H, T, D], numbered flat, into [n, D]."""
    # Whole rows of a flat view: several times faster on a CPU than torch.gather, and one pass where
    # compaction in place, which needs a copy to give memory back, takes two.
    return pairs.detach().reshape(-1, pairs.shape[-1]).index_select(0, rows)

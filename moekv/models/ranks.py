"""The processes of tensor parallelism, among which the KV heads of a layer are shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from moekv.models.hooks import config_of, index_of, option


@dataclass(frozen=True)
class Ranks:
    """Processes that hold as many KV heads of a layer each, in the order of the heads.

    Attributes
    ----------
    mesh : DeviceMesh or None
        Of one dimension; None: a single process.
    rank, size : int
        Number of this process, and of all.
    """

    mesh: Any = None
    rank: int = 0
    size: int = 1

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """Join the parts of all processes, of equal shapes, along a dimension: bit for bit."""
        if self.size == 1:
            return part
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        distributed.all_gather(parts, part, group=self.mesh.get_group())
        return torch.cat(parts, dim)

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Sum the numbers of all processes, each in its place. Waits for the device."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.int64, device=self.mesh.device_type)
        distributed.all_reduce(summed, group=self.mesh.get_group())
        return summed.tolist()

    def lengths(self, own: list[list[list[int]]]) -> list[list[list[int]]]:
        """Join lengths of this process's heads, L times B times H, with those of the others."""
        if self.size == 1:
            return own
        part = torch.tensor(own, dtype=torch.int64, device=self.mesh.device_type)
        return self.gather(part, 2).tolist()

    def own(self, num_heads: int) -> slice:
        """Say which heads are this process's, which holds so many."""
        return slice(self.rank * num_heads, (self.rank + 1) * num_heads)


ALONE = Ranks()
"""A process that holds all heads."""


def ranks_of(mesh: Any, layer: nn.Module, num_heads: int) -> Ranks:
    """Find among which processes the KV heads of a layer are shared out.

    Parameters
    ----------
    mesh : DeviceMesh or None
        See ``moekv.models.weights.mesh_of``.
    layer : nn.Module
        An attention layer.
    num_heads : int
        KV heads that it has in this process.

    Returns
    -------
    Ranks
        ``ALONE`` where every process holds all of them.

    Raises
    ------
    ValueError
        The heads are shared out unevenly, or some are held by several processes.
    """
    if mesh is None:
        return ALONE
    size = mesh.size()
    total = _heads_in_all(layer, size)
    if total in (None, num_heads):
        return ALONE
    if total != num_heads * size:
        raise ValueError(
            f"expected {total} KV heads shared out evenly among {size} processes, or held by each, "
            f"got {num_heads} in layer {index_of(layer)} of this one; use fewer processes"
        )
    return Ranks(mesh, mesh.get_local_rank(), size)


def _heads_in_all(layer: Any, size: int) -> int | None:
    """Count the KV heads of a layer over all processes; None: not known."""
    key, dim = getattr(layer, "k_proj", None), getattr(layer, "head_dim", None)
    projected = getattr(key, "out_features", None)
    if key is not None and projected and dim:
        # It stays that of the whole weight, or, in some versions, becomes that of the part.
        is_part = getattr(key, "_hf_tp_plan", None) == "colwise" and len(key.weight) == projected
        return int(projected // dim) * (size if is_part else 1)
    config = config_of(layer)
    names = ["num_attention_heads"]
    if not hasattr(layer, "kv_b_proj"):  # latents are spread to as many heads as there are queries
        names.insert(0, "num_key_value_heads")
    for name in names:
        if (found := option(config, name)) is not None:
            return int(found[index_of(layer)] if isinstance(found, list) else found)
    return None

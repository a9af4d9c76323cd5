"""The ops in a model of your own, under torch.compile: no Hugging Face model is needed."""

import torch
from torch import Tensor

from moekv import ops


def evict(keys: Tensor, values: Tensor, queries: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Retain the pairs [B, H, T, D] that the queries [B, H, Q, D] attend to most."""
    attention = torch.softmax(queries @ keys.mT / keys.shape[-1] ** 0.5, dim=-1)
    scores = attention.mean(dim=2)  # [B, H, T]
    total = keep * scores.shape[1]
    indices, offsets = ops.select_kept(scores, total=total, sinks=4, window=16)
    ops.kv_compact_(keys, values, indices, offsets)  # to the front of each head, in place
    return indices, offsets


torch.manual_seed(0)
keys, values = torch.randn(2, 1, 8, 1024, 64)
queries = torch.randn(1, 8, 16, 64)
whole = keys.clone()

compiled = torch.compile(evict, fullgraph=True)
indices, offsets = compiled(keys, values, queries, 256)
lengths = offsets.diff().tolist()
print(f"pairs of each head: {lengths}, {sum(lengths)} in all")
first = indices[: lengths[0]].long()
print(
    "head 0 has its own pairs in front:", torch.equal(keys[0, 0, : lengths[0]], whole[0, 0, first])
)

"""References of the ops in plain PyTorch: one file per op.

Same argument order as the schemas of ``torch.ops.moekv``, any device, nothing that synchronises
with the host. Arithmetic is fp32, or fp64 on fp64 inputs: so the tests get a reference in higher
precision. ``docs/design.md`` specifies each in words.
"""

from moekv.ops.reference.expected_attention import expected_attention, sample_places
from moekv.ops.reference.expert_scores import ATTENTION, DIVERSITY, LAG, MASS, expert_scores
from moekv.ops.reference.fold_pairs import fold_pairs
from moekv.ops.reference.gating_topk import gate_probs, gating_topk, slot_counts
from moekv.ops.reference.kv_compact import kv_compact_
from moekv.ops.reference.mix_scores import mix_scores
from moekv.ops.reference.project_tokens import project_tokens
from moekv.ops.reference.quantize_pairs import dequantize_pairs, quantize_pairs
from moekv.ops.reference.ragged_attention import ragged_attention
from moekv.ops.reference.select_kept import select_kept

__all__ = [
    "ATTENTION",
    "DIVERSITY",
    "LAG",
    "MASS",
    "dequantize_pairs",
    "expected_attention",
    "expert_scores",
    "fold_pairs",
    "gate_probs",
    "gating_topk",
    "kv_compact_",
    "mix_scores",
    "project_tokens",
    "quantize_pairs",
    "ragged_attention",
    "sample_places",
    "select_kept",
    "slot_counts",
]

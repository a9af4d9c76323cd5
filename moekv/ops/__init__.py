"""The operators: native kernels for CPU and CUDA tensors, and references in PyTorch.

``api`` has a file per op: the public function, its shapes, its gradient; ``reference`` the same in
plain PyTorch. ``checks`` (with ``expect``, and ``row_checks`` for stored rows) validates the
arguments of both. ``formats`` defines the layout of stored rows, ``registration`` gives the native
ops shapes and gradients, ``backends`` loads the libraries and chooses between them. The functions
keep the argument order of the schemas and work under ``torch.compile(fullgraph=True)``.

May import nothing else of moekv.
"""

from moekv.ops.api.expected_attention import expected_attention
from moekv.ops.api.expert_scores import ScoreKind, expert_scores
from moekv.ops.api.fold_pairs import FoldPairs, fold_pairs
from moekv.ops.api.gating_topk import GatingTopk, gating_topk
from moekv.ops.api.kv_compact import kv_compact_
from moekv.ops.api.mix_scores import mix_scores
from moekv.ops.api.project_tokens import ProjectTokens, project_tokens
from moekv.ops.api.quantize_pairs import dequantize_pairs, quantize_pairs
from moekv.ops.api.ragged_attention import ragged_attention
from moekv.ops.api.select_kept import SelectKept, select_kept
from moekv.ops.backends import (
    BACKENDS,
    Backend,
    available_backends,
    check_backend,
    cpu_capability,
)
from moekv.ops.formats import MAX_FOLD_QUERIES, PAIRS, PairLayout, pair_layout

__all__ = [
    "BACKENDS",
    "Backend",
    "MAX_FOLD_QUERIES",
    "PAIRS",
    "FoldPairs",
    "GatingTopk",
    "PairLayout",
    "ProjectTokens",
    "ScoreKind",
    "SelectKept",
    "available_backends",
    "check_backend",
    "cpu_capability",
    "dequantize_pairs",
    "expected_attention",
    "expert_scores",
    "fold_pairs",
    "gating_topk",
    "kv_compact_",
    "mix_scores",
    "pair_layout",
    "project_tokens",
    "quantize_pairs",
    "ragged_attention",
    "select_kept",
]

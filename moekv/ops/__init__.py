"""What the kernels compute: native on CPU and CUDA tensors, plain PyTorch anywhere.

``api`` has a file per op: the public function, its shapes, its gradient; ``reference`` the same in
plain PyTorch; ``checks`` (with ``expect``, and ``row_checks`` for stored rows) is what both expect
of their arguments; ``formats`` says how rows are stored; ``registration`` tells torch what it has
to know of the native ops; ``backends`` loads the libraries and chooses. The functions keep the
argument order of the schemas and work under ``torch.compile(fullgraph=True)``.

The ground floor: nothing else of moekv is imported here.
"""

from moekv.ops.api.expected_attention import expected_attention
from moekv.ops.api.expert_scores import ScoreKind, expert_scores
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
from moekv.ops.formats import PAIRS, PairLayout, pair_layout

__all__ = [
    "BACKENDS",
    "Backend",
    "PAIRS",
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
    "gating_topk",
    "kv_compact_",
    "mix_scores",
    "pair_layout",
    "project_tokens",
    "quantize_pairs",
    "ragged_attention",
    "select_kept",
]

"""What the ops promise, in float64: references and bounds, written from docs/design.md.

Not from the code: nothing of moekv is imported here. Each function takes what an op was called with
and what it returned, and raises AssertionError where that is not what ``docs/design.md`` says. How
far a result may be off follows from the numbers: products in float32 are known up to a few units in
the last place of the sum of their absolute terms, and what comes of that is bounded, term by term.
"""

from pair_contracts import kv_compact_, ragged_attention, select_kept
from row_contracts import fold_pairs, quantize_pairs
from score_contracts import expected_attention, expert_scores
from token_contracts import gating_topk, mix_scores, project_tokens

__all__ = [
    "expected_attention",
    "expert_scores",
    "fold_pairs",
    "gating_topk",
    "kv_compact_",
    "mix_scores",
    "project_tokens",
    "quantize_pairs",
    "ragged_attention",
    "select_kept",
]

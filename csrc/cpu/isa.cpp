// All CPU kernels as one translation unit per instruction set; see kernels.h.
#include "expected_attention.h"
#include "expert_scores.h"
#include "fold_pairs.h"
#include "gating_topk.h"
#include "kernels.h"
#include "kv_compact.h"
#include "mix_scores.h"
#include "project_tokens.h"
#include "quantize_pairs.h"
#include "ragged_attention.h"
#include "select_kept.h"

namespace moekv::cpu::MOEKV_ISA {

extern const Kernels kernels{
    .gating_topk = gating_topk_kernel,
    .expert_scores = expert_scores_kernel,
    .expected_attention = expected_attention_kernel,
    .project_tokens = project_tokens_kernel,
    .mix_scores = mix_scores_kernel,
    .select_kept = select_kept_kernel,
    .kv_compact = kv_compact_kernel,
    .quantize_pairs = quantize_pairs_kernel,
    .fold_pairs = fold_pairs_kernel,
    .ragged_attention = ragged_attention_kernel,
};

}  // namespace moekv::cpu::MOEKV_ISA

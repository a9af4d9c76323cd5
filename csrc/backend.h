// What a backend (CPU or CUDA) offers to the ops. csrc/ops is compiled once per backend, with
// MOEKV_BACKEND naming the namespace.
#pragma once

#include <cstddef>

#include "params.h"

#ifndef MOEKV_BACKEND
#error "MOEKV_BACKEND must be cpu or cuda"
#endif

namespace moekv::MOEKV_BACKEND {

// A CUDA stream, or nothing on the CPU.
using Stream = void*;

// Throw where an expert is unknown, indices or offsets are not as kv_compact_ needs them, begin and
// end leave the stored rows. On CUDA, where a look at them would have to synchronise, these do
// nothing, and the kernels neither read nor write what is out of range.
void check_experts(const MixScoresParams& params);
void check_indices(const KvCompactParams& params);
void check_kept(const FoldPairsParams& params);
void check_row_ranges(const RaggedAttentionParams& params);

// Workspaces are allocated by the op as byte tensors and need no initialisation unless said so.
size_t gating_topk_workspace_bytes(const GatingTopkParams& params);
size_t expert_scores_workspace_bytes(const ExpertScoresParams& params);
size_t expected_attention_workspace_bytes(const ExpectedAttentionParams& params);
size_t project_tokens_workspace_bytes(const ProjectTokensParams& params);
size_t select_kept_workspace_bytes(const SelectKeptParams& params);
size_t kv_compact_workspace_bytes(const KvCompactParams& params);
size_t fold_pairs_workspace_bytes(const FoldPairsParams& params);
size_t ragged_attention_workspace_bytes(const RaggedAttentionParams& params);

void gating_topk(const GatingTopkParams& params, Stream stream);
void expert_scores(const ExpertScoresParams& params, Stream stream);
void expected_attention(const ExpectedAttentionParams& params, Stream stream);
void project_tokens(const ProjectTokensParams& params, Stream stream);
void mix_scores(const MixScoresParams& params, Stream stream);
void select_kept(const SelectKeptParams& params, Stream stream);
void kv_compact(const KvCompactParams& params, Stream stream);
void quantize_pairs(const QuantizePairsParams& params, Stream stream);
void fold_pairs(const FoldPairsParams& params, Stream stream);
void ragged_attention(const RaggedAttentionParams& params, Stream stream);

}  // namespace moekv::MOEKV_BACKEND

// How much scratch memory each CPU kernel asks of its caller.
#include "../backend.h"
#include "../sample_places.h"
#include "expert_scores_layout.h"
#include "fold_layout.h"
#include "gating_plan.h"
#include "ragged_plan.h"
#include "select_plan.h"
#include "token_plan.h"

namespace moekv::cpu {

size_t gating_topk_workspace_bytes(const GatingTopkParams& params) {
  const int64_t num_blocks = gating_plan(params).num_blocks;
  return num_blocks * (params.num_experts * (sizeof(float) + sizeof(int32_t)) + sizeof(float));
}

size_t expert_scores_workspace_bytes(const ExpertScoresParams& params) {
  return expert_scores_layout(params).bytes;
}

size_t expected_attention_workspace_bytes(const ExpectedAttentionParams& params) {
  const int64_t dim = round_up(params.head_dim, kDimMultiple);
  return params.batch * params.num_kv_heads * kPlaces * dim * kPackedBytes;
}

size_t project_tokens_workspace_bytes(const ProjectTokensParams& params) {
  return token_plan(params).floats * sizeof(float);
}

size_t select_kept_workspace_bytes(const SelectKeptParams& params) {
  const SelectPlan plan = select_plan(params);
  return plan.slots * plan.slot_bytes;
}

size_t kv_compact_workspace_bytes(const KvCompactParams&) { return 0; }

size_t fold_pairs_workspace_bytes(const FoldPairsParams& params) {
  return fold_layout(params).bytes;
}

size_t ragged_attention_workspace_bytes(const RaggedAttentionParams& params) {
  const RaggedPlan plan = ragged_plan(params);
  const int64_t partials = plan.num_items * plan.row_queries * ragged_partial_floats(params);
  return (plan.rows + 1) * sizeof(int64_t) +
         (ragged_query_floats(params) + ragged_coded_query_floats(params) + partials) *
             sizeof(float);
}

}  // namespace moekv::cpu

// How much scratch memory each CPU kernel asks of its caller.
#include <stdexcept>
#include <string>

#include "../backend.h"
#include "expert_scores_layout.h"
#include "ragged_plan.h"

namespace moekv::cpu {

size_t gating_topk_workspace_bytes(const GatingTopkParams&) { return 0; }
size_t expert_scores_workspace_bytes(const ExpertScoresParams& params) {
  return expert_scores_layout(params).bytes;
}
size_t select_kept_workspace_bytes(const SelectKeptParams&) { return 0; }
size_t kv_compact_workspace_bytes(const KvCompactParams&) { return 0; }

void check_row_ranges(const RaggedAttentionParams& params) {
  for (int64_t row = 0; row < params.batch * params.num_kv_heads; ++row) {
    const int64_t begin = params.begin[row], end = params.end[row];
    if (begin < 0 || end < begin || end > params.num_stored) {
      throw std::runtime_error("moekv::ragged_attention: expected 0 <= begin <= end <= " +
                               std::to_string(params.num_stored) + " stored rows, got begin " +
                               std::to_string(begin) + " and end " + std::to_string(end) +
                               " for row " + std::to_string(row));
    }
  }
}

size_t ragged_attention_workspace_bytes(const RaggedAttentionParams& params) {
  const RaggedPlan plan = ragged_plan(params);
  const int64_t partials = plan.num_items * plan.row_queries * ragged_partial_floats(params);
  return (plan.rows + 1) * sizeof(int64_t) +
         (ragged_query_floats(params) + partials) * sizeof(float);
}

}  // namespace moekv::cpu

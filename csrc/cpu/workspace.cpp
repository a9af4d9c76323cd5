// How much scratch memory each CPU kernel asks of its caller.
#include "../backend.h"

namespace moekv::cpu {

size_t gating_topk_workspace_bytes(const GatingTopkParams&) { return 0; }
size_t expert_scores_workspace_bytes(const ExpertScoresParams&) { return 0; }
size_t select_kept_workspace_bytes(const SelectKeptParams&) { return 0; }

}  // namespace moekv::cpu

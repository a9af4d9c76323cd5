// How gating_topk divides its tokens: into at most kMaxGatingBlocks blocks, whose size depends on
// the number of tokens alone. Each block counts for itself and the counts are added in order, so
// that results do not depend on the number of threads.
#pragma once

#include "../params.h"

namespace moekv::cpu {
namespace {

struct GatingPlan {
  int64_t block_tokens, num_blocks;
};

inline GatingPlan gating_plan(const GatingTopkParams& p) {
  constexpr int64_t kMinTokens = 256, kMaxBlocks = 256, kMultiple = 16;
  GatingPlan plan{};
  plan.block_tokens = (p.num_tokens + kMaxBlocks - 1) / kMaxBlocks;
  plan.block_tokens = (plan.block_tokens + kMultiple - 1) / kMultiple * kMultiple;
  if (plan.block_tokens < kMinTokens) plan.block_tokens = kMinTokens;
  plan.num_blocks = (p.num_tokens + plan.block_tokens - 1) / plan.block_tokens;
  return plan;
}

}  // namespace
}  // namespace moekv::cpu

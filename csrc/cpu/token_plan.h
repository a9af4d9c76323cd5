// How project_tokens divides a row of tokens: into at most kMaxChunks chunks of tokens, whose size
// depends on the number of tokens alone. Each has a sum of directions of its own, and the sums are
// added in order, so that results do not depend on the number of threads.
#pragma once

#include "../params.h"

namespace moekv::cpu {
namespace {

struct TokenPlan {
  int64_t chunk_tokens, num_chunks;
  int64_t sum_floats;     // of a chunk: channels, rounded up to whole pairs of vectors
  int64_t weight_floats;  // the weights in fp32: [P rounded up to 4, sum_floats]
  int64_t floats;         // of the workspace: the weights, then sums [B, num_chunks, sum_floats]
};

inline TokenPlan token_plan(const ProjectTokensParams& p) {
  constexpr int64_t kMinTokens = 128, kMaxChunks = 64, kTile = 16, kWidestPair = 32;
  TokenPlan plan{};
  plan.chunk_tokens = (p.num_tokens + kMaxChunks - 1) / kMaxChunks;
  plan.chunk_tokens = (plan.chunk_tokens + kTile - 1) / kTile * kTile;
  if (plan.chunk_tokens < kMinTokens) plan.chunk_tokens = kMinTokens;
  plan.num_chunks = (p.num_tokens + plan.chunk_tokens - 1) / plan.chunk_tokens;
  plan.sum_floats = (p.num_channels + kWidestPair - 1) / kWidestPair * kWidestPair;
  plan.weight_floats = (p.num_projections + 3) / 4 * 4 * plan.sum_floats;
  plan.floats = plan.weight_floats + p.batch * plan.num_chunks * plan.sum_floats;
  return plan;
}

}  // namespace
}  // namespace moekv::cpu

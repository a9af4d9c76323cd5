// How token_standout divides a row: into at most kMaxChunks chunks of tokens, whose size depends on
// the number of tokens alone. Each has a sum of directions of its own, and the sums are added in
// order, so that results do not depend on the number of threads.
#pragma once

#include "../params.h"

namespace moekv::cpu {
namespace {

struct StandoutPlan {
  int64_t chunk_tokens, num_chunks;
  int64_t sum_floats;  // of a chunk: channels, rounded up to whole pairs of vectors
  int64_t floats;      // of the workspace: [B, num_chunks, sum_floats]
};

inline StandoutPlan standout_plan(const TokenStandoutParams& p) {
  constexpr int64_t kMinTokens = 128, kMaxChunks = 64, kTile = 16, kWidestPair = 32;
  StandoutPlan plan{};
  plan.chunk_tokens = (p.num_tokens + kMaxChunks - 1) / kMaxChunks;
  plan.chunk_tokens = (plan.chunk_tokens + kTile - 1) / kTile * kTile;
  if (plan.chunk_tokens < kMinTokens) plan.chunk_tokens = kMinTokens;
  plan.num_chunks = (p.num_tokens + plan.chunk_tokens - 1) / plan.chunk_tokens;
  plan.sum_floats = (p.num_channels + kWidestPair - 1) / kWidestPair * kWidestPair;
  plan.floats = p.batch * plan.num_chunks * plan.sum_floats;
  return plan;
}

}  // namespace
}  // namespace moekv::cpu

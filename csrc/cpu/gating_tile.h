// What both ways through a tile of gating_topk's tokens share. A tile is as many tokens as a vector
// has lanes.
#pragma once

#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr int kTileTokens = Vec::kLanes;
constexpr int kRoundExperts = 4;  // chosen in one pass over the experts
constexpr float kMaxFloat = 3.4028234663852886e38f;

// Logits with NaN as -inf and +inf as the largest finite number.
inline Vec ordered(Vec logits) {
  const Vec lowest = Vec::set(-__builtin_inff()), largest = Vec::set(kMaxFloat);
  // In this order of operands max gives -inf for NaN.
  return min(max(logits, lowest), largest);
}

// The N highest ratings of each token in descending order, ties to the lower expert, and whose they
// are. ratings: [num_experts, kTileTokens], -inf: not to be chosen.
template <int N>
inline void highest_rated(const float* ratings, int64_t num_experts, float* chosen,
                          float* highest) {
  Vec best[N], expert[N];
  for (int j = 0; j < N; ++j) {
    best[j] = Vec::set(-__builtin_inff());
    expert[j] = Vec::set(0.0f);
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    const Vec rating = Vec::load(ratings + e * kTileTokens);
    const Vec id = Vec::set(static_cast<float>(e));
    Mask above[N];
    for (int j = 0; j < N; ++j) above[j] = rating > best[j];
    // Behind the first that is exceeded, everyone moves down by one.
    for (int j = N - 1; j > 0; --j) {
      best[j] = max(best[j], min(best[j - 1], rating));
      expert[j] = select(above[j - 1], expert[j - 1], select(above[j], id, expert[j]));
    }
    best[0] = max(best[0], rating);
    expert[0] = select(above[0], id, expert[0]);
  }
  for (int j = 0; j < N; ++j) {
    expert[j].store(chosen + j * kTileTokens);
    best[j].store(highest + j * kTileTokens);
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

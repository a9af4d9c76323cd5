// Scores of cached pairs: the kinds one after another, and the smoothing that ATTENTION adds to
// MASS.
#include <algorithm>

#include "expert_scores.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 256;

float* scores_of(const ExpertScoresParams& params, ScoreKind kind) {
  return params.scores[static_cast<int>(kind)];
}

// Log of the attention that a query which sees the key pays to it, averaged over its neighbours.
//
// A thread has as many keys as the pool is wide, around a multiple of that width counted from the
// first real key. What each of them pools is a sum up to this multiple and one from there on, which
// grow by a term from one key to the next: nothing is taken away again, so that the little that is
// left where much was is exact.
__global__ void __launch_bounds__(kThreads)
    attention_pool_kernel(ExpertScoresParams params, const float* mass, float* scores,
                          int64_t reach, int64_t pieces) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= params.batch * params.num_kv_heads * pieces) return;
  const int64_t index = piece / pieces, num_keys = params.num_keys, width = 2 * reach + 1;
  const int64_t first_real = first_real_key(params, index / params.num_kv_heads);
  mass += index * num_keys;
  scores += index * num_keys;
  for (int64_t i = piece % pieces * width; i < min((piece % pieces + 1) * width, first_real); ++i) {
    scores[i] = -INFINITY;
  }
  const int64_t first_query = max(num_keys - params.num_queries, first_real);
  const auto real_queries = static_cast<float>(num_keys - first_query);
  const auto attention = [&](int64_t key) {
    if (key < first_real || key >= num_keys) return 0.0f;
    return mass[key] * real_queries / static_cast<float>(num_keys - max(key, first_query));
  };
  const int64_t middle = first_real + piece % pieces * width;
  const int64_t begin = max(middle - reach, first_real), end = min(middle + reach + 1, num_keys);
  float before = 0.0f, behind = 0.0f;
  int64_t key = middle;
  for (int64_t i = end - 1; i >= begin; --i) {
    while (key > i - reach) before += attention(--key);
    scores[i] = before;
  }
  key = middle;
  for (int64_t i = begin; i < end; ++i) {
    while (key <= i + reach) behind += attention(key++);
    const int64_t from = max(i - reach, first_real), to = min(i + reach + 1, num_keys);
    const float mean = (scores[i] + behind) / static_cast<float>(to - from);
    scores[i] = logf(mean < kLeastShare ? kLeastShare : mean);
  }
}

// The kinds run one after another on one stream, so they share what lies behind mass and mean.
struct Plan {
  size_t mass_bytes;  // 0 where the mass is asked for, or not needed
  size_t mean_bytes;  // the keys' mean direction
  size_t workspace_bytes;
};

size_t rounded(int64_t floats) {
  return (static_cast<size_t>(floats) * sizeof(float) + 15) / 16 * 16;
}

Plan plan(const ExpertScoresParams& params) {
  const bool mass = scores_of(params, ScoreKind::kMass);
  const bool attention = scores_of(params, ScoreKind::kAttention);
  const int64_t heads = params.batch * params.num_kv_heads;
  const size_t mass_bytes = attention && !mass ? rounded(heads * params.num_keys) : 0;
  size_t mean_bytes = 0, scratch = 0;
  if (mass || attention) scratch = window_attention_workspace_bytes(params);
  if (scores_of(params, ScoreKind::kDiversity)) {
    mean_bytes = rounded(heads * params.key_dim);
    scratch = std::max(scratch, key_diversity_workspace_bytes(params));
  }
  if (scores_of(params, ScoreKind::kLag)) scratch = std::max(scratch, lag_workspace_bytes(params));
  return {.mass_bytes = mass_bytes,
          .mean_bytes = mean_bytes,
          .workspace_bytes = mass_bytes + mean_bytes + scratch};
}

}  // namespace

size_t expert_scores_workspace_bytes(const ExpertScoresParams& params) {
  return plan(params).workspace_bytes;
}

void expert_scores(const ExpertScoresParams& params, Stream stream) {
  check_device("expert_scores");
  const int64_t slice = params.batch * params.num_kv_heads * params.num_keys;
  if (slice == 0) return;
  const auto [mass_bytes, mean_bytes, workspace_bytes] = plan(params);
  char* const workspace = static_cast<char*>(params.workspace);
  char* const scratch = workspace + mass_bytes + mean_bytes;

  KeyCosines cosines{.mean = reinterpret_cast<float*>(workspace + mass_bytes),
                     .scores = scores_of(params, ScoreKind::kDiversity)};
  if (cosines.scores) {
    key_mean_direction(params, scratch, reinterpret_cast<float*>(workspace + mass_bytes), stream);
  }
  float* const attention = scores_of(params, ScoreKind::kAttention);
  float* mass = scores_of(params, ScoreKind::kMass);
  if (mass || attention) {
    if (!mass) mass = reinterpret_cast<float*>(workspace);
    window_attention(params, scratch, mass, cosines, stream);
    if (window_attention_has_cosines(params)) cosines.scores = nullptr;
  }
  if (attention) {
    const int64_t reach = std::min(params.pool / 2, params.num_keys);
    // Every key is in reach of one multiple of the width, which may lie behind the last key.
    const int64_t pieces = ceil_div(params.num_keys + reach, 2 * reach + 1);
    const int64_t threads = params.batch * params.num_kv_heads * pieces;
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads));
    MOEKV_LAUNCH(attention_pool_kernel, blocks, kThreads, 0, stream, params, mass, attention, reach,
                 pieces);
  }
  if (cosines.scores) key_cosines(params, cosines, stream);
  if (float* const scores = scores_of(params, ScoreKind::kLag)) {
    lag_scores(params, scratch, scores, stream);
  }
}

}  // namespace moekv::cuda

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
__global__ void __launch_bounds__(kThreads)
    attention_pool_kernel(ExpertScoresParams params, const float* mass, float* scores) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_keys = params.num_keys;
  if (i >= params.batch * params.num_kv_heads * num_keys) return;
  const int64_t index = i / num_keys, position = i % num_keys;
  const int64_t first_real = first_real_key(params, index / params.num_kv_heads);
  if (position < first_real) {
    scores[i] = -INFINITY;
    return;
  }
  const int64_t reach = params.pool / 2;
  const int64_t begin = max(position - reach, first_real);
  const int64_t end = min(position + reach + 1, num_keys);
  const int64_t first_query = max(num_keys - params.num_queries, first_real);
  const auto real_queries = static_cast<float>(num_keys - first_query);
  float sum = 0.0f;
  for (int64_t key = begin; key < end; ++key) {
    const auto seeing = static_cast<float>(num_keys - max(key, first_query));
    sum += mass[index * num_keys + key] * real_queries / seeing;
  }
  const float mean = sum / static_cast<float>(end - begin);
  scores[i] = logf(mean < kLeastShare ? kLeastShare : mean);
}

// The kinds run one after another on one stream, so they share what lies behind the mass.
struct Plan {
  size_t mass_bytes;  // 0 where the mass is asked for, or not needed
  size_t workspace_bytes;
};

Plan plan(const ExpertScoresParams& params) {
  const bool mass = scores_of(params, ScoreKind::kMass);
  const bool attention = scores_of(params, ScoreKind::kAttention);
  const auto slice = static_cast<size_t>(params.batch * params.num_kv_heads * params.num_keys);
  const size_t mass_bytes = attention && !mass ? (slice * sizeof(float) + 15) / 16 * 16 : 0;
  size_t scratch = 0;
  if (mass || attention) scratch = window_attention_workspace_bytes(params);
  if (scores_of(params, ScoreKind::kDiversity)) {
    scratch = std::max(scratch, key_diversity_workspace_bytes(params));
  }
  if (scores_of(params, ScoreKind::kLag)) scratch = std::max(scratch, lag_workspace_bytes(params));
  return {.mass_bytes = mass_bytes, .workspace_bytes = mass_bytes + scratch};
}

}  // namespace

size_t expert_scores_workspace_bytes(const ExpertScoresParams& params) {
  return plan(params).workspace_bytes;
}

void expert_scores(const ExpertScoresParams& params, Stream stream) {
  check_device("expert_scores");
  const int64_t slice = params.batch * params.num_kv_heads * params.num_keys;
  if (slice == 0) return;
  float* const workspace_mass = static_cast<float*>(params.workspace);
  char* const scratch = static_cast<char*>(params.workspace) + plan(params).mass_bytes;

  float* const attention = scores_of(params, ScoreKind::kAttention);
  float* mass = scores_of(params, ScoreKind::kMass);
  if (mass || attention) {
    if (!mass) mass = workspace_mass;
    window_attention(params, scratch, mass, stream);
  }
  if (attention) {
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(slice, kThreads));
    MOEKV_LAUNCH(attention_pool_kernel, blocks, kThreads, 0, stream, params, mass, attention);
  }
  if (float* const scores = scores_of(params, ScoreKind::kDiversity)) {
    key_diversity(params, scratch, scores, stream);
  }
  if (float* const scores = scores_of(params, ScoreKind::kLag)) {
    lag_scores(params, scratch, scores, stream);
  }
}

}  // namespace moekv::cuda

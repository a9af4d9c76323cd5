// Mixes the scores of the chosen experts. One position per thread and a few heads, which often
// share the weights and give a thread enough independent loads. Neighbouring threads read
// neighbouring positions, so every access of a warp is 128 bytes wide as far as its positions
// choose alike.
#include <algorithm>

#include "../backend.h"
#include "device.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;
constexpr int64_t kMaxGridY = 65535;

__global__ void __launch_bounds__(kThreads) mix_scores_kernel(MixScoresParams params) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (position >= params.num_keys) return;
  const bool weights_per_head = params.weight_stride[1] != 0 || params.expert_stride[1] != 0;
  const int64_t head_groups = ceil_div<int64_t>(params.num_kv_heads, kHeads);
  for (int64_t i = blockIdx.y; i < params.batch * head_groups; i += gridDim.y) {
    const int64_t batch = i / head_groups;
    const int64_t first_head = i % head_groups * kHeads;
    const int num_heads = static_cast<int>(min(int64_t{kHeads}, params.num_kv_heads - first_head));
    const float* weights = params.weights + batch * params.weight_stride[0] +
                           first_head * params.weight_stride[1] +
                           position * params.weight_stride[2];
    const int32_t* experts = params.experts + batch * params.expert_stride[0] +
                             first_head * params.expert_stride[1] +
                             position * params.expert_stride[2];
    const float* scores = params.scores + batch * params.score_stride[1] +
                          first_head * params.score_stride[2] + position;
    const int64_t row = batch * params.num_kv_heads + first_head;

    float mixed[kHeads] = {};
    for (int64_t j = 0; j < params.k; ++j) {
      float weight = 0.0f;
      int64_t expert = 0;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= num_heads) break;
        if (h == 0 || weights_per_head) {
          weight = __ldg(weights + h * params.weight_stride[1] + j);
          expert = __ldg(experts + h * params.expert_stride[1] + j);
          // No expert, no score. An index out of range is never followed.
          if (expert < 0 || expert >= params.num_experts) weight = 0.0f;
        }
        if (weight == 0.0f) continue;  // adds nothing, whatever the score
        float score = __ldg(scores + expert * params.score_stride[0] + h * params.score_stride[2]);
        const int64_t map = expert * params.batch * params.num_kv_heads + row + h;
        if (params.gain) score *= __ldg(params.gain + map);
        if (params.offset) score += __ldg(params.offset + map);
        mixed[h] += weight * score;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h < num_heads) params.mixed[(row + h) * params.num_keys + position] = mixed[h];
    }
  }
}

}  // namespace

void mix_scores(const MixScoresParams& params, Stream stream) {
  check_device("mix_scores");
  const int64_t columns = ceil_div<int64_t>(params.num_keys, kThreads);
  const int64_t rows = params.batch * ceil_div<int64_t>(params.num_kv_heads, kHeads);
  if (columns * rows == 0) return;
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(std::min(rows, kMaxGridY)));
  MOEKV_LAUNCH(mix_scores_kernel, grid, kThreads, 0, stream, params);
}

}  // namespace moekv::cuda

// Softmax, biased top-k and load statistics of a router, in one read of the logits.
//
// Eight experts per lane, so that 16-bit logits come in 16-byte loads; 1 to 32 lanes per token. A
// token never leaves registers. The statistics are sums over all tokens and must not depend on the
// order in which blocks finish: probabilities are added as 64-bit fixed-point numbers.
#include <algorithm>
#include <bit>
#include <cmath>

#include "../backend.h"
#include "device.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPerLane = 8;
constexpr int64_t kMaxBlocks = 512;  // a few per SM: each ends with one atomic per expert
constexpr float kMaxFloat = 3.4028234663852886e38f;

struct Statistics {
  unsigned long long prob_sum[kMaxExperts];  // fixed point
  unsigned long long entropy;                // fixed point
  unsigned finished_blocks;
};

// No token's entropy is higher: log(kMaxExperts).
constexpr float kMostEntropy = 8.0f;

struct Arguments {
  GatingTopkParams params;
  int lanes;        // per token, a power of two
  float fixed_one;  // the fixed-point number that stands for probability 1, a power of two
  bool vectorized;  // logits may be read 16 bytes at a time
};

// The order of floats as an order of unsigned integers; no float maps to 0.
__device__ __forceinline__ unsigned order_of(float value) {
  const unsigned bits = __float_as_uint(value);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// NaN counts as the lowest, +inf as the largest finite number.
__device__ __forceinline__ float sanitized(float logit) {
  return isnan(logit) ? -INFINITY : fminf(logit, kMaxFloat);
}

// Sum over the lanes of a warp that hold the same experts of different tokens.
__device__ __forceinline__ unsigned sum_over_tokens(unsigned value, int lanes) {
  for (int distance = lanes; distance < kWarpSize; distance *= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}
__device__ __forceinline__ unsigned long long sum_over_tokens(unsigned long long value, int lanes) {
  for (int distance = lanes; distance < kWarpSize; distance *= 2) {
    const unsigned low = __shfl_xor_sync(kFullWarp, static_cast<unsigned>(value), distance);
    const unsigned high = __shfl_xor_sync(kFullWarp, static_cast<unsigned>(value >> 32), distance);
    value += static_cast<unsigned long long>(high) << 32 | low;
  }
  return value;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) gating_topk_kernel(Arguments arguments) {
  const GatingTopkParams& params = arguments.params;
  const int num_experts = static_cast<int>(params.num_experts);
  const int k = static_cast<int>(params.k);
  const int lanes = arguments.lanes;
  const int first_expert = static_cast<int>(threadIdx.x) % lanes * kPerLane;
  const int tokens_per_block = kThreads / lanes;

  float bias[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool present = params.bias && first_expert + i < num_experts;
    const float value = present ? __ldg(params.bias + first_expert + i) : 0.0f;
    bias[i] = isnan(value) ? -INFINITY : value;
  }

  unsigned long long prob_sum[kPerLane] = {};
  unsigned load[kPerLane] = {};
  unsigned long long entropy = 0;
  const float entropy_one = arguments.fixed_one / kMostEntropy;

  // All lanes of a warp run the loop equally often: they meet in the shuffles.
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * tokens_per_block; base < params.num_tokens;
       base += static_cast<int64_t>(gridDim.x) * tokens_per_block) {
    const int64_t token = base + static_cast<int>(threadIdx.x) / lanes;
    const bool inside = token < params.num_tokens;
    const bool real = inside && (!params.mask || params.mask[token]);

    float p[kPerLane];
    if (real) {
      const T* logits = static_cast<const T*>(params.logits) + token * params.logits_stride;
      if (arguments.vectorized && first_expert < num_experts) {
#pragma unroll
        for (int i = 0; i < kPerLane; i += kPackSize<T>) {
          float pack[kPackSize<T>];
          load_pack(logits + first_expert + i, pack);
#pragma unroll
          for (int j = 0; j < kPackSize<T>; ++j) p[i + j] = pack[j];
        }
      } else {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          p[i] = first_expert + i < num_experts ? to_float(logits[first_expert + i]) : 0.0f;
        }
      }
    }

    float highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool present = real && first_expert + i < num_experts;
      p[i] = present ? sanitized(p[i]) : -INFINITY;
      highest = fmaxf(highest, p[i]);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, distance));
    }
    float total = 0.0f, moment = 0.0f;  // of the weights, and of them times their logarithms
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool present = first_expert + i < num_experts;
      // A row with no finite logit is uniform. Below e^-104 there is nothing.
      const float below = (p[i] - highest) * params.inv_temperature;
      const float z = highest == -INFINITY ? 0.0f : fmaxf(below, -105.0f);
      p[i] = present ? expf(z) : 0.0f;
      total += p[i];
      moment = fmaf(p[i], z, moment);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(kFullWarp, total, distance);
      moment += __shfl_xor_sync(kFullWarp, moment, distance);
    }
    if (real && first_expert == 0) {
      // -sum of p log p, with log p = z - log(total).
      const float surprise = fmaxf(logf(total) - moment / total, 0.0f);
      entropy += static_cast<unsigned long long>(surprise * entropy_one);
    }

    unsigned rating[kPerLane];  // 0: no such expert, or taken
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      p[i] /= total;
      rating[i] = first_expert + i < num_experts ? order_of(p[i] + bias[i]) : 0;
      if (real) prob_sum[i] += static_cast<unsigned long long>(p[i] * arguments.fixed_one);
    }

    int rank[kPerLane];  // -1: not chosen
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) rank[i] = -1;
    const float extent =
        params.importance && inside ? static_cast<float>(k) * params.importance[token] : 0.0f;
    // How much a slot counts; NaN counts nothing.
    const auto counts = [&](int slot) {
      if (!params.importance || slot == 0) return 1.0f;
      return fminf(fmaxf(extent - static_cast<float>(slot), 0.0f), 1.0f);
    };
    float chosen_sum = 0.0f, slots = 0.0f;
    for (int round = 0; round < k; ++round) {
      const float count = counts(round);
      slots += count;
      unsigned best = 0;
      int best_expert = kMaxExperts;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (rating[i] > best) {
          best = rating[i];
          best_expert = first_expert + i;
        }
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        const unsigned other = __shfl_xor_sync(kFullWarp, best, distance);
        const int other_expert = __shfl_xor_sync(kFullWarp, best_expert, distance);
        if (other > best || (other == best && other_expert < best_expert)) {
          best = other;
          best_expert = other_expert;
        }
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (first_expert + i == best_expert) {
          rating[i] = 0;
          rank[i] = round;
          chosen_sum += p[i] * count;
        }
      }
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      chosen_sum += __shfl_xor_sync(kFullWarp, chosen_sum, distance);
    }

    if (!inside) continue;
    float* weights = params.weights + token * k;
    int32_t* experts = params.experts + token * k;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!real) {
        if (first_expert + i < k) {
          weights[first_expert + i] = 0.0f;
          experts[first_expert + i] = first_expert + i;
        }
      } else if (rank[i] >= 0) {
        const float count = counts(rank[i]);
        load[i] += count > 0.0f;
        weights[rank[i]] = (chosen_sum > 0.0f ? p[i] / chosen_sum : 1.0f / slots) * count;
        experts[rank[i]] = first_expert + i;
      }
    }
  }

  MOEKV_SHARED(unsigned long long, warp_prob_sum, kWarps* kMaxExperts);
  MOEKV_SHARED(unsigned, warp_load, kWarps* kMaxExperts);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const bool first_token_of_warp = static_cast<int>(threadIdx.x) % kWarpSize < lanes;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const unsigned long long sum = sum_over_tokens(prob_sum[i], lanes);
    const unsigned count = sum_over_tokens(load[i], lanes);
    if (first_token_of_warp) {
      warp_prob_sum[warp * kMaxExperts + first_expert + i] = sum;
      warp_load[warp * kMaxExperts + first_expert + i] = count;
    }
  }
  __syncthreads();

  auto* statistics = static_cast<Statistics*>(params.workspace);
  // Lanes that hold no first expert have added nothing.
  entropy = sum_over_tokens(entropy, 1);
  if (threadIdx.x % kWarpSize == 0) atomicAdd(&statistics->entropy, entropy);
  const int expert = static_cast<int>(threadIdx.x);
  if (expert < num_experts) {
    unsigned long long sum = 0;
    unsigned count = 0;
    for (int i = 0; i < kWarps; ++i) {
      sum += warp_prob_sum[i * kMaxExperts + expert];
      count += warp_load[i * kMaxExperts + expert];
    }
    atomicAdd(&statistics->prob_sum[expert], sum);
    atomicAdd(reinterpret_cast<unsigned long long*>(params.load) + expert,
              static_cast<unsigned long long>(count));
  }

  // The last block to finish sees the sums of all of them.
  __threadfence();
  int last = 0;
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&statistics->finished_blocks, 1u) == gridDim.x - 1;
  if (__syncthreads_or(last) && expert < num_experts) {
    __threadfence();
    const unsigned long long sum = __ldcg(&statistics->prob_sum[expert]);
    params.prob_sum[expert] = static_cast<float>(sum) / arguments.fixed_one;
    if (expert == 0) {
      *params.entropy = static_cast<float>(__ldcg(&statistics->entropy)) / entropy_one;
    }
  }
}

}  // namespace

size_t gating_topk_workspace_bytes(const GatingTopkParams&) { return sizeof(Statistics); }

void gating_topk(const GatingTopkParams& params, Stream stream) {
  check_device("gating_topk");
  zero_async("gating_topk", params.workspace, sizeof(Statistics), stream);
  zero_async("gating_topk", params.load, static_cast<size_t>(params.num_experts) * sizeof(int64_t),
             stream);

  const int64_t element = params.dtype == DType::kFloat ? 4 : 2;
  const auto lanes = static_cast<int>(
      std::bit_ceil(static_cast<uint64_t>(ceil_div<int64_t>(params.num_experts, kPerLane))));
  // Sums of probabilities stay below num_tokens, with room for rounding.
  const int integer_bits = std::bit_width(static_cast<uint64_t>(params.num_tokens)) + 1;
  const Arguments arguments{
      .params = params,
      .lanes = lanes,
      .fixed_one = std::ldexp(1.0f, std::min(48, 64 - integer_bits)),
      .vectorized = params.num_experts % kPerLane == 0 &&
                    params.logits_stride * element % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(params.logits) % 16 == 0,
  };
  const int64_t blocks = ceil_div<int64_t>(params.num_tokens, kThreads / lanes);
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, kMaxBlocks)));
  switch (params.dtype) {
    case DType::kFloat:
      return MOEKV_LAUNCH(gating_topk_kernel<float>, grid, kThreads, 0, stream, arguments);
    case DType::kHalf:
      return MOEKV_LAUNCH(gating_topk_kernel<__half>, grid, kThreads, 0, stream, arguments);
    case DType::kBFloat16:
      return MOEKV_LAUNCH(gating_topk_kernel<__nv_bfloat16>, grid, kThreads, 0, stream, arguments);
  }
}

}  // namespace moekv::cuda

// The parts of expert_scores, and what they share.
#pragma once

#include <bit>

#include "../backend.h"
#include "rows.h"

namespace moekv::cuda {

size_t window_attention_workspace_bytes(const ExpertScoresParams& params);
size_t key_diversity_workspace_bytes(const ExpertScoresParams& params);
size_t lag_workspace_bytes(const ExpertScoresParams& params);

// What DIVERSITY [B, H, T] is made of once the keys' mean direction is known.
struct KeyCosines {
  const float* mean;  // [B, H, D]
  float* scores;      // [B, H, T]; null where not asked for
};

// MASS [B, H, T]. Where the keys stay in registers, 16-bit ones, their cosines cost no further
// read.
bool window_attention_has_cosines(const ExpertScoresParams& params);
void window_attention(const ExpertScoresParams& params, void* workspace, float* mass,
                      const KeyCosines& cosines, Stream stream);
// The direction of the mean of the normalised keys.
void key_mean_direction(const ExpertScoresParams& params, void* workspace, float* mean,
                        Stream stream);
void key_cosines(const ExpertScoresParams& params, const KeyCosines& cosines, Stream stream);
// LAG [B, H, T].
void lag_scores(const ExpertScoresParams& params, void* workspace, float* scores, Stream stream);

constexpr float kLeastShare = 1e-20f;  // before a logarithm
constexpr float kLeastNorm = 1e-12f;   // of a key and of the mean

// The row's first position that is not padding.
__device__ __forceinline__ int first_real_key(const ExpertScoresParams& params, int64_t batch) {
  const int num_keys = static_cast<int>(params.num_keys);
  return params.start ? min(max(__ldg(params.start + batch), 0), num_keys) : 0;
}

// --- Kernels over whole keys or values: a few lanes per position, eight channels per lane --------

constexpr int kChannelsPerLane = 8;

// Keys or values of one (b, h).
struct Rows {
  const void* data;  // null for the whole tensor
  int64_t stride[3];
  int dim;
  int lanes;        // of a position, a power of two
  bool vectorized;  // may be read 16 bytes at a time
};

inline Rows rows_of(const void* data, const int64_t (&stride)[3], int64_t dim, DType dtype) {
  const auto lanes = std::bit_ceil(static_cast<uint64_t>(ceil_div<int64_t>(dim, kChannelsPerLane)));
  return {.data = data,
          .stride = {stride[0], stride[1], stride[2]},
          .dim = static_cast<int>(dim),
          .lanes = static_cast<int>(lanes),
          .vectorized = is_vectorized(data, stride, dim, dtype)};
}

// The lane's channels of `kCount` positions from `first` < end on, `step` apart; zeros for
// positions from `end` on, and beyond the last channel.
template <int kCount, typename T>
__device__ __forceinline__ void load_positions(const T* base, const Rows& rows, int first, int step,
                                               int end, int first_channel,
                                               float (&x)[kCount][kChannelsPerLane]) {
  RawChannels<T, kChannelsPerLane> raw[kCount];
  const auto load = [&](bool vectorized) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      raw[i].load(base + min(first + i * step, end - 1) * rows.stride[2], first_channel, rows.dim,
                  vectorized);
    }
  };
  if (rows.vectorized) {
    load(true);
  } else {
    load(false);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    raw[i].unpack(first_channel, first + i * step < end ? rows.dim : 0, x[i]);
  }
}

// Sum over the lanes of a position; every lane of the warp must call it.
__device__ __forceinline__ float sum_over_lanes(float value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

}  // namespace moekv::cuda

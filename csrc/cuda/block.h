// Sums and scans over a thread block. Every thread of the block must call them.
#pragma once

#include "device.h"

namespace moekv::cuda {

// Sum over the threads before this one; `total` over all.
template <int kThreads>
__device__ __forceinline__ unsigned block_exclusive_scan(unsigned value, unsigned& total) {
  constexpr int kWarps = kThreads / kWarpSize;
  MOEKV_SHARED(unsigned, warp_sums, kWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  unsigned inclusive = value;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const unsigned below = __shfl_up_sync(kFullWarp, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  unsigned before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const unsigned sum = warp_sums[i];
    if (i < warp) before += sum;
    total += sum;
  }
  __syncthreads();  // the next call writes warp_sums again
  return before + inclusive - value;
}

template <int kThreads>
__device__ __forceinline__ unsigned block_sum(unsigned value) {
  unsigned total;
  block_exclusive_scan<kThreads>(value, total);
  return total;
}

// One array for all reductions of a kernel.
template <int kWarps>
__device__ __forceinline__ float* reduction_array() {
  MOEKV_SHARED(float, warp_values, kWarps);
  return warp_values;
}

// In an order that does not depend on timing.
template <int kThreads, typename Combine>
__device__ __forceinline__ float block_reduce(float value, const Combine& combine) {
  constexpr int kWarps = kThreads / kWarpSize;
  float* warp_values = reduction_array<kWarps>();
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  if (threadIdx.x % kWarpSize == 0) warp_values[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = warp_values[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) value = combine(value, warp_values[i]);
  __syncthreads();  // the next call writes warp_values again
  return value;
}

template <int kThreads>
__device__ __forceinline__ float block_sum(float value) {
  return block_reduce<kThreads>(value, [](float a, float b) { return a + b; });
}

template <int kThreads>
__device__ __forceinline__ float block_max(float value) {
  return block_reduce<kThreads>(value, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace moekv::cuda

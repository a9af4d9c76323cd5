// Attention logits.
#pragma once

#include "device.h"

namespace moekv::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// What to subtract, where nothing may have been seen yet.
__device__ __forceinline__ float shift_of(float highest) {
  return highest == -INFINITY ? 0.0f : highest;
}

// From a product of query and key to a logit in units of log2, for exp2: unscaled(product) * scale.
// The largest is subtracted before they are scaled: what is near it keeps its distance, whatever
// its size.
struct Logit {
  float scale, cap, cap_scale, offset_scale;

  Logit() = default;
  __host__ __device__ __forceinline__ Logit(float scaling, float softcap)
      : scale(softcap > 0.0f ? 1.0f : scaling * kLog2E),
        cap(softcap * kLog2E),
        cap_scale(softcap > 0.0f ? 2.0f * kLog2E * scaling / softcap : 0.0f),
        offset_scale(softcap > 0.0f ? kLog2E : 1.0f / scaling) {}

  __device__ __forceinline__ bool has_cap() const { return cap > 0.0f; }
  // cap * tanh(product * scaling / softcap)
  __device__ __forceinline__ float capped(float product) const {
    return cap - divide_fast(2.0f * cap, 1.0f + exp2_fast(product * cap_scale));
  }
  __device__ __forceinline__ float unscaled(float product) const {
    return has_cap() ? capped(product) : product;
  }
  // What a logit or a part of one, as it is, makes before it is scaled.
  __device__ __forceinline__ float unscaled_offset(float natural) const {
    return natural * offset_scale;
  }
  // 2^(logit - highest) of two logits, both unscaled.
  __device__ __forceinline__ float weight(float value, float highest) const {
    return exp2_fast((value - shift_of(highest)) * scale);
  }
};

}  // namespace moekv::cuda

// Attention logits.
#pragma once

#include "device.h"

namespace moekv::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// A product of query and key as a logit in units of log2, for exp2: scaled, and softly capped where
// softcap > 0.
struct Logit {
  float scale, cap, cap_scale;

  __device__ __forceinline__ Logit(float scaling, float softcap)
      : scale(scaling * kLog2E),
        cap(softcap * kLog2E),
        cap_scale(softcap > 0.0f ? 2.0f * kLog2E * scaling / softcap : 0.0f) {}

  __device__ __forceinline__ float operator()(float product) const {
    if (cap == 0.0f) return product * scale;
    return cap - 2.0f * cap / (1.0f + exp2_fast(product * cap_scale));  // cap * tanh
  }
};

// What to subtract before exp2, where nothing may have been seen yet.
__device__ __forceinline__ float shift_of(float highest) {
  return highest == -INFINITY ? 0.0f : highest;
}

}  // namespace moekv::cuda

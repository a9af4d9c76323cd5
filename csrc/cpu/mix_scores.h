// Sum of the chosen experts' scores, each mapped to the common scale and weighted.
//
// The sparse gate of a tile of positions is spread out to one dense row of weights per expert; the
// scores are then read row by row, once, by every head of the tile.
#pragma once

#include "../params.h"
#include "parallel.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr int kGateFloats = 8192;  // a tile's dense gate fills a good half of L1

// gate: [num_experts, tile]
inline void spread_gate(const MixScoresParams& p, int64_t batch, int64_t head, int64_t first,
                        int64_t count, int64_t tile, float* gate) {
  std::memset(gate, 0, p.num_experts * tile * sizeof(float));
  const float* weights = p.weights + batch * p.weight_stride[0] + head * p.weight_stride[1] +
                         first * p.weight_stride[2];
  const int32_t* experts = p.experts + batch * p.expert_stride[0] + head * p.expert_stride[1] +
                           first * p.expert_stride[2];
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < p.k; ++j) gate[experts[j] * tile + i] += weights[j];
    weights += p.weight_stride[2];
    experts += p.expert_stride[2];
  }
}

// mixed += gate * (gain * scores + offset), and nothing where the gate is 0
inline Vec mixed_term(Vec mixed, Vec gate, Vec scores, Vec gain, Vec offset) {
  const Vec zero = Vec::set(0.0f);
  return mixed + select(gate != zero, gate * fma(gain, scores, offset), zero);
}

inline void mix_scores_kernel(const MixScoresParams& p) {
  const int64_t tile = kGateFloats / p.num_experts / Vec::kLanes * Vec::kLanes;
  const int64_t num_tiles = (p.num_keys + tile - 1) / tile;
  const bool shared_gate = p.weight_stride[1] == 0 && p.expert_stride[1] == 0;
  parallel_for(0, p.batch * num_tiles, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float gate[kGateFloats];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / num_tiles, first = item % num_tiles * tile;
      const int64_t count = p.num_keys - first < tile ? p.num_keys - first : tile;
      for (int64_t head = 0; head < p.num_kv_heads; ++head) {
        if (head == 0 || !shared_gate) spread_gate(p, batch, head, first, count, tile, gate);
        float* mixed = p.mixed + (batch * p.num_kv_heads + head) * p.num_keys + first;
        for (int64_t e = 0; e < p.num_experts; ++e) {
          const float* scores = p.scores + e * p.score_stride[0] + batch * p.score_stride[1] +
                                head * p.score_stride[2] + first;
          const float* weights = gate + e * tile;
          const int64_t map = (e * p.batch + batch) * p.num_kv_heads + head;
          const Vec gain = Vec::set(p.gain ? p.gain[map] : 1.0f);
          const Vec offset = Vec::set(p.offset ? p.offset[map] : 0.0f);
          int64_t i = 0;
          for (; i + Vec::kLanes <= count; i += Vec::kLanes) {
            const Vec sum = e == 0 ? Vec::set(0.0f) : Vec::load(mixed + i);
            mixed_term(sum, Vec::load(weights + i), Vec::load(scores + i), gain, offset)
                .store(mixed + i);
          }
          for (; i < count; ++i) {
            float lane[Vec::kLanes];
            const Vec sum = Vec::set(e == 0 ? 0.0f : mixed[i]);
            mixed_term(sum, Vec::set(weights[i]), Vec::set(scores[i]), gain, offset).store(lane);
            mixed[i] = lane[0];
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

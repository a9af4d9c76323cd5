// DIVERSITY: minus the cosine of a key with the mean direction of its row's keys (KeyDiff,
// arXiv:2504.15364). Two passes: the sum of directions, then the cosines.
#pragma once

#include "head_view.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr float kLeastNorm = 1e-12f;

constexpr int kPair = 2 * Vec::kLanes;

// Adds the squares of whole pairs of numbers, up to `dim`, to some sums; how many that were.
template <typename T>
inline int64_t add_squares(const T*, int64_t, Vec&) {
  return 0;
}
#ifdef __AVX512BF16__
inline int64_t add_squares(const bfloat16_t* x, int64_t dim, Vec& sums) {
  int64_t d = 0;
  for (; d + kPair <= dim; d += kPair) {
    const auto numbers = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + d));
    sums.v = _mm512_dpbf16_ps(sums.v, numbers, numbers);
  }
  return d;
}
#endif

// First pass: anchor [dim rounded up to pairs, in the order of load_pair] becomes the sum of the
// directions of the keys [begin, end). Their inverse norms wait in the scores for the second pass.
template <typename T>
inline void sum_directions(const HeadView<T>& head, int64_t begin, int64_t end, float* anchor) {
  float* inverse_norms = head.score(ScoreKind::kDiversity);
  for (int64_t d = 0; d < head.key_dim; d += kPair) {
    Vec::set(0.0f).store(anchor + d);
    Vec::set(0.0f).store(anchor + d + Vec::kLanes);
  }
  for (int64_t block = begin; block < end; block += 16) {
    const int count = static_cast<int>(end - block < 16 ? end - block : 16);
    const T* keys = head.keys + block * head.key_stride;
    Vec squares[16];
    for (int i = 0; i < 16; ++i) {
      squares[i] = Vec::set(0.0f);
      if (i >= count) continue;
      const T* key = keys + i * head.key_stride;
      for (int64_t d = add_squares(key, head.key_dim, squares[i]); d < head.key_dim; d += kPair) {
        const VecPair k = load_pair(key + d, head.key_dim - d);
        squares[i] = fma(k.b, k.b, fma(k.a, k.a, squares[i]));
      }
    }
    alignas(64) float inverse[16];
    sum16(squares, inverse);
    for (int i = 0; i < 16; i += Vec::kLanes) {
      (Vec::set(1.0f) / max(Vec::set(kLeastNorm), sqrt(Vec::load(inverse + i)))).store(inverse + i);
    }
    std::memcpy(inverse_norms + block, inverse, count * sizeof(float));
    for (int64_t d = 0; d < head.key_dim; d += kPair) {
      Vec a = Vec::load(anchor + d), b = Vec::load(anchor + d + Vec::kLanes);
      for (int i = 0; i < count; ++i) {
        const VecPair k = load_pair(keys + i * head.key_stride + d, head.key_dim - d);
        a = fma(k.a, Vec::set(inverse[i]), a);
        b = fma(k.b, Vec::set(inverse[i]), b);
      }
      a.store(anchor + d);
      b.store(anchor + d + Vec::kLanes);
    }
  }
}

// Between the passes: the anchors of all chunks become one of norm -1 (or 0), in the first's place.
template <typename T>
inline void combine_directions(const HeadView<T>& head, int64_t chunks, int64_t stride,
                               float* anchor) {
  if (chunks == 0) return;
  const int64_t dim = (head.key_dim + kPair - 1) / kPair * kPair;
  Vec square = Vec::set(0.0f);
  for (int64_t d = 0; d < dim; d += Vec::kLanes) {
    Vec sum = Vec::load(anchor + d);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      sum = sum + Vec::load(anchor + chunk * stride + d);
    }
    sum.store(anchor + d);
    square = fma(sum, sum, square);
  }
  const float least = kLeastNorm * static_cast<float>(head.length);  // the norm is of the mean
  const float norm = __builtin_sqrtf(square.sum());
  const Vec factor = Vec::set(-1.0f / (norm > least ? norm : least));
  for (int64_t d = 0; d < dim; d += Vec::kLanes) {
    (Vec::load(anchor + d) * factor).store(anchor + d);
  }
}

// Second pass: DIVERSITY of the keys [begin, end).
template <typename T>
inline void score_directions(const HeadView<T>& head, int64_t begin, int64_t end,
                             const float* anchor) {
  float* out = head.score(ScoreKind::kDiversity);
  for (int64_t block = begin; block < end; block += 16) {
    const int count = static_cast<int>(end - block < 16 ? end - block : 16);
    Vec dots[16];
    for (int i = 0; i < 16; ++i) {
      dots[i] = Vec::set(0.0f);
      if (i >= count) continue;
      const T* key = head.keys + (block + i) * head.key_stride;
      for (int64_t d = 0; d < head.key_dim; d += kPair) {
        const VecPair k = load_pair(key + d, head.key_dim - d);
        dots[i] = fma(k.a, Vec::load(anchor + d), dots[i]);
        dots[i] = fma(k.b, Vec::load(anchor + d + Vec::kLanes), dots[i]);
      }
    }
    float dot[16];
    sum16(dots, dot);
    for (int i = 0; i < count; ++i) out[block + i] *= dot[i];
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

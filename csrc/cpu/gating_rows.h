// gating_topk for many experts: a token's experts lie along the lanes, as in memory, and what is
// left of them, a number or two per lane, is put together for a tile of tokens at once.
#pragma once

#include "../params.h"
#include "gating_tile.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

// Many experts, of whom few are chosen.
inline bool gates_rows(const GatingTopkParams& p) {
  return p.num_experts >= 4 * Vec::kLanes && p.k <= kRoundExperts;
}

// 2^x for -151 <= x <= 0 or little more, down to the smallest subnormal and then 0.
inline Vec exp2_of_shifted(Vec x) {
#if defined(__AVX512F__)
  return exp2(x);
#else
  const Vec n = round(x - Vec::set(0.5f));  // floor(x); x - 1 for some integers, where f is 1
  return scale2(exp2_polynomial(x - n), n);
#endif
}

// What comes of the lanes of each vector, one vector per lane of the result.
template <typename Combine>
inline Vec across_lanes(Vec (&vectors)[Vec::kLanes], const Combine& combine) {
  for (int count = Vec::kLanes; count > 1; count /= 2) {
    for (int i = 0; i < count / 2; ++i) {
      Vec low, high;
      interleave(vectors[i], vectors[i + count / 2], low, high);
      vectors[i] = combine(low, high);
    }
  }
  return vectors[0];
}

inline Vec sums_across(Vec (&vectors)[Vec::kLanes]) {
  return across_lanes(vectors, [](Vec a, Vec b) { return a + b; });
}

// Which of a token's experts are rated at least as high as `threshold`, as bits; how many there
// are.
inline int64_t rated_experts(const float* ratings, int64_t width, float threshold,
                             uint64_t* experts) {
  int64_t count = 0;
  for (int64_t e = 0; e < width; e += 64) {
    uint64_t below = 0;
    const int64_t end = width - e < 64 ? width - e : 64;
    for (int64_t i = 0; i < end; i += Vec::kLanes) {
      below |= bits(Vec::set(threshold) > Vec::load(ratings + e + i)) << i;
    }
    experts[e / 64] = ~below & ~uint64_t{0} >> (64 - end);
    count += __builtin_popcountll(experts[e / 64]);
  }
  return count;
}

// Takes the lowest expert out of a set that is not empty. Without branches, as nobody could foresee
// in which word it is.
inline int64_t take_lowest(uint64_t* experts, int64_t num_words) {
  int64_t at = num_words - 1;
  for (int64_t w = num_words - 2; w >= 0; --w) at = experts[w] ? w : at;
  const int64_t lowest = 64 * at + __builtin_ctzll(experts[at]);
  experts[at] &= experts[at] - 1;
  return lowest;
}

// The k highest rated of `count` experts, in the order of experts; they are among those whose
// rating is no lower than `threshold`.
inline void choose_rated(const float* ratings, int64_t width, float threshold, int64_t k,
                         float* chosen, float* highest) {
  uint64_t experts[kMaxExperts / 64];
  const int64_t num_words = (width + 63) / 64;
  const int64_t count = rated_experts(ratings, width, threshold, experts);
  for (int64_t j = 0; j < k; ++j) {
    const int64_t expert = take_lowest(experts, num_words);
    chosen[j * kTileTokens] = static_cast<float>(expert);
    highest[j * kTileTokens] = ratings[expert];
  }
  for (int64_t more = k; more < count; ++more) {  // takes the place of the lowest, the last of them
    const int64_t expert = take_lowest(experts, num_words);
    int64_t lowest = 0;
    for (int64_t j = 1; j < k; ++j) {
      if (highest[j * kTileTokens] <= highest[lowest * kTileTokens]) lowest = j;
    }
    if (ratings[expert] <= highest[lowest * kTileTokens]) continue;
    for (int64_t j = lowest; j + 1 < k; ++j) {
      chosen[j * kTileTokens] = chosen[(j + 1) * kTileTokens];
      highest[j * kTileTokens] = highest[(j + 1) * kTileTokens];
    }
    chosen[(k - 1) * kTileTokens] = static_cast<float>(expert);
    highest[(k - 1) * kTileTokens] = ratings[expert];
  }
}

// Sorts the k chosen of each token by their ratings, ties left as they are.
inline void sort_choice(int64_t k, float* chosen, float* highest) {
  for (int64_t last = k - 1; last > 0; --last) {
    for (int64_t j = 0; j < last; ++j) {
      float *here = highest + j * kTileTokens, *expert = chosen + j * kTileTokens;
      const Vec a = Vec::load(here), b = Vec::load(here + kTileTokens);
      const Vec of_a = Vec::load(expert), of_b = Vec::load(expert + kTileTokens);
      const Mask swap = b > a;
      max(a, b).store(here);
      min(a, b).store(here + kTileTokens);
      select(swap, of_b, of_a).store(expert);
      select(swap, of_a, of_b).store(expert + kTileTokens);
    }
  }
}

// The k-th highest lane of each token's vector, which holds the best ratings of its lanes: no more
// than the k-th rating, as k lanes have one that is no lower.
inline void kth_of_lanes(Vec (&lanes)[kTileTokens], int64_t k, float* thresholds) {
  alignas(64) float best[kTileTokens * kTileTokens], ids[kRoundExperts * kTileTokens];
  alignas(64) float highest[kRoundExperts * kTileTokens];
  transpose(lanes);
  for (int i = 0; i < kTileTokens; ++i) lanes[i].store(best + i * kTileTokens);
  switch (k) {
    case 1:
      highest_rated<1>(best, kTileTokens, ids, highest);
      break;
    case 2:
      highest_rated<2>(best, kTileTokens, ids, highest);
      break;
    case 3:
      highest_rated<3>(best, kTileTokens, ids, highest);
      break;
    default:
      highest_rated<kRoundExperts>(best, kTileTokens, ids, highest);
  }
  std::memcpy(thresholds, highest + (k - 1) * kTileTokens, kTileTokens * sizeof(float));
}

// Of `count` tokens from `token` on: their chosen experts and the probabilities of these, but for a
// factor; adds up all probabilities times `shares` in `sums` [num_experts]. Gives the entropies.
template <typename T>
inline Vec gate_rows(const GatingTopkParams& p, int64_t token, int64_t count, const float* shares,
                     float* sums, float* chosen, float* weights) {
  alignas(64) float probs[kTileTokens * kMaxExperts];
  alignas(64) float biased[kTileTokens * kMaxExperts];
  alignas(64) T copies[kTileTokens * kMaxExperts];
  const int64_t num_experts = p.num_experts, k = p.k;
  constexpr int64_t kPair = 2 * Vec::kLanes;
  const int64_t width = (num_experts + kPair - 1) / kPair * kPair;
  const Vec none = Vec::set(-__builtin_inff()), zero = Vec::set(0.0f);
  // Logits are scaled to powers of 2, when the highest is subtracted: it keeps the weight 1.
  const Vec scale = Vec::set(p.inv_temperature * 1.44269504088896341f);

  // Rows behind the last token, and those whose experts do not fill their vectors, are copies.
  const T* rows[kTileTokens];
  for (int64_t i = 0; i < kTileTokens; ++i) {
    const int64_t row = token + (i < count ? i : 0);
    rows[i] = static_cast<const T*>(p.logits) + row * p.logits_stride;
    if (num_experts == width) continue;
    T* copy = copies + i * width;
    std::memcpy(copy, rows[i], num_experts * sizeof(T));
    for (int64_t e = num_experts; e < width; ++e) copy[e] = from_float<T>(-__builtin_inff());
    rows[i] = copy;
  }

  Vec lanes[kTileTokens];
  for (int i = 0; i < kTileTokens; ++i) {
    Vec highest = none, other = none;
    for (int64_t e = 0; e < width; e += kPair) {
      const VecPair logits = load_pair(rows[i] + e);
      highest = max(logits.a, highest);  // in this order NaN counts nothing
      other = max(logits.b, other);
    }
    lanes[i] = max(highest, other);
  }
  Vec highest = across_lanes(lanes, [](Vec a, Vec b) { return max(a, b); });
  if (const uint64_t infinite = bits((highest - highest) != zero)) {
    // Nothing is as high but what is equal: the experts of the highest logit share everything.
    for (int i = 0; i < kTileTokens; ++i) {
      if (!(infinite >> i & 1)) continue;
      alignas(64) float z[kMaxExperts];
      for (int64_t e = 0; e < width; e += Vec::kLanes) {
        ordered(Vec::load(rows[i] + e)).store(z + e);
      }
      float top = -__builtin_inff();
      for (int64_t e = 0; e < num_experts; ++e) top = z[e] > top ? z[e] : top;
      T* copy = copies + i * width;
      for (int64_t e = 0; e < width; ++e) {
        copy[e] = from_float<T>(e < num_experts && z[e] == top ? 0.0f : -__builtin_inff());
      }
      rows[i] = copy;
    }
    highest = select(highest - highest != zero, zero, highest);
  }
  alignas(64) float tops[kTileTokens];
  highest.store(tops);

  const Vec least = Vec::set(-151.0f);
  Vec totals[kTileTokens], moments[kTileTokens];
  for (int i = 0; i < kTileTokens; ++i) {
    const Vec top = Vec::set(tops[i]);
    Vec total = zero, moment = zero, best = zero;
    for (int64_t e = 0; e < width; e += Vec::kLanes) {
      __builtin_prefetch(rows[i] + kTileTokens * p.logits_stride + e);  // of the next tile
      const Vec z = max((Vec::load(rows[i] + e) - top) * scale, least);
      const Vec weight = exp2_of_shifted(z);
      weight.store(probs + i * width + e);
      total = total + weight;
      moment = fma(weight, z, moment);
      best = max(best, weight);
    }
    totals[i] = total;
    moments[i] = moment;
    lanes[i] = best;
  }
  const Vec total = sums_across(totals), share = Vec::load(shares);
  const Vec factor = share / total;
  alignas(64) float factors[kTileTokens], thresholds[kTileTokens];
  factor.store(factors);
  for (int64_t e = 0; e < width; e += Vec::kLanes) {
    Vec sum = Vec::load(sums + e);
    for (int i = 0; i < kTileTokens; ++i) {
      sum = fma(Vec::load(probs + i * width + e), Vec::set(factors[i]), sum);
    }
    sum.store(sums + e);
  }

  const float* ratings = probs;
  if (p.bias) {
    ratings = biased;
    alignas(64) float bias[kMaxExperts];
    std::memcpy(bias, p.bias, num_experts * sizeof(float));
    for (int64_t e = num_experts; e < width; ++e) bias[e] = -__builtin_inff();
    for (int i = 0; i < kTileTokens; ++i) {
      Vec best = none;
      for (int64_t e = 0; e < width; e += Vec::kLanes) {
        const Vec prob = Vec::load(probs + i * width + e);
        const Vec rating = max(fma(prob, Vec::set(factors[i]), Vec::load(bias + e)), none);
        rating.store(biased + i * width + e);
        best = max(best, rating);
      }
      lanes[i] = best;
    }
  }
  kth_of_lanes(lanes, k, thresholds);

  for (int i = 0; i < kTileTokens; ++i) {
    choose_rated(ratings + i * width, width, thresholds[i], k, chosen + i, weights + i);
  }
  sort_choice(k, chosen, weights);
  if (p.bias) {
    for (int64_t i = 0; i < k * kTileTokens; ++i) {
      weights[i] = probs[i % kTileTokens * width + static_cast<int64_t>(chosen[i])];
    }
  }
  // -sum of p log p, with log p = z log(2) - log(total).
  return share * log(total) - sums_across(moments) * factor * Vec::set(0.69314718056f);
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

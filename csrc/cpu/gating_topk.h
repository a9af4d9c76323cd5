// Softmax, biased top-k and load statistics of a router, in one read of the logits.
//
// A tile of tokens is transposed on loading, so that every step works on one expert of all its
// tokens at once and nothing has to be reduced across lanes; many experts are gated by rows, see
// gating_rows.h.
#pragma once

#include "../params.h"
#include "gating_plan.h"
#include "gating_rows.h"
#include "gating_tile.h"
#include "parallel.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

// e^x for x <= 0, down to the smallest subnormal and then 0.
inline Vec exp_of_shifted(Vec x) {
#if defined(__AVX512F__)
  // 2^(x log2 e): the product in two parts, as its rounding would count |x| times.
  const Vec log2_e = Vec::set(1.44269504088896341f);
  const Vec power = x * log2_e;
  const Vec rest = fma(x, log2_e, Vec::set(0.0f) - power);
  const Vec f = {_mm512_reduce_ps(power.v, 0x09)};  // power - floor(power)
  return {_mm512_scalef_ps(exp2_polynomial(f + rest).v, power.v)};
#else
  // Cody-Waite reduction to [-ln2/2, ln2/2] and a degree-6 polynomial (Cephes expf).
  const Vec n = round(x * Vec::set(1.44269504088896341f));
  Vec r = fma(n, Vec::set(-0.693359375f), x);
  r = fma(n, Vec::set(2.12194440e-4f), r);
  Vec p = Vec::set(1.9875691500e-4f);
  p = fma(p, r, Vec::set(1.3981999507e-3f));
  p = fma(p, r, Vec::set(8.3334519073e-3f));
  p = fma(p, r, Vec::set(4.1665795894e-2f));
  p = fma(p, r, Vec::set(1.6666665459e-1f));
  p = fma(p, r, Vec::set(5.0000001201e-1f));
  p = fma(p, r * r, r + Vec::set(1.0f));
  return scale2(p, n);
#endif
}

// Loads and transposes logits[kTileTokens, num_experts] into z[num_experts, kTileTokens]. Reads
// whole vectors, past the end of a row. Returns the highest z of each token.
template <typename T>
inline Vec load_tile(const T* logits, int64_t stride, int64_t num_experts, float* z) {
  Vec highest = Vec::set(-__builtin_inff());
  for (int64_t e = 0; e < num_experts; e += Vec::kLanes) {
    Vec rows[kTileTokens];
    for (int i = 0; i < kTileTokens; ++i) {
      __builtin_prefetch(logits + (i + kTileTokens) * stride + e);  // of the next tile
      rows[i] = ordered(Vec::load(logits + i * stride + e));
    }
    transpose(rows);
    const int64_t count = num_experts - e < Vec::kLanes ? num_experts - e : Vec::kLanes;
    for (int i = 0; i < count; ++i) {
      highest = max(highest, rows[i]);
      rows[i].store(z + (e + i) * kTileTokens);
    }
  }
  return highest;
}

// The same for few experts, whose rows lie one behind the other: no more is read than there is.
template <int N, typename T>
inline Vec load_dense_tile(const T* logits, float* z) {
  Vec rows[N];
  for (int i = 0; i < N; ++i) rows[i] = ordered(Vec::load(logits + i * Vec::kLanes));
  transpose(rows);
  Vec highest = Vec::set(-__builtin_inff());
  for (int i = 0; i < N; ++i) {
    highest = max(highest, rows[i]);
    rows[i].store(z + i * kTileTokens);
  }
  return highest;
}

// chosen, highest: [k, kTileTokens] experts and their ratings. Overwrites the ratings if k >
// kRoundExperts.
inline void choose(float* ratings, int64_t num_experts, int64_t k, float* chosen, float* highest) {
  for (int64_t done = 0; done < k; done += kRoundExperts) {
    float* round = chosen + done * kTileTokens;
    float* rated = highest + done * kTileTokens;
    switch (k - done) {
      case 1:
        return highest_rated<1>(ratings, num_experts, round, rated);
      case 2:
        return highest_rated<2>(ratings, num_experts, round, rated);
      case 3:
        return highest_rated<3>(ratings, num_experts, round, rated);
      default:
        highest_rated<kRoundExperts>(ratings, num_experts, round, rated);
    }
    if (done + kRoundExperts == k) return;
    for (int i = 0; i < kRoundExperts * kTileTokens; ++i) {
      const auto expert = static_cast<int64_t>(round[i]);
      ratings[expert * kTileTokens + i % kTileTokens] = -__builtin_inff();
    }
  }
}

// Transposes [k, kTileTokens] to [count, k].
template <typename T>
inline void store_choice(const float* choice, int64_t k, int64_t count, T* out) {
  if (k == 2 && count == kTileTokens) {
    Vec low, high;
    interleave(Vec::load(choice), Vec::load(choice + kTileTokens), low, high);
    low.store(out);
    return high.store(out + Vec::kLanes);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < k; ++j) out[i * k + j] = static_cast<T>(choice[j * kTileTokens + i]);
  }
}

template <typename T, bool kRows>
inline void gating_block(const GatingTopkParams& p, int64_t begin, int64_t end, float* prob_sum,
                         float* entropy, int32_t* load) {
  alignas(64) float probs[kMaxExperts * kTileTokens];
  alignas(64) float biased[kMaxExperts * kTileTokens];
  alignas(64) float chosen[kMaxExperts * kTileTokens];
  alignas(64) float weights[kMaxExperts * kTileTokens];
  alignas(64) float parts[kMaxExperts * kTileTokens];
  alignas(64) float sums[kMaxExperts * kTileTokens];
  alignas(64) T padded[kMaxExperts * kTileTokens];
  const int64_t num_experts = p.num_experts, k = p.k;
  const bool separate_ratings = p.bias || k > kRoundExperts;
  // Counted in lanes; many, one by one.
  const bool few_experts = num_experts <= kTileTokens;
  alignas(64) float loads[kTileTokens * kTileTokens] = {};
  for (int64_t i = 0; i < num_experts * kTileTokens; ++i) sums[i] = 0.0f;
  for (int64_t e = 0; e < num_experts; ++e) load[e] = 0;
  Vec entropies = Vec::set(0.0f);

  const T* logits = static_cast<const T*>(p.logits);
  const T* logits_end = logits + (p.num_tokens - 1) * p.logits_stride + num_experts;
  const int64_t padded_experts = (num_experts + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
  for (int64_t token = begin; token < end; token += kTileTokens) {
    const int64_t count = end - token < kTileTokens ? end - token : kTileTokens;
    bool real[kTileTokens];
    float share[kTileTokens];  // 1 for a real token, else 0
    float extents[kTileTokens];
    for (int i = 0; i < kTileTokens; ++i) {
      real[i] = i < count && (!p.mask || p.mask[token + i]);
      share[i] = real[i] ? 1.0f : 0.0f;
      extents[i] =
          static_cast<float>(k) * (p.importance && i < count ? p.importance[token + i] : 1);
    }

    if constexpr (kRows) {
      entropies = entropies + gate_rows<T>(p, token, count, share, sums, chosen, weights);
    } else {
      const T* tile = logits + token * p.logits_stride;
      int64_t stride = p.logits_stride;
      const bool dense = count == kTileTokens && stride == num_experts;
      Vec highest;
      if (dense && num_experts == 2) {
        highest = load_dense_tile<2>(tile, probs);
      } else if (dense && num_experts == 4) {
        highest = load_dense_tile<4>(tile, probs);
      } else if (dense && num_experts == 8) {
        highest = load_dense_tile<8>(tile, probs);
      } else {
        if (count < kTileTokens || tile + (count - 1) * stride + padded_experts > logits_end) {
          std::memset(padded, 0, sizeof padded);
          for (int64_t i = 0; i < count; ++i) {
            std::memcpy(padded + i * padded_experts, tile + i * stride, num_experts * sizeof(T));
          }
          tile = padded;
          stride = padded_experts;
        }
        highest = load_tile(tile, stride, num_experts, probs);
      }

      // Below e^-104 there is nothing. Where no logit is finite, z - highest is NaN, max gives its
      // second operand, and all experts are equal.
      const Vec none = Vec::set(-__builtin_inff()), inverse = Vec::set(p.inv_temperature);
      const Vec least = select(highest != none, Vec::set(-105.0f), Vec::set(0.0f));
      Vec total = Vec::set(0.0f), moment = Vec::set(0.0f);
      for (int64_t e = 0; e < num_experts; ++e) {
        const Vec z = max((Vec::load(probs + e * kTileTokens) - highest) * inverse, least);
        const Vec weight = exp_of_shifted(z);
        weight.store(probs + e * kTileTokens);
        total = total + weight;
        moment = fma(weight, z, moment);
      }
      const Vec scale = Vec::load(share) / total;
      // -sum of p log p, with log p = z - log(total).
      entropies = entropies + (Vec::load(share) * log(total) - moment * scale);
      for (int64_t e = 0; e < num_experts; ++e) {
        float* sum = sums + e * kTileTokens;
        fma(Vec::load(probs + e * kTileTokens), scale, Vec::load(sum)).store(sum);
      }

      // Without a bias the order of the exponentials is that of the probabilities.
      float* ratings = probs;
      if (separate_ratings) {
        ratings = biased;
        const Vec lowest = Vec::set(-kMaxFloat);  // above -inf, which marks the chosen
        for (int64_t e = 0; e < num_experts; ++e) {
          const Vec bias = Vec::set(p.bias ? p.bias[e] : 0.0f);
          const Vec rating = fma(Vec::load(probs + e * kTileTokens), scale, bias);
          max(rating, lowest).store(biased + e * kTileTokens);
        }
      }
      choose(ratings, num_experts, k, chosen, weights);
      if (separate_ratings) {
        for (int64_t i = 0; i < k * kTileTokens; ++i) {
          weights[i] = probs[static_cast<int64_t>(chosen[i]) * kTileTokens + i % kTileTokens];
        }
      }
    }
    // How much of each slot counts: all of it, or as much as the token's importance reaches.
    const Vec extent = Vec::load(extents), zero = Vec::set(0.0f), one = Vec::set(1.0f);
    Vec sum = zero, slots = zero;
    for (int64_t j = 0; j < k; ++j) {
      // In this order of operands a NaN counts nothing.
      const Vec reach = min(max(extent - Vec::set(static_cast<float>(j)), zero), one);
      const Vec part = j == 0 ? one : reach;
      const Vec weight = Vec::load(weights + j * kTileTokens) * part;
      part.store(parts + j * kTileTokens);
      weight.store(weights + j * kTileTokens);
      sum = sum + weight;
      slots = slots + part;
    }
    const Vec uniform = Vec::load(share) / slots;
    for (int64_t j = 0; j < k; ++j) {
      const Vec weight = Vec::load(weights + j * kTileTokens);
      const Vec part = Vec::load(parts + j * kTileTokens);
      const Vec chosen_share = weight / sum * Vec::load(share);
      select(sum > zero, chosen_share, uniform * part).store(weights + j * kTileTokens);
    }

    const Mask is_real = Vec::load(share) > zero;
    for (int64_t j = 0; j < k; ++j) {
      const Vec expert = Vec::load(chosen + j * kTileTokens);
      select(is_real, expert, Vec::set(static_cast<float>(j))).store(chosen + j * kTileTokens);
      const Vec part = Vec::load(parts + j * kTileTokens);
      const Vec counted = select(part > zero, Vec::load(share), zero);
      if (few_experts) {
        for (int64_t e = 0; e < num_experts; ++e) {
          const Vec other = select(expert != Vec::set(static_cast<float>(e)), zero, counted);
          (Vec::load(loads + e * kTileTokens) + other).store(loads + e * kTileTokens);
        }
      } else {
        counted.store(parts + j * kTileTokens);
      }
    }
    if (!few_experts) {
      for (int64_t i = 0; i < k * kTileTokens; ++i) {
        load[static_cast<int64_t>(chosen[i])] += static_cast<int32_t>(parts[i]);
      }
    }
    store_choice(weights, k, count, p.weights + token * k);
    store_choice(chosen, k, count, p.experts + token * k);
  }
  if (few_experts) {
    for (int64_t e = 0; e < num_experts; ++e) {
      load[e] = static_cast<int32_t>(Vec::load(loads + e * kTileTokens).sum());
    }
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    prob_sum[e] = kRows ? sums[e] : Vec::load(sums + e * kTileTokens).sum();
  }
  *entropy = entropies.sum();
}

template <typename T>
inline void gating_topk_typed(const GatingTopkParams& p) {
  const GatingPlan plan = gating_plan(p);
  float* prob_sums = static_cast<float*>(p.workspace);  // [num_blocks, num_experts]
  float* entropies = prob_sums + plan.num_blocks * p.num_experts;
  int32_t* loads = reinterpret_cast<int32_t*>(entropies + plan.num_blocks);
  const auto gate = gates_rows(p) ? gating_block<T, true> : gating_block<T, false>;
  parallel_for(0, plan.num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * plan.block_tokens;
      const int64_t last = first + plan.block_tokens;
      gate(p, first, last < p.num_tokens ? last : p.num_tokens, prob_sums + block * p.num_experts,
           entropies + block, loads + block * p.num_experts);
    }
  });
  for (int64_t e = 0; e < p.num_experts; ++e) {
    double prob_sum = 0.0;
    int64_t load = 0;
    for (int64_t block = 0; block < plan.num_blocks; ++block) {
      prob_sum += prob_sums[block * p.num_experts + e];
      load += loads[block * p.num_experts + e];
    }
    p.prob_sum[e] = static_cast<float>(prob_sum);
    p.load[e] = load;
  }
  double entropy = 0.0;
  for (int64_t block = 0; block < plan.num_blocks; ++block) entropy += entropies[block];
  *p.entropy = static_cast<float>(entropy);
}

inline void gating_topk_kernel(const GatingTopkParams& p) {
  switch (p.dtype) {
    case DType::kFloat:
      return gating_topk_typed<float>(p);
    case DType::kHalf:
      return gating_topk_typed<half_t>(p);
    case DType::kBFloat16:
      return gating_topk_typed<bfloat16_t>(p);
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

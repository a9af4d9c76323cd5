// LAG: how much a token's channels spread, measured against the next partition of the row (LagKV,
// arXiv:2504.04704), on a log scale.
#pragma once

#include "head_view.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

// Keys or values of a head.
template <typename T>
struct Channels {
  const T* data;
  int64_t stride, dim;

  const T* row(int64_t i) const { return data + i * stride; }
};

// x becomes (x - low) * inverse, channel by channel, in the order of load_pair.
struct ChannelScale {
  alignas(64) float low[kMaxDim], inverse[kMaxDim];

  // The channels [d, d + kPairs * 2 * kLanes), as far as there are any.
  template <int kPairs, typename T>
  void set_from(const Channels<T>& x, int64_t begin, int64_t end, int64_t d) {
    const auto load = [&](int64_t i, int pair) {
      const T* channels = x.row(i) + d + pair * 2 * Vec::kLanes;
      if constexpr (kPairs > 1) return load_pair_loosely(channels);  // these are always whole
      return load_pair(channels, x.dim - d);
    };
    VecPair lowest[kPairs], highest[kPairs];
    for (int pair = 0; pair < kPairs; ++pair) lowest[pair] = highest[pair] = load(begin, pair);
    for (int64_t i = begin + 1; i < end; ++i) {
      for (int pair = 0; pair < kPairs; ++pair) {
        const VecPair lanes = load(i, pair);
        lowest[pair] = {min(lowest[pair].a, lanes.a), min(lowest[pair].b, lanes.b)};
        highest[pair] = {max(highest[pair].a, lanes.a), max(highest[pair].b, lanes.b)};
      }
    }
    for (int pair = 0; pair < kPairs; ++pair) {
      lowest[pair] = exactly<T>(lowest[pair]);
      highest[pair] = exactly<T>(highest[pair]);
      set(d + pair * 2 * Vec::kLanes, lowest[pair].a, highest[pair].a);
      set(d + pair * 2 * Vec::kLanes + Vec::kLanes, lowest[pair].b, highest[pair].b);
    }
  }

  void set(int64_t d, Vec lowest, Vec highest) {
    lowest.store(low + d);
    (Vec::set(1.0f) / (highest - lowest + Vec::set(1e-6f))).store(inverse + d);
  }

  // From the ranges of the tokens [begin, end).
  template <typename T>
  ChannelScale(const Channels<T>& x, int64_t begin, int64_t end) {
    // Whole rows of 128 channels at a time, where the registers hold their lows and highs.
    constexpr int kPairs = Vec::kLanes == 16 ? 4 : 2, kStep = kPairs * 2 * Vec::kLanes;
    int64_t d = 0;
    for (; d + kStep <= x.dim; d += kStep) set_from<kPairs>(x, begin, end, d);
    for (; d < x.dim; d += 2 * Vec::kLanes) set_from<1>(x, begin, end, d);
  }
};

// Standard deviation (unbiased) over the scaled channels of each token of [begin, end).
template <typename T>
inline void channel_spread(const Channels<T>& x, const ChannelScale& scale, int64_t begin,
                           int64_t end, float* spread) {
  const Vec inverse_dim = Vec::set(1.0f / static_cast<float>(x.dim));
  const Vec inverse_rest = Vec::set(x.dim > 1 ? 1.0f / static_cast<float>(x.dim - 1) : 0.0f);
  constexpr int64_t kPair = 2 * Vec::kLanes;
  // Tokens that share what is loaded of the scale, as many as the registers hold the sums of.
  constexpr int kTogether = Vec::kLanes == 16 ? 4 : 1;
  // 1 in the lanes of the last pair that are channels.
  const int64_t tail = x.dim % kPair;
  T ones[kPair] = {};
  for (int64_t lane = 0; lane < tail; ++lane) ones[lane] = from_float<T>(1.0f);
  const VecPair tail_ones = load_pair(ones);

  for (int64_t block = begin; block < end; block += 16) {
    const int count = static_cast<int>(end - block < 16 ? end - block : 16);
    // Sums of distances from the first channel instead of from the mean: one sweep over the token,
    // and the variance loses at most a factor of dim in precision, whatever the offset.
    Vec sums[16], squares[16];
    for (int i = 0; i < 16; i += kTogether) {
      const T* tokens[kTogether];
      Vec first[kTogether];
      VecPair sum[kTogether], square[kTogether];
      for (int j = 0; j < kTogether; ++j) {
        tokens[j] = x.row(block + (i + j < count ? i + j : 0));
        first[j] = Vec::set((to_float(tokens[j][0]) - scale.low[0]) * scale.inverse[0]);
        sum[j] = square[j] = {Vec::set(0.0f), Vec::set(0.0f)};
      }
      if (i >= count) continue;
      const auto add = [&](int64_t d, const auto& load, const auto& weigh) {
        const VecPair low{Vec::load(scale.low + d), Vec::load(scale.low + d + Vec::kLanes)};
        const VecPair inverse{Vec::load(scale.inverse + d),
                              Vec::load(scale.inverse + d + Vec::kLanes)};
        for (int j = 0; j < kTogether; ++j) {
          const VecPair channels = load(tokens[j] + d);
          const VecPair distance = weigh(VecPair{(channels.a - low.a) * inverse.a - first[j],
                                                 (channels.b - low.b) * inverse.b - first[j]});
          sum[j] = {sum[j].a + distance.a, sum[j].b + distance.b};
          square[j] = {fma(distance.a, distance.a, square[j].a),
                       fma(distance.b, distance.b, square[j].b)};
        }
      };
      int64_t d = 0;
      for (; d + kPair <= x.dim; d += kPair) {
        add(d, [](const T* p) { return load_pair(p); }, [](VecPair pair) { return pair; });
      }
      if (tail > 0) {
        add(
            d, [&](const T* p) { return load_pair(p, tail); },
            [&](VecPair pair) { return VecPair{pair.a * tail_ones.a, pair.b * tail_ones.b}; });
      }
      for (int j = 0; j < kTogether; ++j) {
        sums[i + j] = sum[j].a + sum[j].b;
        squares[i + j] = square[j].a + square[j].b;
      }
    }
    alignas(64) float sum[16], square[16];
    sum16(sums, sum);
    sum16(squares, square);
    for (int i = 0; i < 16; i += Vec::kLanes) {
      const Vec s = Vec::load(sum + i);
      const Vec variance = (Vec::load(square + i) - s * s * inverse_dim) * inverse_rest;
      sqrt(max(Vec::set(0.0f), variance)).store(sum + i);  // NaN stays
    }
    std::memcpy(spread + block - begin, sum, count * sizeof(float));
  }
}

// Replaces x by exp(x - its largest); the sum of that.
inline float exponentials(float* x, int64_t count) {
  float top = x[0];
  int64_t i = 0;
  if (count >= Vec::kLanes) {
    Vec tops = Vec::load(x);
    for (; i + Vec::kLanes <= count; i += Vec::kLanes) tops = max(tops, Vec::load(x + i));
    float lanes[Vec::kLanes];
    tops.store(lanes);
    for (float lane : lanes) top = lane > top ? lane : top;
  }
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;

  const Vec shift = Vec::set(top);
  Vec sum = Vec::set(0.0f);
  i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) {
    const Vec e = exp(Vec::load(x + i) - shift);
    e.store(x + i);
    sum = sum + e;
  }
  float total = sum.sum();
  if (i < count) {
    float rest[Vec::kLanes];
    exp(load_partial(x + i, count - i) - shift).store(rest);
    std::memcpy(x + i, rest, (count - i) * sizeof(float));
    for (int64_t lane = 0; lane < count - i; ++lane) total += rest[lane];
  }
  return total;
}

// LAG of the partitions that begin in [begin, end). value_spread [length] is scratch.
template <typename T>
inline void lag_scores(const HeadView<T>& head, int64_t lag, int64_t begin, int64_t end,
                       float* value_spread) {
  if (lag > head.length) lag = head.length;  // one partition
  const Channels<T> keys{head.keys, head.key_stride, head.key_dim};
  const Channels<T> values{head.values, head.value_stride, head.value_dim};
  float* out = head.score(ScoreKind::kLag);
  for (int64_t first = (begin + lag - 1) / lag * lag; first < end; first += lag) {
    const int64_t left = head.length - first;
    const int64_t last = first + (left < lag ? left : lag);
    const int64_t reference = left >= 2 * lag ? first + lag : head.length - lag;
    float* k = out + first;
    float* v = value_spread + first;
    channel_spread(keys, ChannelScale(keys, reference, reference + lag), first, last, k);
    channel_spread(values, ChannelScale(values, reference, reference + lag), first, last, v);
    const float half = 0.5f * static_cast<float>(last - first);
    const Vec key_share = Vec::set(half / exponentials(k, last - first));
    const Vec value_share = Vec::set(half / exponentials(v, last - first));
    for (int64_t i = 0; i < last - first; i += Vec::kLanes) {
      const int64_t count = last - first - i;
      const Vec share =
          fma(load_lanes(k + i, count), key_share, load_lanes(v + i, count) * value_share);
      // max(constant, x) is x where x is NaN.
      store_lanes(log(max(Vec::set(1e-20f), share)), k + i, count);
    }
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

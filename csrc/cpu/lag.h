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

// x becomes (x - low) * inverse, channel by channel.
struct ChannelScale {
  alignas(64) float low[kMaxDim], inverse[kMaxDim];

  template <int kVecs, typename T>
  void set_from(const Channels<T>& x, int64_t begin, int64_t end, int64_t d) {
    const int64_t left = x.dim - d;
    Vec lowest[kVecs], highest[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      lowest[v] = highest[v] =
          load_lanes(x.row(begin) + d + v * Vec::kLanes, left - v * Vec::kLanes);
    }
    for (int64_t i = begin + 1; i < end; ++i) {
      for (int v = 0; v < kVecs; ++v) {
        const Vec lanes = load_lanes(x.row(i) + d + v * Vec::kLanes, left - v * Vec::kLanes);
        lowest[v] = min(lowest[v], lanes);
        highest[v] = max(highest[v], lanes);
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      lowest[v].store(low + d + v * Vec::kLanes);
      (Vec::set(1.0f) / (highest[v] - lowest[v] + Vec::set(1e-6f)))
          .store(inverse + d + v * Vec::kLanes);
    }
  }

  // From the ranges of the tokens [begin, end).
  template <typename T>
  ChannelScale(const Channels<T>& x, int64_t begin, int64_t end) {
    constexpr int kVecs = 4;
    int64_t d = 0;
    for (; d + kVecs * Vec::kLanes <= x.dim; d += kVecs * Vec::kLanes) {
      set_from<kVecs>(x, begin, end, d);
    }
    for (; d < x.dim; d += Vec::kLanes) set_from<1>(x, begin, end, d);
  }
};

// Standard deviation (unbiased) over the scaled channels of each token of [begin, end).
template <typename T>
inline void channel_spread(const Channels<T>& x, const ChannelScale& scale, int64_t begin,
                           int64_t end, float* spread) {
  const Vec inverse_dim = Vec::set(1.0f / static_cast<float>(x.dim));
  const Vec inverse_rest = Vec::set(x.dim > 1 ? 1.0f / static_cast<float>(x.dim - 1) : 0.0f);
  // 1 in the last vector's lanes that are channels.
  const int64_t tail = x.dim % Vec::kLanes;
  alignas(64) float tail_lanes[Vec::kLanes] = {};
  for (int64_t lane = 0; lane < tail; ++lane) tail_lanes[lane] = 1.0f;

  for (int64_t block = begin; block < end; block += 16) {
    const int count = static_cast<int>(end - block < 16 ? end - block : 16);
    // Sums of distances from the first channel instead of from the mean: one sweep over the token,
    // and the variance loses at most a factor of dim in precision, whatever the offset.
    Vec sums[16], squares[16];
    for (int i = 0; i < 16; ++i) {
      sums[i] = squares[i] = Vec::set(0.0f);
      if (i >= count) continue;
      const T* token = x.row(block + i);
      const Vec first = Vec::set((to_float(token[0]) - scale.low[0]) * scale.inverse[0]);
      int64_t d = 0;
      for (; d + Vec::kLanes <= x.dim; d += Vec::kLanes) {
        const Vec scaled =
            (Vec::load(token + d) - Vec::load(scale.low + d)) * Vec::load(scale.inverse + d);
        const Vec distance = scaled - first;
        sums[i] = sums[i] + distance;
        squares[i] = fma(distance, distance, squares[i]);
      }
      if (tail > 0) {
        const Vec scaled = (load_partial(token + d, tail) - Vec::load(scale.low + d)) *
                           Vec::load(scale.inverse + d);
        const Vec distance = (scaled - first) * Vec::load(tail_lanes);
        sums[i] = sums[i] + distance;
        squares[i] = fma(distance, distance, squares[i]);
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
  for (int64_t i = 1; i < count; ++i) top = x[i] > top ? x[i] : top;
  Vec sum = Vec::set(0.0f);
  const Vec shift = Vec::set(top);
  int64_t i = 0;
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

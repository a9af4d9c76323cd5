// Projections of the hidden states, and how much each token stands out: its cosine distance from
// the mean direction of its row's tokens, standardised over the row. Two passes over the hidden
// states: projections and the sum of directions, then the cosines.
#pragma once

#include <algorithm>
#include <cstring>

#include "../params.h"
#include "parallel.h"
#include "token_plan.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr int64_t kTokenTile = 16;  // tokens, as many as sum16 sums
constexpr int64_t kTokenPair = 2 * Vec::kLanes;
constexpr float kLeastTokenNorm = 1e-12f;
// Far above the rounding noise of equal tokens and far below any real spread.
constexpr double kLeastSpread = 1e-4;

// The real tokens of a run of at most kTokenTile: their rows, and where they stand in the run.
template <typename T>
struct TokenTile {
  const T* rows[kTokenTile];
  int64_t place[kTokenTile];
  int count = 0;

  TokenTile(const ProjectTokensParams& p, int64_t batch, int64_t begin, int64_t end) {
    const T* base = static_cast<const T*>(p.hidden_states) + batch * p.stride[0];
    const bool* mask = p.mask ? p.mask + batch * p.num_tokens : nullptr;
    for (int64_t token = begin; token < end && token < begin + kTokenTile; ++token) {
      if (mask && !mask[token]) continue;
      rows[count] = base + token * p.stride[1];
      place[count++] = token;
    }
  }
};

// The weights as fp32 [P rounded up to 4, sum_floats], in the order of load_pair; zeros behind
// them.
template <typename T>
inline void widen_weights(const ProjectTokensParams& p, const TokenPlan& plan, float* wide) {
  std::memset(wide, 0, plan.weight_floats * sizeof(float));
  for (int64_t i = 0; i < p.num_projections; ++i) {
    const T* weight = static_cast<const T*>(p.weight) + i * p.weight_stride;
    for (int64_t c = 0; c < p.num_channels; c += kTokenPair) {
      const VecPair w = load_pair(weight + c, p.num_channels - c);
      w.a.store(wide + i * plan.sum_floats + c);
      w.b.store(wide + i * plan.sum_floats + c + Vec::kLanes);
    }
  }
}

// Four tokens by four projections at a time.
template <typename T>
inline void project_tile(const ProjectTokensParams& p, const TokenPlan& plan,
                         const TokenTile<T>& tile, const float* weights, float* projected) {
  for (int first = 0; first < tile.count; first += 4) {
    const T* rows[4];
    const int count = tile.count - first < 4 ? tile.count - first : 4;
    for (int i = 0; i < 4; ++i) rows[i] = tile.rows[first + (i < count ? i : 0)];
    for (int64_t q = 0; q < p.num_projections; q += 4) {
      const float* w = weights + q * plan.sum_floats;
      Vec sums[16];
      for (Vec& sum : sums) sum = Vec::set(0.0f);
      for (int64_t c = 0; c < p.num_channels; c += kTokenPair) {
        Vec a[4], b[4];
        for (int j = 0; j < 4; ++j) {
          a[j] = Vec::load(w + j * plan.sum_floats + c);
          b[j] = Vec::load(w + j * plan.sum_floats + c + Vec::kLanes);
        }
        for (int i = 0; i < 4; ++i) {
          // The tile after this one's: the hidden states are cold.
          __builtin_prefetch(rows[i] + kTokenTile * p.stride[1] + c);
          const VecPair x = load_pair(rows[i] + c, p.num_channels - c);
          for (int j = 0; j < 4; ++j) sums[4 * i + j] = fma(x.a, a[j], sums[4 * i + j]);
          for (int j = 0; j < 4; ++j) sums[4 * i + j] = fma(x.b, b[j], sums[4 * i + j]);
        }
      }
      float dots[16];
      sum16(sums, dots);
      for (int i = 0; i < count; ++i) {
        float* out = projected + tile.place[first + i] * p.num_projections;
        for (int64_t j = q; j < q + 4 && j < p.num_projections; ++j) out[j] = dots[4 * i + j - q];
      }
    }
  }
}

// The first pass. sum [sum_floats, in the order of load_pair] of the directions of the tokens
// [begin, end). Their inverse norms wait in `inverse_norms` for the second pass; 0 at padding.
template <typename T>
inline void sum_token_directions(const ProjectTokensParams& p, int64_t batch, int64_t begin,
                                 int64_t end, const TokenPlan& plan, const float* weights,
                                 float* inverse_norms, float* sum) {
  const int64_t channels = p.num_channels;
  float* projected = p.projected + batch * p.num_tokens * p.num_projections;
  // Without projections there is no memory, which memset may not be given.
  std::fill_n(projected + begin * p.num_projections, (end - begin) * p.num_projections, 0.0f);
  std::memset(sum, 0, plan.sum_floats * sizeof(float));
  std::memset(inverse_norms + begin, 0, (end - begin) * sizeof(float));
  for (int64_t first = begin; first < end; first += kTokenTile) {
    const TokenTile<T> tile(p, batch, first, end);
    project_tile(p, plan, tile, weights, projected);
    Vec squares[kTokenTile];
    for (int i = 0; i < kTokenTile; ++i) {
      squares[i] = Vec::set(0.0f);
      if (i >= tile.count) continue;
      for (int64_t c = 0; c < channels; c += kTokenPair) {
        const VecPair x = load_pair(tile.rows[i] + c, channels - c);
        squares[i] = fma(x.b, x.b, fma(x.a, x.a, squares[i]));
      }
    }
    float inverse[kTokenTile];
    sum16(squares, inverse);
    for (int i = 0; i < tile.count; ++i) {
      const float norm = __builtin_sqrtf(inverse[i]);
      inverse[i] = 1.0f / (norm < kLeastTokenNorm ? kLeastTokenNorm : norm);
      inverse_norms[tile.place[i]] = inverse[i];
    }
    for (int64_t c = 0; c < channels; c += kTokenPair) {
      Vec a = Vec::load(sum + c), b = Vec::load(sum + c + Vec::kLanes);
      for (int i = 0; i < tile.count; ++i) {
        const VecPair x = load_pair(tile.rows[i] + c, channels - c);
        a = fma(x.a, Vec::set(inverse[i]), a);
        b = fma(x.b, Vec::set(inverse[i]), b);
      }
      a.store(sum + c);
      b.store(sum + c + Vec::kLanes);
    }
  }
}

// The sums of all chunks of a row become one direction, in the first's place.
inline void mean_token_direction(const TokenPlan& plan, float* sums) {
  Vec square = Vec::set(0.0f);
  for (int64_t c = 0; c < plan.sum_floats; c += Vec::kLanes) {
    Vec sum = Vec::load(sums + c);
    for (int64_t chunk = 1; chunk < plan.num_chunks; ++chunk) {
      sum = sum + Vec::load(sums + chunk * plan.sum_floats + c);
    }
    sum.store(sums + c);
    square = fma(sum, sum, square);
  }
  const float norm = __builtin_sqrtf(square.sum());
  const Vec factor = Vec::set(1.0f / (norm < kLeastTokenNorm ? kLeastTokenNorm : norm));
  for (int64_t c = 0; c < plan.sum_floats; c += Vec::kLanes) {
    (Vec::load(sums + c) * factor).store(sums + c);
  }
}

// Inverse norms become cosine distances from the mean direction.
template <typename T>
inline void token_distances(const ProjectTokensParams& p, int64_t batch, int64_t begin, int64_t end,
                            const float* mean, float* distances) {
  const int64_t channels = p.num_channels;
  for (int64_t first = begin; first < end; first += kTokenTile) {
    const TokenTile<T> tile(p, batch, first, end);
    Vec dots[kTokenTile];
    for (int i = 0; i < kTokenTile; ++i) {
      dots[i] = Vec::set(0.0f);
      if (i >= tile.count) continue;
      for (int64_t c = 0; c < channels; c += kTokenPair) {
        const VecPair x = load_pair(tile.rows[i] + c, channels - c);
        dots[i] = fma(x.a, Vec::load(mean + c), dots[i]);
        dots[i] = fma(x.b, Vec::load(mean + c + Vec::kLanes), dots[i]);
      }
    }
    float dot[kTokenTile];
    sum16(dots, dot);
    for (int i = 0; i < tile.count; ++i) {
      float& distance = distances[tile.place[i]];
      distance = 1.0f - dot[i] * distance;
    }
  }
}

// Distances become standardised ones; 0 at padding.
inline void standardise_tokens(const ProjectTokensParams& p, int64_t batch, float* distances) {
  const bool* mask = p.mask ? p.mask + batch * p.num_tokens : nullptr;
  double sum = 0.0, square = 0.0;
  int64_t count = 0;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    if (mask && !mask[t]) continue;
    sum += distances[t];
    ++count;
  }
  const double mean = sum / static_cast<double>(count ? count : 1);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const double deviation = mask && !mask[t] ? 0.0 : distances[t] - mean;
    square += deviation * deviation;
  }
  const double spread = __builtin_sqrt(square / static_cast<double>(count ? count : 1));
  const auto scale = static_cast<float>(1.0 / (spread + kLeastSpread));
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const auto deviation = static_cast<float>(distances[t] - mean);
    distances[t] = mask && !mask[t] ? 0.0f : deviation * scale;
  }
}

template <typename T>
inline void project_tokens_typed(const ProjectTokensParams& p) {
  const TokenPlan plan = token_plan(p);
  const int64_t row_floats = plan.num_chunks * plan.sum_floats;
  float* weights = static_cast<float*>(p.workspace);
  float* sums = weights + plan.weight_floats;
  widen_weights<T>(p, plan, weights);
  const auto for_each_chunk = [&](const auto& work) {
    parallel_for(0, p.batch * plan.num_chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t batch = item / plan.num_chunks, chunk = item % plan.num_chunks;
        const int64_t begin = chunk * plan.chunk_tokens, end = begin + plan.chunk_tokens;
        work(batch, begin, end < p.num_tokens ? end : p.num_tokens,
             p.standout + batch * p.num_tokens, sums + batch * row_floats, chunk);
      }
    });
  };
  for_each_chunk(
      [&](int64_t batch, int64_t begin, int64_t end, float* out, float* row_sums, int64_t chunk) {
        sum_token_directions<T>(p, batch, begin, end, plan, weights, out,
                                row_sums + chunk * plan.sum_floats);
      });
  parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) mean_token_direction(plan, sums + b * row_floats);
  });
  for_each_chunk([&](int64_t batch, int64_t begin, int64_t end, float* out, const float* row_sums,
                     int64_t) { token_distances<T>(p, batch, begin, end, row_sums, out); });
  parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) standardise_tokens(p, b, p.standout + b * p.num_tokens);
  });
}

inline void project_tokens_kernel(const ProjectTokensParams& p) {
  switch (p.dtype) {
    case DType::kFloat:
      return project_tokens_typed<float>(p);
    case DType::kHalf:
      return project_tokens_typed<half_t>(p);
    case DType::kBFloat16:
      return project_tokens_typed<bfloat16_t>(p);
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

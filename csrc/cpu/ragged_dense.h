// Tiles of keys and values in the dtype of the queries, for ragged_attention: products with
// queries, sums of values.
#pragma once

#include "ragged_plan.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr int kTileKeys = 64;  // K and V tiles of a head_dim up to 256 stay in L2
constexpr int kQueryRows = 4;  // queries that share one read of the keys
constexpr int kPairLanes = 2 * Vec::kLanes;

// Queries and sums of values are in the order of load_pair<T> as far as there are whole pairs of
// vectors, in their own order from there on.

// Rows of keys or values that are needed soon. They are asked for a few at a time, in step with the
// work on a tile: the processor, which sees runs of one tile each from two places, does not foresee
// them, and all at once they would be in the way of what is needed now.
template <typename T>
struct Ahead {
  const T* rows;
  int64_t stride, dim, count;

  void ask(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end && i < count; ++i) {
      const char* row = reinterpret_cast<const char*>(rows + i * stride);
      for (size_t byte = 0; byte < dim * sizeof(T); byte += 64) __builtin_prefetch(row + byte);
    }
  }
};

// Dot products of R queries (stride D) with 4 keys, keys[j] at key + j * stride: out[r * 4 + j].
template <int R, typename T>
inline void dot_block(const float* query, int64_t dim, const T* key, int64_t stride, float* out) {
  Vec sums[kQueryRows * 4];
  for (int i = 0; i < kQueryRows * 4; ++i) sums[i] = Vec::set(0.0f);
  int64_t d = 0;
  for (; d + kPairLanes <= dim; d += kPairLanes) {
    VecPair k[4];
    for (int j = 0; j < 4; ++j) k[j] = load_pair(key + j * stride + d);
    for (int r = 0; r < R; ++r) {
      const Vec a = Vec::load(query + r * dim + d);
      const Vec b = Vec::load(query + r * dim + d + Vec::kLanes);
      for (int j = 0; j < 4; ++j) {
        sums[r * 4 + j] = fma(b, k[j].b, fma(a, k[j].a, sums[r * 4 + j]));
      }
    }
  }
  for (; d + Vec::kLanes <= dim; d += Vec::kLanes) {
    Vec k[4];
    for (int j = 0; j < 4; ++j) k[j] = Vec::load(key + j * stride + d);
    for (int r = 0; r < R; ++r) {
      const Vec q = Vec::load(query + r * dim + d);
      for (int j = 0; j < 4; ++j) sums[r * 4 + j] = fma(q, k[j], sums[r * 4 + j]);
    }
  }
  sum16(sums, out);
  for (; d < dim; ++d) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < 4; ++j)
        out[r * 4 + j] += query[r * dim + d] * to_float(key[j * stride + d]);
    }
  }
}

// scores[r][j] for all keys of a tile.
template <int R, typename T>
inline void tile_scores(const float* query, int64_t dim, const T* keys, int64_t stride, int count,
                        const Ahead<T>& ahead, float (*scores)[kTileKeys]) {
  float block[kQueryRows * 4];
  for (int j = 0; j < count; j += 4) {
    const int n = count - j < 4 ? count - j : 4;
    ahead.ask(j, j + n);
    // At the end of a short tile, one key at a time (stride 0) instead of reading past the end.
    if (n == 4) {
      dot_block<R>(query, dim, keys + j * stride, stride, block);
    } else {
      for (int i = 0; i < n; ++i) {
        float single[kQueryRows * 4];
        dot_block<R>(query, dim, keys + (j + i) * stride, 0, single);
        for (int r = 0; r < R; ++r) block[r * 4 + i] = single[r * 4];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < n; ++i) scores[r][j + i] = block[r * 4 + i];
    }
  }
}

// The next of these, for P pairs of vectors of the values.
template <int R, int P, typename T>
inline void add_values(const float (*weights)[kTileKeys], const T* values, int64_t stride,
                       int count, const Ahead<T>& ahead, float* sums, int64_t sum_stride) {
  VecPair acc[R][P];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < P; ++i) {
      const float* sum = sums + r * sum_stride + i * kPairLanes;
      acc[r][i] = {Vec::load(sum), Vec::load(sum + Vec::kLanes)};
    }
  }
  for (int j = 0; j < count; ++j) {
    ahead.ask(j, j + 1);
    VecPair v[P];
    for (int i = 0; i < P; ++i) v[i] = load_pair(values + j * stride + i * kPairLanes);
    for (int r = 0; r < R; ++r) {
      const Vec w = Vec::set(weights[r][j]);
      for (int i = 0; i < P; ++i) {
        acc[r][i] = {fma(w, v[i].a, acc[r][i].a), fma(w, v[i].b, acc[r][i].b)};
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < P; ++i) {
      float* sum = sums + r * sum_stride + i * kPairLanes;
      acc[r][i].a.store(sum);
      acc[r][i].b.store(sum + Vec::kLanes);
    }
  }
}

// sums[r][:] += weights[r][j] * values[j][:] over the tile; row r of the sums is sum_stride floats
// away.
template <int R, typename T>
inline void tile_values(const float (*weights)[kTileKeys], const T* values, int64_t stride,
                        int count, int64_t dim, Ahead<T> ahead, float* sums, int64_t sum_stride) {
  int64_t d = 0;
  for (; d + 2 * kPairLanes <= dim; d += 2 * kPairLanes) {
    add_values<R, 2>(weights, values + d, stride, count, ahead, sums + d, sum_stride);
    ahead.count = 0;
  }
  if (d + kPairLanes <= dim) {
    add_values<R, 1>(weights, values + d, stride, count, ahead, sums + d, sum_stride);
    ahead.count = 0;
    d += kPairLanes;
  }
  for (; d + Vec::kLanes <= dim; d += Vec::kLanes) {
    for (int r = 0; r < R; ++r) {
      Vec acc = Vec::load(sums + r * sum_stride + d);
      for (int j = 0; j < count; ++j) {
        acc = fma(Vec::set(weights[r][j]), Vec::load(values + j * stride + d), acc);
      }
      acc.store(sums + r * sum_stride + d);
    }
  }
  for (; d < dim; ++d) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < count; ++j) {
        sums[r * sum_stride + d] += weights[r][j] * to_float(values[j * stride + d]);
      }
    }
  }
}

// Keys that are attended to at once, and what is asked for meanwhile.
template <typename T>
struct DenseTile {
  const T* keys;
  const T* values;
  int64_t key_stride, value_stride, key_dim, value_dim;
  int count;
  Ahead<T> value_rows, next_keys;

  template <int R>
  void products(const float* query, float (*scores)[kTileKeys]) const {
    tile_scores<R>(query, key_dim, keys, key_stride, count, value_rows, scores);
  }
  // Those from `begin` to `end`; weights[r][0] is of the first of them.
  template <int R>
  void add(const float (*weights)[kTileKeys], int begin, int end, float* sums,
           int64_t sum_stride) const {
    tile_values<R>(weights, values + begin * value_stride, value_stride, end - begin, value_dim,
                   next_keys, sums, sum_stride);
  }
  void ask_no_more() { value_rows.count = next_keys.count = 0; }
};

template <typename T>
struct DenseRows {
  const T* keys;
  const T* values;
  int64_t key_stride, value_stride, key_dim, value_dim;

  int64_t query_stride() const { return key_dim; }
  // n keys, of which `left` come later.
  DenseTile<T> tile(int64_t first, int n, int64_t left) const {
    const T* k = keys + first * key_stride;
    const T* v = values + first * value_stride;
    return {.keys = k,
            .values = v,
            .key_stride = key_stride,
            .value_stride = value_stride,
            .key_dim = key_dim,
            .value_dim = value_dim,
            .count = n,
            .value_rows = {v, value_stride, value_dim, n},
            .next_keys = {k + n * key_stride, key_stride, key_dim, left}};
  }
};

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

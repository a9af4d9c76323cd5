// Attention of a few queries over ragged heads: flash decoding. Keys are cut into segments
// (ragged_plan.h); each segment keeps a running softmax over tiles of keys; segments are combined
// in order.
#pragma once

#include <type_traits>

#include "../params.h"
#include "parallel.h"
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

// A tile of the tail as the queries see it; stored rows are all seen.
struct TailView {
  const RaggedAttentionParams* params;
  int64_t batch, kv_head, first;  // first: tail position of the tile's first key

  // Whether every query sees the tile's `count` keys.
  bool all_visible(int64_t count) const {
    const RaggedAttentionParams& p = *params;
    return !p.mask && first + count <= p.num_tail - p.num_queries + 1;
  }

  bool visible(int64_t row_query, int64_t j) const {
    const RaggedAttentionParams& p = *params;
    const int64_t query = row_query % p.num_queries;
    const int64_t head = kv_head * (p.num_query_heads / p.num_kv_heads) + row_query / p.num_queries;
    const int64_t position = first + j;
    if (position > p.num_tail - p.num_queries + query) return false;
    return !p.mask || p.mask[batch * p.mask_stride[0] + head * p.mask_stride[1] +
                             query * p.mask_stride[2] + position * p.mask_stride[3]];
  }
};

// Keys that are attended to at once, and what is asked for meanwhile.
template <typename T>
struct Tile {
  const T* keys;
  const T* values;
  int64_t key_stride, value_stride;
  int count;
  Ahead<T> value_rows, next_keys;
};

// Adds the values that the queries see, and no others: 0 times NaN is not 0. seen[j]: a bit for
// each of the R queries. Keys that the same queries see come together.
template <int R, typename T>
[[gnu::noinline]] void seen_values(const float (*weights)[kTileKeys], const uint8_t* seen,
                                   const Tile<T>& tile, int64_t dim, float* sums,
                                   int64_t sum_stride) {
  for (int begin = 0, end = 0; begin < tile.count; begin = end) {
    while (end < tile.count && seen[end] == seen[begin]) ++end;
    const T* values = tile.values + begin * tile.value_stride;
    const auto add = [&](auto queries, int first) {
      tile_values<queries>(reinterpret_cast<const float (*)[kTileKeys]>(&weights[first][begin]),
                           values, tile.value_stride, end - begin, dim, tile.next_keys,
                           sums + first * sum_stride, sum_stride);
    };
    if (seen[begin] == (1 << R) - 1) {
      add(std::integral_constant<int, R>{}, 0);
      continue;
    }
    for (int r = 0; r < R; ++r) {
      if (seen[begin] >> r & 1) add(std::integral_constant<int, 1>{}, r);
    }
  }
}

// Folds one tile of keys into the partial results of R queries, each [max, sum, values...].
template <int R, typename T>
inline void attend_tile(const RaggedAttentionParams& p, const float* query, int64_t first_query,
                        const Tile<T>& tile, const TailView* tail, float* partials,
                        int64_t partial_stride) {
  const int count = tile.count;
  alignas(64) float scores[kQueryRows][kTileKeys];
  tile_scores<R>(query, p.key_dim, tile.keys, tile.key_stride, count, tile.value_rows, scores);
  uint8_t seen[kTileKeys] = {};
  for (int r = 0; r < R; ++r) {
    float* row = scores[r];
    if (p.softcap > 0) {
      for (int j = 0; j < count; ++j) row[j] = p.softcap * __builtin_tanhf(row[j] / p.softcap);
    }
    bool any = !tail;
    if (tail) {
      for (int j = 0; j < count; ++j) {
        const bool visible = tail->visible(first_query + r, j);
        seen[j] = static_cast<uint8_t>(seen[j] | visible << r);
        any |= visible;
        if (!visible) row[j] = -__builtin_inff();
      }
    }
    if (!any) continue;
    for (int j = count; j < kTileKeys; ++j) row[j] = -__builtin_inff();
    Vec highest = Vec::set(-__builtin_inff());
    for (int j = 0; j < kTileKeys; j += Vec::kLanes) highest = max(Vec::load(row + j), highest);
    float* partial = partials + r * partial_stride;
    const float old = partial[0], best = highest.highest();
    // Where no seen score is a number, the exponentials below make the row NaN.
    float largest = old > best ? old : best;
    if (largest == -__builtin_inff()) largest = 0.0f;
    const Vec shift = Vec::set(largest);
    for (int j = 0; j < kTileKeys; j += Vec::kLanes) exp(Vec::load(row + j) - shift).store(row + j);
    for (int j = count; j < kTileKeys; ++j) row[j] = 0.0f;
    if (tail) {
      for (int j = 0; j < count; ++j) {
        if (!(seen[j] >> r & 1)) row[j] = 0.0f;
      }
    }
    Vec sums = Vec::set(0.0f);
    for (int j = 0; j < kTileKeys; j += Vec::kLanes) sums = sums + Vec::load(row + j);
    const float sum = sums.sum();
    const float keep = old == -__builtin_inff() ? 0.0f : __builtin_expf(old - largest);
    partial[0] = largest;
    partial[1] = partial[1] * keep + sum;
    if (keep != 1.0f) {
      for (int64_t d = 0; d < p.value_dim; ++d) partial[2 + d] *= keep;
    }
  }
  if (tail) {
    seen_values<R>(scores, seen, tile, p.value_dim, partials + 2, partial_stride);
  } else {
    tile_values<R>(scores, tile.values, tile.value_stride, count, p.value_dim, tile.next_keys,
                   partials + 2, partial_stride);
  }
}

template <typename T>
inline void attend_keys(const RaggedAttentionParams& p, const float* queries, int64_t num_rows,
                        const T* keys, int64_t key_stride, const T* values, int64_t value_stride,
                        int64_t count, TailView* tail, float* partials) {
  const int64_t stride = ragged_partial_floats(p);
  for (int64_t first = 0; first < count; first += kTileKeys) {
    const int n = static_cast<int>(count - first < kTileKeys ? count - first : kTileKeys);
    const T* k = keys + first * key_stride;
    const T* v = values + first * value_stride;
    Tile<T> tile{.keys = k,
                 .values = v,
                 .key_stride = key_stride,
                 .value_stride = value_stride,
                 .count = n,
                 .value_rows = {v, value_stride, p.value_dim, n},
                 .next_keys = {k + n * key_stride, key_stride, p.key_dim, count - first - n}};
    const TailView* hidden = tail && !tail->all_visible(n) ? tail : nullptr;
    for (int64_t m = 0; m < num_rows; m += kQueryRows) {
      const float* q = queries + m * p.key_dim;
      float* partial = partials + m * stride;
      switch (num_rows - m) {
        case 1:
          attend_tile<1>(p, q, m, tile, hidden, partial, stride);
          break;
        case 2:
          attend_tile<2>(p, q, m, tile, hidden, partial, stride);
          break;
        case 3:
          attend_tile<3>(p, q, m, tile, hidden, partial, stride);
          break;
        default:
          attend_tile<4>(p, q, m, tile, hidden, partial, stride);
          break;
      }
      tile.value_rows.count = tile.next_keys.count = 0;  // once is enough
    }
    if (tail) tail->first += n;
  }
}

template <typename T>
inline void ragged_attention_typed(const RaggedAttentionParams& p) {
  const RaggedPlan plan = ragged_plan(p);
  const int64_t rows = plan.rows, row_queries = plan.row_queries;
  const int64_t group = p.num_query_heads / p.num_kv_heads;
  const int64_t partial_floats = ragged_partial_floats(p);
  int64_t* first_item = static_cast<int64_t*>(p.workspace);
  float* queries = reinterpret_cast<float*>(first_item + rows + 1);
  float* partials = queries + ragged_query_floats(p);
  first_item[0] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    first_item[row + 1] = first_item[row] + ragged_row_items(p, plan.segment, row);
  }

  // queries: [rows, group * num_queries, key_dim], scaled
  parallel_for(
      0, p.batch * p.num_query_heads * p.num_queries, 256, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t query = i % p.num_queries, head = i / p.num_queries % p.num_query_heads;
          const int64_t batch = i / p.num_queries / p.num_query_heads;
          const T* source = static_cast<const T*>(p.query) + batch * p.query_stride[0] +
                            head * p.query_stride[1] + query * p.query_stride[2];
          float* scaled = queries + i * p.key_dim;
          const Vec scaling = Vec::set(p.scaling);
          int64_t d = 0;
          for (; d + kPairLanes <= p.key_dim; d += kPairLanes) {
            const VecPair pair = load_pair(source + d);
            (pair.a * scaling).store(scaled + d);
            (pair.b * scaling).store(scaled + d + Vec::kLanes);
          }
          for (; d < p.key_dim; ++d) scaled[d] = to_float(source[d]) * p.scaling;
        }
      });

  parallel_for(0, plan.num_items, 1, [&](int64_t begin, int64_t end) {
    int64_t row = 0;
    for (int64_t item = begin; item < end; ++item) {
      while (first_item[row + 1] <= item) ++row;
      const int64_t batch = row / p.num_kv_heads, kv_head = row % p.num_kv_heads;
      float* partial = partials + item * row_queries * partial_floats;
      for (int64_t m = 0; m < row_queries; ++m) {
        float* one = partial + m * partial_floats;
        one[0] = -__builtin_inff();
        for (int64_t d = 1; d < partial_floats; ++d) one[d] = 0.0f;
      }
      const float* row_query = queries + row * row_queries * p.key_dim;
      const int64_t stored = p.end[row] - p.begin[row];
      const int64_t first = (item - first_item[row]) * plan.segment;
      const int64_t last = first + plan.segment;
      if (first < stored) {
        const int64_t source = p.begin[row] + first;
        attend_keys(p, row_query, row_queries,
                    static_cast<const T*>(p.keys) + source * p.key_stride, p.key_stride,
                    static_cast<const T*>(p.values) + source * p.value_stride, p.value_stride,
                    (last < stored ? last : stored) - first, nullptr, partial);
      }
      if (last > stored && p.num_tail > 0) {
        const int64_t tail_first = first > stored ? first - stored : 0;
        const int64_t tail_last = last - stored < p.num_tail ? last - stored : p.num_tail;
        TailView tail{&p, batch, kv_head, tail_first};
        attend_keys(p, row_query, row_queries,
                    static_cast<const T*>(p.tail_keys) + batch * p.tail_key_stride[0] +
                        kv_head * p.tail_key_stride[1] + tail_first * p.tail_key_stride[2],
                    p.tail_key_stride[2],
                    static_cast<const T*>(p.tail_values) + batch * p.tail_value_stride[0] +
                        kv_head * p.tail_value_stride[1] + tail_first * p.tail_value_stride[2],
                    p.tail_value_stride[2], tail_last - tail_first, &tail, partial);
      }
    }
  });

  parallel_for(0, rows * row_queries, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / row_queries, m = i % row_queries;
      const int64_t head = row % p.num_kv_heads * group + m / p.num_queries;
      T* output =
          static_cast<T*>(p.output) +
          ((row / p.num_kv_heads * p.num_queries + m % p.num_queries) * p.num_query_heads + head) *
              p.value_dim;
      const int64_t items = first_item[row + 1] - first_item[row];
      float* sums = partials + (first_item[row] * row_queries + m) * partial_floats;
      if (items == 0) {
        for (int64_t d = 0; d < p.value_dim; ++d) output[d] = from_float<T>(0.0f);
        continue;
      }
      // Folds the later segments into the first.
      for (int64_t item = 1; item < items; ++item) {
        const float* other = sums + item * row_queries * partial_floats;
        const float largest =
            sums[0] > other[0] || other[0] == -__builtin_inff() ? sums[0] : other[0];
        if (largest == -__builtin_inff()) continue;
        const float mine = sums[0] == -__builtin_inff() ? 0.0f : __builtin_expf(sums[0] - largest);
        const float theirs =
            other[0] == -__builtin_inff() ? 0.0f : __builtin_expf(other[0] - largest);
        sums[0] = largest;
        for (int64_t d = 1; d < partial_floats; ++d) sums[d] = sums[d] * mine + other[d] * theirs;
      }
      const float scale = sums[0] == -__builtin_inff() ? 0.0f : 1.0f / sums[1];
      const float* values = sums + 2;
      int64_t d = 0;
      for (; d + kPairLanes <= p.value_dim; d += kPairLanes) {
        const VecPair ordered =
            in_order<T>({Vec::load(values + d), Vec::load(values + d + Vec::kLanes)});
        float lanes[kPairLanes];
        ordered.a.store(lanes);
        ordered.b.store(lanes + Vec::kLanes);
        for (int i = 0; i < kPairLanes; ++i) output[d + i] = from_float<T>(lanes[i] * scale);
      }
      for (; d < p.value_dim; ++d) output[d] = from_float<T>(values[d] * scale);
    }
  });
}

inline void ragged_attention_kernel(const RaggedAttentionParams& p) {
  switch (p.dtype) {
    case DType::kFloat:
      return ragged_attention_typed<float>(p);
    case DType::kHalf:
      return ragged_attention_typed<half_t>(p);
    case DType::kBFloat16:
      return ragged_attention_typed<bfloat16_t>(p);
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

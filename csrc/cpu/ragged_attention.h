// Attention of a few queries over ragged heads: flash decoding. Keys are cut into segments
// (ragged_plan.h); each segment keeps a running softmax over tiles of keys; segments are combined
// in order.
#pragma once

#include <type_traits>

#include "../params.h"
#include "parallel.h"
#include "ragged_coded.h"
#include "ragged_dense.h"
#include "ragged_plan.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

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

// Adds the values that the queries see, and no others: 0 times NaN is not 0. seen[j]: a bit for
// each of the R queries. Keys that the same queries see come together.
template <int R, typename Tile>
[[gnu::noinline]] void seen_values(const float (*weights)[kTileKeys], const uint8_t* seen,
                                   const Tile& tile, float* sums, int64_t sum_stride) {
  for (int begin = 0, end = 0; begin < tile.count; begin = end) {
    while (end < tile.count && seen[end] == seen[begin]) ++end;
    const auto add = [&](auto queries, int first) {
      tile.template add<queries>(
          reinterpret_cast<const float (*)[kTileKeys]>(&weights[first][begin]), begin, end,
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

// Whether biases hide some of the rows.
inline bool hides_any(const float* bias, int count) {
  bool hides = false;
  for (int j = 0; j < count; ++j) hides |= bias[j] == -__builtin_inff();
  return hides;
}

// Folds one tile of keys into the partial results of R queries, each [max, sum, values...].
// Not all queries see all keys: by `tail`, or, of stored rows, by `bias`.
template <int R, typename Tile>
inline void attend_tile(const RaggedAttentionParams& p, const float* query, int64_t first_query,
                        const Tile& tile, const TailView* tail, const float* bias, bool hides,
                        float* partials, int64_t partial_stride) {
  const int count = tile.count;
  alignas(64) float scores[kQueryRows][kTileKeys];
  tile.template products<R>(query, scores);
  uint8_t seen[kTileKeys] = {};
  for (int r = 0; r < R; ++r) {
    float* row = scores[r];
    if (p.softcap > 0) {
      for (int j = 0; j < count; ++j) row[j] = p.softcap * __builtin_tanhf(row[j] / p.softcap);
    }
    if (bias) {
      for (int j = 0; j < count; ++j) row[j] += bias[j];
    }
    bool any = !hides;
    if (hides) {
      for (int j = 0; j < count; ++j) {
        const bool visible =
            bias ? bias[j] != -__builtin_inff() : tail->visible(first_query + r, j);
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
    if (hides) {
      for (int j = 0; j < count; ++j) {
        if (!(seen[j] >> r & 1)) row[j] = 0.0f;
      }
    }
    Vec sums = Vec::set(0.0f);
    for (int j = 0; j < kTileKeys; j += Vec::kLanes) sums = sums + Vec::load(row + j);
    const float sum = sums.sum();
    float keep = 1.0f;  // as for most tiles
    if (old != largest) keep = old == -__builtin_inff() ? 0.0f : __builtin_expf(old - largest);
    partial[0] = largest;
    partial[1] = partial[1] * keep + sum;
    if (keep != 1.0f) {
      for (int64_t d = 0; d < p.value_dim; ++d) partial[2 + d] *= keep;
    }
  }
  if (hides) {
    seen_values<R>(scores, seen, tile, partials + 2, partial_stride);
  } else {
    tile.template add<R>(scores, 0, count, partials + 2, partial_stride);
  }
}

// Attends to `count` rows: those of the tail that `tail` says, or stored ones with their bias.
template <typename Rows>
inline void attend_rows(const RaggedAttentionParams& p, const float* queries, int64_t num_queries,
                        Rows& rows, int64_t count, TailView* tail, const uint16_t* bias,
                        float* partials) {
  const int64_t stride = ragged_partial_floats(p);
  for (int64_t first = 0; first < count; first += kTileKeys) {
    const int n = static_cast<int>(count - first < kTileKeys ? count - first : kTileKeys);
    auto tile = rows.tile(first, n, count - first - n);
    float biases[kTileKeys];
    if (bias) halves_to_floats(bias + first, n, biases);
    const float* shift = bias ? biases : nullptr;
    const bool hides = tail ? !tail->all_visible(n) : bias && hides_any(shift, n);
    for (int64_t m = 0; m < num_queries; m += kQueryRows) {
      const float* q = queries + m * rows.query_stride();
      float* partial = partials + m * stride;
      switch (num_queries - m) {
        case 1:
          attend_tile<1>(p, q, m, tile, tail, shift, hides, partial, stride);
          break;
        case 2:
          attend_tile<2>(p, q, m, tile, tail, shift, hides, partial, stride);
          break;
        case 3:
          attend_tile<3>(p, q, m, tile, tail, shift, hides, partial, stride);
          break;
        default:
          attend_tile<4>(p, q, m, tile, tail, shift, hides, partial, stride);
          break;
      }
      tile.ask_no_more();  // once is enough
    }
    if (tail) tail->first += n;
  }
}

// To stored rows from `first` on, in whichever format they are.
template <typename T>
inline void attend_stored(const RaggedAttentionParams& p, const float* queries,
                          const float* coded_queries, int64_t num_queries, int64_t first,
                          int64_t count, float* partials) {
  const uint16_t* bias = p.bias ? p.bias + first : nullptr;
  const auto attend = [&](auto&& rows, const float* prepared) {
    attend_rows(p, prepared, num_queries, rows, count, nullptr, bias, partials);
  };
  if (p.key_bits == 16) {
    return attend(DenseRows<T>{static_cast<const T*>(p.keys) + first * p.key_stride,
                               static_cast<const T*>(p.values) + first * p.value_stride,
                               p.key_stride, p.value_stride, p.key_dim, p.value_dim},
                  queries);
  }
  if (p.key_bits == 4) {
    attend(CodedRows<4, 4>(p, first), coded_queries);
  } else if (p.value_bits == 4) {
    attend(CodedRows<8, 4>(p, first), coded_queries);
  } else {
    attend(CodedRows<8, 8>(p, first), coded_queries);
  }
  const PairOrder<T> order;
  for (int64_t m = 0; m < num_queries; ++m) {
    finish_coded<T>(p, order, partials + m * ragged_partial_floats(p) + 2);
  }
}

// What sums of weighted values are multiplied with: 1 over all weights, that of a sink included.
inline float share_of(float largest, float total, float sink) {
  if (sink == -__builtin_inff()) return 1.0f / total;
  const float top = largest > sink ? largest : sink;
  const float mine = __builtin_expf(largest - top);
  return mine / (total * mine + __builtin_expf(sink - top));
}

template <typename T>
inline void ragged_attention_typed(const RaggedAttentionParams& p) {
  const RaggedPlan plan = ragged_plan(p);
  const int64_t rows = plan.rows, row_queries = plan.row_queries;
  const int64_t group = p.num_query_heads / p.num_kv_heads;
  const int64_t partial_floats = ragged_partial_floats(p);
  int64_t* first_item = static_cast<int64_t*>(p.workspace);
  float* queries = reinterpret_cast<float*>(first_item + rows + 1);
  float* coded_queries = queries + ragged_query_floats(p);
  float* partials = coded_queries + ragged_coded_query_floats(p);
  const int64_t coded_dim = ragged_coded_dim(p);
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
          if (coded_dim > 0) prepare_coded_query(p, source, coded_queries + i * coded_dim);
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
        attend_stored<T>(p, row_query, coded_queries + row * row_queries * coded_dim, row_queries,
                         p.begin[row] + first, (last < stored ? last : stored) - first, partial);
      }
      if (last > stored && p.num_tail > 0) {
        const int64_t tail_first = first > stored ? first - stored : 0;
        const int64_t tail_last = last - stored < p.num_tail ? last - stored : p.num_tail;
        TailView tail{&p, batch, kv_head, tail_first};
        DenseRows<T> tail_rows{
            static_cast<const T*>(p.tail_keys) + batch * p.tail_key_stride[0] +
                kv_head * p.tail_key_stride[1] + tail_first * p.tail_key_stride[2],
            static_cast<const T*>(p.tail_values) + batch * p.tail_value_stride[0] +
                kv_head * p.tail_value_stride[1] + tail_first * p.tail_value_stride[2],
            p.tail_key_stride[2],
            p.tail_value_stride[2],
            p.key_dim,
            p.value_dim};
        attend_rows(p, row_query, row_queries, tail_rows, tail_last - tail_first, &tail, nullptr,
                    partial);
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
      const float sink = p.sinks ? p.sinks[head] : -__builtin_inff();
      const float scale = sums[0] == -__builtin_inff() ? 0.0f : share_of(sums[0], sums[1], sink);
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

// Tiles of quantised rows for ragged_attention: as ragged_dense.h, with codes unpacked in
// registers. Queries and sums of values have their channels in order, whole groups of them; those
// with 4 bits are in the transformed space, the sums until finish_coded().
#pragma once

#include <type_traits>

#include "code_tiles.h"
#include "coded_rows.h"
#include "ragged_dense.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kKeysAtOnce = 4;  // with four queries: as many sums as there are registers for
#else
constexpr int kKeysAtOnce = 2;
#endif
constexpr int64_t kMaxPairScales = 2 * code_scales(kMaxCodeDim, 4);

// Adds to the dot products of R queries with J keys, as sums[r][j], a group of channels; 8 bits
// without the scale.
template <int R, int J, int kBits, bool kWhole>
inline void dot_group(const float* query, int64_t query_stride, const uint8_t* codes,
                      int64_t stride, const float* scales, int64_t num_scales, int64_t left,
                      Vec (&sums)[R][J]) {
  for (int j = 0; j < J; ++j) {
    Vec key[kGroupVecs];
    numbers_of<kBits, kWhole, kGroupVecs>(codes + j * stride, scales + j * num_scales, left, 0,
                                          key);
    for (int i = 0; i < kGroupVecs; ++i) {
      for (int r = 0; r < R; ++r) {
        sums[r][j] = fma(Vec::load(query + r * query_stride + i * Vec::kLanes), key[i], sums[r][j]);
      }
    }
  }
}

// Dot products of R queries with J keys, as sums[r * 4 + j].
template <int R, int J, int kBits>
inline void dot_codes(const float* query, int64_t query_stride, int64_t dim, const uint8_t* codes,
                      int64_t stride, const float* scales, int64_t num_scales, Vec* sums) {
  Vec sum[R][J];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < J; ++j) sum[r][j] = Vec::set(0.0f);
  }
  int64_t d = 0;
  for (; d + kCodeGroup <= dim; d += kCodeGroup) {
    dot_group<R, J, kBits, true>(query + d, query_stride, codes, stride, scales, num_scales, 0,
                                 sum);
    codes += code_bytes(kCodeGroup, kBits);
    if constexpr (kBits == 4) scales += 2;
  }
  if (d < dim) {
    dot_group<R, J, kBits, false>(query + d, query_stride, codes, stride, scales, num_scales,
                                  dim - d, sum);
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < J; ++j) sums[r * 4 + j] = sum[r][j];
  }
}

// sums[r][:] += weights[r][j] * a group of the channels of the values, kVecs vectors of it at a
// time.
template <int R, int kBits, bool kWhole>
inline void add_group(const float (*weights)[kTileKeys], const uint8_t* codes, int64_t stride,
                      const float* scales, int64_t num_scales, int count, int64_t left,
                      const Ahead<uint8_t>& ahead, float* sums, int64_t sum_stride) {
  constexpr int kVecs = R > 2 && kGroupVecs > 2 ? 2 : kGroupVecs;
  for (int part = 0; part < kGroupVecs; part += kVecs) {
    Vec acc[R][kVecs];
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < kVecs; ++i) {
        acc[r][i] = Vec::load(sums + r * sum_stride + (part + i) * Vec::kLanes);
      }
    }
    for (int j = 0; j < count; ++j) {
      if (part == 0) ahead.ask(j, j + 1);
      Vec value[kVecs];
      numbers_of<kBits, kWhole, kVecs>(codes + j * stride, scales + j * num_scales, left, part,
                                       value);
      for (int r = 0; r < R; ++r) {
        const Vec w = Vec::set(weights[r][j]);
        for (int i = 0; i < kVecs; ++i) acc[r][i] = fma(w, value[i], acc[r][i]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < kVecs; ++i) {
        acc[r][i].store(sums + r * sum_stride + (part + i) * Vec::kLanes);
      }
    }
  }
}

template <int kKeyBits, int kValueBits>
struct CodedTile {
  const uint8_t* keys;
  const uint8_t* values;
  int64_t key_stride, value_stride, key_dim, value_dim;
  const float* scales;  // of the tile's pairs, num_scales each
  int64_t num_scales;
  int count;
  Ahead<uint8_t> value_rows, next_keys;
#ifdef __AMX_INT8__
  CodeQueries* tiles;
#endif

  template <int R>
  void products(const float* query, float (*scores)[kTileKeys]) const {
    const int64_t query_stride = whole_groups(key_dim);
#ifdef __AMX_INT8__
    if (kKeyBits == 8 && key_dim % kTileBytes == 0) {
      tiles->take<R>(query, query_stride, key_dim);
      if (tiles->finite) {
        return tiles->multiply<R>(keys, key_stride, key_dim, scales, num_scales, count, value_rows,
                                  scores);
      }
    }
#endif
    for (int j = 0; j < count; j += 4) {
      const int n = count - j < 4 ? count - j : 4;
      value_rows.ask(j, j + n);
      Vec sums[kQueryRows * 4];
      for (Vec& sum : sums) sum = Vec::set(0.0f);
      const auto dot = [&](auto keys_at_once, int i) {
        dot_codes<R, keys_at_once, kKeyBits>(query, query_stride, key_dim,
                                             keys + (j + i) * key_stride, key_stride,
                                             scales + (j + i) * num_scales, num_scales, sums + i);
      };
      int i = 0;
      for (; i + kKeysAtOnce <= n; i += kKeysAtOnce) {
        dot(std::integral_constant<int, kKeysAtOnce>{}, i);
      }
      for (; i < n; ++i) dot(std::integral_constant<int, 1>{}, i);
      float block[kQueryRows * 4];
      sum16(sums, block);
      for (int r = 0; r < R; ++r) {
        for (i = 0; i < n; ++i) {
          const float scale = kKeyBits == 8 ? scales[(j + i) * num_scales] : 1.0f;
          scores[r][j + i] = block[r * 4 + i] * scale;
        }
      }
    }
  }
  template <int R>
  void add(const float (*weights)[kTileKeys], int begin, int end, float* sums,
           int64_t sum_stride) const {
    const float* scale = scales + begin * num_scales + code_scales(key_dim, kKeyBits);
    alignas(64) float scaled[R][kTileKeys];
    const uint8_t* codes = values + begin * value_stride;
    Ahead<uint8_t> ahead = next_keys;
#ifdef __AMX_INT8__
    CodeWeights<R> whole;
    if (kValueBits == 8 && value_dim % kTileBytes == 0 &&
        whole.take(weights, scale, num_scales, end - begin)) {
      CodeValues rows;
      for (int64_t d = 0; d < value_dim; d += kTileBytes, ahead.count = 0) {
        rows.take(codes + d, value_stride, end - begin, ahead);
        rows.add(whole, sums + d, sum_stride);
      }
      return;
    }
#endif
    if constexpr (kValueBits == 8) {
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < end - begin; ++j) scaled[r][j] = weights[r][j] * scale[j * num_scales];
      }
      weights = scaled;
    }
    int64_t d = 0;
    for (; d + kCodeGroup <= value_dim; d += kCodeGroup) {
      add_group<R, kValueBits, true>(weights, codes, value_stride, scale, num_scales, end - begin,
                                     0, ahead, sums + d, sum_stride);
      ahead.count = 0;
      codes += code_bytes(kCodeGroup, kValueBits);
      if constexpr (kValueBits == 4) scale += 2;
    }
    if (d < value_dim) {
      add_group<R, kValueBits, false>(weights, codes, value_stride, scale, num_scales, end - begin,
                                      value_dim - d, ahead, sums + d, sum_stride);
    }
  }
  void ask_no_more() { value_rows.count = next_keys.count = 0; }
};

template <int kKeyBits, int kValueBits>
struct CodedRows {
  const uint8_t* keys;
  const uint8_t* values;
  const uint16_t* halves;
  int64_t key_stride, value_stride, scale_stride, key_dim, value_dim;
  alignas(64) float scales[kTileKeys * kMaxPairScales];
#ifdef __AMX_INT8__
  AmxProducts<bfloat16_t>::Session session{};
  CodeQueries tiles;
#endif

  CodedRows(const RaggedAttentionParams& p, int64_t first)
      : keys(static_cast<const uint8_t*>(p.keys) + first * p.key_stride),
        values(static_cast<const uint8_t*>(p.values) + first * p.value_stride),
        halves(p.scales + first * p.scale_stride),
        key_stride(p.key_stride),
        value_stride(p.value_stride),
        scale_stride(p.scale_stride),
        key_dim(p.key_dim),
        value_dim(p.value_dim) {}

  int64_t query_stride() const { return whole_groups(key_dim); }
  CodedTile<kKeyBits, kValueBits> tile(int64_t first, int n, int64_t left) {
    const int64_t num_scales = code_scales(key_dim, kKeyBits) + code_scales(value_dim, kValueBits);
    const uint16_t* source = halves + first * scale_stride;
    if (scale_stride == num_scales) {
      halves_to_floats(source, n * num_scales, scales);
    } else {
      for (int j = 0; j < n; ++j) {
        halves_to_floats(source + j * scale_stride, num_scales, scales + j * num_scales);
      }
    }
    const uint8_t* k = keys + first * key_stride;
    const uint8_t* v = values + first * value_stride;
    return {
        .keys = k,
        .values = v,
        .key_stride = key_stride,
        .value_stride = value_stride,
        .key_dim = key_dim,
        .value_dim = value_dim,
        .scales = scales,
        .num_scales = num_scales,
        .count = n,
        .value_rows = {v, value_stride, code_bytes(value_dim, kValueBits), n},
        .next_keys = {k + n * key_stride, key_stride, code_bytes(key_dim, kKeyBits), left},
#ifdef __AMX_INT8__
        .tiles = &tiles,
#endif
    };
  }
};

// A query [D] as coded rows need it [whole groups].
template <typename T>
inline void prepare_coded_query(const RaggedAttentionParams& p, const T* query, float* prepared) {
  for (int64_t d = 0; d < whole_groups(p.key_dim); ++d) {
    prepared[d] = d < p.key_dim ? to_float(query[d]) * p.scaling : 0.0f;
  }
  if (p.key_bits == 4) transform(prepared, p.key_dim);
}

// Sums of coded values become such as the tail's.
template <typename T>
inline void finish_coded(const RaggedAttentionParams& p, const PairOrder<T>& order, float* sums) {
  if (p.value_bits == 4) transform(sums, p.value_dim);
  order.apply(sums, p.value_dim);
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

// Quantised rows on AMX tiles, for ragged_attention: products of queries with the codes of keys,
// and of weights with the codes of values, in whole numbers.
//
// Queries and weights become whole numbers of 32 bits, relative to the largest of a query or of a
// tile's weights, so that one may be 256 times another before that loses what fp32 holds. Four
// planes of 8 bits stand in the 16 rows or columns of a tile, at plane * 4 + query.
#pragma once

#include "../params.h"
#include "amx_products.h"
#include "ragged_dense.h"
#include "vec.h"

#ifdef __AMX_INT8__

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr int kTileBytes = 64;  // of a row of a tile: codes, or sums of 16
constexpr int kTileRows = 16;
constexpr int kNumPlanes = 4;
// What is added to them where a product is rounded finds room.
constexpr float kMostOfQuery = 127.0f * 16777216;  // with a sign: no digit beyond 127
constexpr float kMostOfWeights = 4294967296.0f - 1024;
constexpr float kLeast = 1e-28f;  // less, whose factors would not be finite, is as good as 0

// Every `stride`th of 16 numbers.
inline Vec strided(const float* p, int64_t stride) {
  if (stride == 2) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), even, _mm512_loadu_ps(p + Vec::kLanes))};
  }
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i place = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
  return {_mm512_i32gather_ps(place, p, 4)};
}

// Up to kQueryRows queries as tiles to multiply keys' codes with.
struct CodeQueries {
  // [64 channels][4 channels][plane * 4 + query][channel]
  alignas(64) int8_t tiles[kMaxCodeDim / kTileBytes][kTileRows][kTileBytes];
  float units[kQueryRows];  // what 1 stands for
  const float* source = nullptr;
  bool finite = false;

  // Of R queries, `stride` floats apart; once for each `query`.
  template <int R>
  void take(const float* query, int64_t stride, int64_t dim) {
    if (source == query) return;
    source = query;
    finite = true;
    Vec factors[R];
    for (int r = 0; r < R; ++r) {
      Vec most = Vec::set(0.0f), sum = Vec::set(0.0f);
      for (int64_t d = 0; d < dim; d += Vec::kLanes) {
        const Vec size = {_mm512_abs_ps(Vec::load(query + r * stride + d).v)};
        most = max(most, size);
        sum = sum + size;
      }
      const float largest = most.highest();
      finite &= sum.sum() < __builtin_inff();
      units[r] = largest / kMostOfQuery;
      factors[r] = Vec::set(finite && largest > kLeast ? kMostOfQuery / largest : 0.0f);
    }
    if (!finite) return;
    for (int64_t block = 0; block < dim / kTileBytes; ++block) {
      alignas(64) int8_t digits[kTileRows][kTileBytes] = {};  // [plane * 4 + query][channel]
      for (int r = 0; r < R; ++r) {
        for (int d = 0; d < kTileBytes; d += Vec::kLanes) {
          const Vec scaled = Vec::load(query + r * stride + block * kTileBytes + d) * factors[r];
          __m512i number = _mm512_cvtps_epi32(scaled.v);
          for (int plane = kNumPlanes - 1; plane >= 0; --plane) {  // the last has the lowest bits
            const __m128i digit = _mm512_cvtepi32_epi8(number);
            _mm_store_si128(reinterpret_cast<__m128i*>(digits[plane * 4 + r] + d), digit);
            number = _mm512_srai_epi32(_mm512_sub_epi32(number, _mm512_cvtepi8_epi32(digit)), 8);
          }
        }
      }
      Vec rows[kTileRows];  // of 4 channels each, as bits
      for (int i = 0; i < kTileRows; ++i)
        rows[i] = {_mm512_castsi512_ps(_mm512_load_si512(digits[i]))};
      transpose(rows);
      for (int i = 0; i < kTileRows; ++i) {
        _mm512_store_si512(tiles[block][i], _mm512_castps_si512(rows[i].v));
      }
    }
  }

  // scores[r][j] = queries times `count` keys, codes times scales[j * num_scales].
  template <int R>
  void multiply(const uint8_t* keys, int64_t stride, int64_t dim, const float* scales,
                int64_t num_scales, int count, const Ahead<uint8_t>& ahead,
                float (*scores)[kTileKeys]) const {
    alignas(64) int32_t products[kTileRows][kTileRows];
    alignas(64) uint8_t rest[kTileRows * kTileBytes];
    for (int j = 0; j < count; j += kTileRows) {
      const int n = count - j < kTileRows ? count - j : kTileRows;
      ahead.ask(j, j + n);
      order_tile_loads();
      _tile_zero(0);
      for (int64_t d = 0; d < dim; d += kTileBytes) {
        const uint8_t* block = keys + j * stride + d;
        if (n == kTileRows) {
          _tile_loadd(1, block, stride);
        } else {  // as many rows as there are
          std::memset(rest, 0, sizeof rest);
          for (int i = 0; i < n; ++i) std::memcpy(rest + i * kTileBytes, block + i * stride, 64);
          order_tile_loads();
          _tile_loadd(1, rest, kTileBytes);
        }
        _tile_loadd(2, tiles[d / kTileBytes], kTileBytes);
        _tile_dpbssd(0, 1, 2);
      }
      _tile_stored(0, products, kTileBytes);
      order_tile_loads();
      Vec columns[kTileRows];  // as bits, until they are in columns
      for (int i = 0; i < kTileRows; ++i) columns[i] = {_mm512_load_ps(products[i])};
      transpose(columns);
      const Vec scale = strided(scales + j * num_scales, num_scales);
      for (int r = 0; r < R; ++r) {
        const Vec product = whole(columns[r], columns[4 + r], columns[8 + r], columns[12 + r]);
        (product * (scale * Vec::set(units[r]))).store(scores[r] + j);
      }
    }
  }

  // The sum of four planes' sums.
  static Vec whole(Vec first, Vec second, Vec third, Vec fourth) {
    const auto number = [](Vec x) { return Vec{_mm512_cvtepi32_ps(_mm512_castps_si512(x.v))}; };
    const Vec base = Vec::set(256.0f);
    const Vec high = fma(number(first), base, number(second));
    const Vec low = fma(number(third), base, number(fourth));
    return fma(high, Vec::set(65536.0f), low);
  }
};

// Weights of R queries as rows of a tile.
template <int R>
struct CodeWeights {
  alignas(64) uint8_t tile[kTileRows][kTileBytes];  // [plane * 4 + query][pair]
  float units[R];

  // Takes weights[r][j] * scales[j * num_scales], none below 0, of `count` pairs. Returns whether
  // all are finite.
  bool take(const float (*weights)[kTileKeys], const float* scales, int64_t num_scales, int count) {
    bool finite = true;
    constexpr int kVecs = kTileKeys / Vec::kLanes;
    __mmask16 there[kVecs];
    Vec scale[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      const int left = count - i * Vec::kLanes;
      there[i] = static_cast<__mmask16>(left >= Vec::kLanes ? 0xffff
                                        : left > 0          ? (1 << left) - 1
                                                            : 0);
      scale[i] = strided(scales + i * Vec::kLanes * num_scales, num_scales);
    }
    std::memset(tile, 0, sizeof tile);
    for (int r = 0; r < R; ++r) {
      Vec scaled[kVecs];
      Vec largest = Vec::set(0.0f), sum = Vec::set(0.0f);
      for (int i = 0; i < kVecs; ++i) {
        const __m512 own = _mm512_maskz_loadu_ps(there[i], weights[r] + i * Vec::kLanes);
        scaled[i] = {_mm512_maskz_mul_ps(there[i], own, scale[i].v)};
        largest = max(largest, scaled[i]);
        sum = sum + scaled[i];
      }
      const float most = largest.highest();
      finite &= sum.sum() < __builtin_inff();
      const bool counts = most > kLeast;
      units[r] = most / kMostOfWeights;
      const Vec factor = Vec::set(counts ? kMostOfWeights / most : 0.0f);
      for (int i = 0; i < kVecs; ++i) {
        const __m512i number = _mm512_cvtps_epu32((scaled[i] * factor).v);
        for (int plane = 0; plane < kNumPlanes; ++plane) {
          const __m512i shifted = _mm512_srli_epi32(number, 8 * (kNumPlanes - 1 - plane));
          _mm_store_si128(reinterpret_cast<__m128i*>(tile[plane * 4 + r] + i * Vec::kLanes),
                          _mm512_cvtepi32_epi8(shifted));
        }
      }
    }
    return finite;
  }
};

// Rows [count, dim] of codes as tiles to multiply weights with, 64 channels at a time.
struct CodeValues {
  // [quarter][4 pairs][channel][pair]: quarter q has channels 4q to 4q + 3 of each 16.
  alignas(64) uint8_t tiles[4][kTileRows][kTileBytes];

  void take(const uint8_t* codes, int64_t stride, int count, const Ahead<uint8_t>& ahead) {
    for (int i = 0; i < kTileRows; ++i) {
      ahead.ask(4 * i, 4 * i + 4);
      __m512i rows[4];
      for (int j = 0; j < 4; ++j) {
        rows[j] = 4 * i + j < count ? _mm512_loadu_si512(codes + (4 * i + j) * stride)
                                    : _mm512_setzero_si512();
      }
      const __m512i low[2] = {_mm512_unpacklo_epi8(rows[0], rows[1]),
                              _mm512_unpacklo_epi8(rows[2], rows[3])};
      const __m512i high[2] = {_mm512_unpackhi_epi8(rows[0], rows[1]),
                               _mm512_unpackhi_epi8(rows[2], rows[3])};
      _mm512_store_si512(tiles[0][i], _mm512_unpacklo_epi16(low[0], low[1]));
      _mm512_store_si512(tiles[1][i], _mm512_unpackhi_epi16(low[0], low[1]));
      _mm512_store_si512(tiles[2][i], _mm512_unpacklo_epi16(high[0], high[1]));
      _mm512_store_si512(tiles[3][i], _mm512_unpackhi_epi16(high[0], high[1]));
    }
  }

  // sums[r][:64] += weights times these.
  template <int R>
  void add(const CodeWeights<R>& weights, float* sums, int64_t sum_stride) const {
    alignas(64) int32_t products[4][kTileRows][kTileRows];
    order_tile_loads();
    _tile_loadd(4, weights.tile, kTileBytes);
    // The intrinsics are macros of numbered registers.
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(5, tiles[0], kTileBytes);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(6, tiles[1], kTileBytes);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(5, tiles[2], kTileBytes);
    _tile_dpbusd(2, 4, 5);
    _tile_loadd(6, tiles[3], kTileBytes);
    _tile_dpbusd(3, 4, 6);
    _tile_stored(0, products[0], kTileBytes);
    _tile_stored(1, products[1], kTileBytes);
    _tile_stored(2, products[2], kTileBytes);
    _tile_stored(3, products[3], kTileBytes);
    order_tile_loads();
    for (int r = 0; r < R; ++r) {
      __m512 sum[4];
      for (int quarter = 0; quarter < 4; ++quarter) {
        const auto plane = [&](int i) { return Vec{_mm512_load_ps(products[quarter][i * 4 + r])}; };
        sum[quarter] = CodeQueries::whole(plane(0), plane(1), plane(2), plane(3)).v;
      }
      // Lanes of 128 bits change places with quarters.
      const __m512 a = _mm512_shuffle_f32x4(sum[0], sum[1], 0x44);
      const __m512 b = _mm512_shuffle_f32x4(sum[2], sum[3], 0x44);
      const __m512 c = _mm512_shuffle_f32x4(sum[0], sum[1], 0xee);
      const __m512 d = _mm512_shuffle_f32x4(sum[2], sum[3], 0xee);
      const Vec ordered[4] = {
          {_mm512_shuffle_f32x4(a, b, 0x88)},
          {_mm512_shuffle_f32x4(a, b, 0xdd)},
          {_mm512_shuffle_f32x4(c, d, 0x88)},
          {_mm512_shuffle_f32x4(c, d, 0xdd)},
      };
      float* row = sums + r * sum_stride;
      const Vec unit = Vec::set(weights.units[r]);
      for (int i = 0; i < 4; ++i, row += Vec::kLanes) {
        fma(unit, ordered[i], Vec::load(row)).store(row);
      }
    }
  }
};

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

#endif

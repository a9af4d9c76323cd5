// Keys and values to codes and scales. A row at a time: its numbers as fp32, for 4 bits
// transformed, the scales of its groups, the codes.
#pragma once

#include "../params.h"
#include "coded_rows.h"
#include "parallel.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

// The half at or above x, infinity beyond the last.
inline half_t half_above(float x) {
  half_t near = from_float<half_t>(x);
  if ((near.bits & 0x7c00u) == 0x7c00u || !(to_float(near) < x)) return near;
  if ((near.bits & 0x7fffu) == 0) return {1};
  near.bits = static_cast<uint16_t>(near.bits & 0x8000u ? near.bits - 1 : near.bits + 1);
  return near;
}

inline bool is_finite(half_t x) { return (x.bits & 0x7c00u) != 0x7c00u; }

// Whether all numbers of a row [whole groups] are some.
inline bool all_finite(const float* row, int64_t dim) {
  Vec sum = Vec::set(0.0f);
  for (int64_t d = 0; d < dim; d += Vec::kLanes) sum = fma(Vec::load(row + d), Vec::set(0.0f), sum);
  return sum.sum() == 0.0f;
}

// round((row - lo) / step), between least and most.
inline void store_codes(const float* row, int count, float lo, float step, float least, float most,
                        int32_t* codes) {
  if (!(step > 0.0f)) {
    for (int i = 0; i < count; ++i) codes[i] = 0;
    return;
  }
  for (int i = 0; i < count; i += Vec::kLanes) {
    const Vec quotient = (Vec::load(row + i) - Vec::set(lo)) / Vec::set(step);
    round(max(Vec::set(least), min(Vec::set(most), quotient))).store(codes + i);
  }
}

// row: its numbers, zeros behind them up to whole groups.
inline void encode_8(const float* row, int64_t dim, uint8_t* codes, half_t* scale) {
  Vec highest = Vec::set(0.0f);
  for (int64_t d = 0; d < dim; d += Vec::kLanes) {
    const Vec x = Vec::load(row + d);
    highest = max(highest, max(x, Vec::set(0.0f) - x));
  }
  *scale = half_above(highest.highest() / 127.0f);
  const bool fits = is_finite(*scale) && all_finite(row, whole_groups(dim));
  if (!fits) *scale = {0x7e00};
  for (int64_t d = 0; d < dim; d += kCodeGroup) {
    int32_t integers[kCodeGroup];
    store_codes(row + d, kCodeGroup, 0.0f, fits ? to_float(*scale) : 0.0f, -127.0f, 127.0f,
                integers);
    uint8_t bytes[kCodeGroup];
    for (int i = 0; i < kCodeGroup; ++i) bytes[i] = static_cast<uint8_t>(integers[i]);
    std::memcpy(codes + d, bytes, static_cast<size_t>(dim - d < kCodeGroup ? dim - d : kCodeGroup));
  }
}

inline void encode_4(float* row, int64_t dim, uint8_t* codes, half_t* scales) {
  transform(row, dim);
  const float part = 1.0f / static_cast<float>(dim & -dim);
  for (int64_t d = 0; d < dim; d += Vec::kLanes)
    (Vec::load(row + d) * Vec::set(part)).store(row + d);
  bool fits = all_finite(row, whole_groups(dim));
  const int64_t num_groups = whole_groups(dim) / kCodeGroup;
  for (int64_t g = 0; g < num_groups && fits; ++g) {
    const float* group = row + g * kCodeGroup;
    Vec most = Vec::set(group[0]), least = Vec::set(-group[0]);
    for (int64_t i = 0; i < kCodeGroup && g * kCodeGroup + i < dim; i += Vec::kLanes) {
      const int64_t left = dim - g * kCodeGroup - i;
      Vec x = Vec::load(group + i);
      if (left < Vec::kLanes) {
        float lanes[Vec::kLanes];
        for (int64_t lane = 0; lane < Vec::kLanes; ++lane) {
          lanes[lane] = lane < left ? group[i + lane] : group[0];
        }
        x = Vec::load(lanes);
      }
      most = max(most, x);
      least = max(least, Vec::set(0.0f) - x);
    }
    const float highest = most.highest(), lowest = -least.highest();
    half_t lo = half_above(-lowest);
    lo.bits ^= 0x8000u;
    scales[2 * g] = lo;
    scales[2 * g + 1] = half_above((highest - to_float(lo)) / 15.0f);
    fits = is_finite(lo) && is_finite(scales[2 * g + 1]);
  }
  if (!fits) {
    for (int64_t i = 0; i < 2 * num_groups; ++i) scales[i] = {0x7e00};
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t left = dim - g * kCodeGroup, count = left < kCodeGroup ? left : kCodeGroup;
    int32_t integers[kCodeGroup];
    store_codes(row + g * kCodeGroup, kCodeGroup, to_float(scales[2 * g]),
                fits ? to_float(scales[2 * g + 1]) : 0.0f, 0.0f, 15.0f, integers);
    uint8_t* group_codes = codes + g * (kCodeGroup / 2);
    if (count == kCodeGroup) {
      for (int i = 0; i < kCodeGroup / 2; ++i) {
        group_codes[i] = static_cast<uint8_t>(integers[i] | integers[kCodeGroup / 2 + i] << 4);
      }
    } else {
      for (int64_t i = 0; i < count / 2; ++i) {
        group_codes[i] = static_cast<uint8_t>(integers[i] | integers[count / 2 + i] << 4);
      }
    }
  }
}

template <typename T>
inline void encode_rows(const T* rows, int64_t stride, int64_t dim, int bits, int64_t begin,
                        int64_t end, uint8_t* codes, uint16_t* scales, int64_t scale_stride) {
  alignas(64) float row[kMaxCodeDim];
  const int64_t bytes = code_bytes(dim, bits), padded = whole_groups(dim);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t d = 0; d < padded; d += Vec::kLanes) {
      const int64_t left = dim - d > 0 ? dim - d : 0;
      load_lanes(rows + r * stride + d, left).store(row + d);
    }
    half_t* scale = reinterpret_cast<half_t*>(scales + r * scale_stride);
    if (bits == 8) {
      encode_8(row, dim, codes + r * bytes, scale);
    } else {
      encode_4(row, dim, codes + r * bytes, scale);
    }
  }
}

template <typename T>
inline void quantize_pairs_typed(const QuantizePairsParams& p) {
  const int64_t key_scales = code_scales(p.key_dim, p.key_bits);
  const int64_t num_scales = key_scales + code_scales(p.value_dim, p.value_bits);
  parallel_for(0, p.num_pairs, 64, [&](int64_t begin, int64_t end) {
    encode_rows(static_cast<const T*>(p.keys), p.key_stride, p.key_dim, p.key_bits, begin, end,
                p.key_codes, p.scales, num_scales);
    encode_rows(static_cast<const T*>(p.values), p.value_stride, p.value_dim, p.value_bits, begin,
                end, p.value_codes, p.scales + key_scales, num_scales);
  });
}

inline void quantize_pairs_kernel(const QuantizePairsParams& p) {
  switch (p.dtype) {
    case DType::kFloat:
      return quantize_pairs_typed<float>(p);
    case DType::kHalf:
      return quantize_pairs_typed<half_t>(p);
    case DType::kBFloat16:
      return quantize_pairs_typed<bfloat16_t>(p);
  }
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

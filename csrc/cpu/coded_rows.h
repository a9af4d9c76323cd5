// Quantised rows (params.h has the format): numbers from codes in registers, a group of channels at
// a time, and the transform of what has 4 bits.
#pragma once

#include "../params.h"
#include "ragged_plan.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr int kGroupVecs = kCodeGroup / Vec::kLanes;

// Vector i of a whole group's codes as numbers: int8, or 4 bits without a sign.
template <int kBits>
inline Vec codes_of(const uint8_t* codes, int i) {
#if defined(__AVX512F__) || defined(__AVX2__)
  constexpr int kHalf = kCodeGroup / 2;
  const int channel = i * Vec::kLanes;
  const uint8_t* source = codes + (kBits == 4 ? channel % kHalf : channel);
#if defined(__AVX512F__)
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
#else
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
#endif
  if constexpr (kBits == 4) {
    if (channel >= kHalf) bytes = _mm_srli_epi16(bytes, 4);
    bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
  }
#if defined(__AVX512F__)
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
#else
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
#endif
#else
  return Vec::map([=](int lane) {
    const int channel = i * Vec::kLanes + lane;
    if constexpr (kBits == 8) return static_cast<float>(static_cast<int8_t>(codes[channel]));
    return static_cast<float>(channel < 16 ? codes[channel] & 15 : codes[channel - 16] >> 4);
  });
#endif
}

// kVecs vectors of a group, from the one numbered `first`: 8 bits without their scale, 4 bits with
// their {lo, step}. Of a group that is not whole there are `left` channels, behind which is
// anything, or 0 with 8 bits.
template <int kBits, bool kWhole, int kVecs>
inline void numbers_of(const uint8_t* codes, const float* scales, int64_t left, int first,
                       Vec* numbers) {
  if constexpr (kWhole) {
    for (int i = 0; i < kVecs; ++i) numbers[i] = codes_of<kBits>(codes, first + i);
  } else {
    uint8_t bytes[kCodeGroup] = {};
    if constexpr (kBits == 8) {
      std::memcpy(bytes, codes, static_cast<size_t>(left < kCodeGroup ? left : kCodeGroup));
    } else {
      constexpr int kHalf = kCodeGroup / 2;
      const int half = left < kCodeGroup ? static_cast<int>(left / 2) : kHalf;
      for (int i = 0; i < kHalf; ++i) {  // a constant count, or GCC 12 warns of what is behind
        if (i >= half) break;
        bytes[i] = codes[i] & 15;
        bytes[(half + i) % kCodeGroup] = static_cast<uint8_t>(codes[i] >> 4);
      }
    }
    for (int i = 0; i < kVecs; ++i) numbers[i] = codes_of<8>(bytes, first + i);
  }
  if constexpr (kBits == 4) {
    const Vec lo = Vec::set(scales[0]), step = Vec::set(scales[1]);
    for (int i = 0; i < kVecs; ++i) numbers[i] = fma(numbers[i], step, lo);
  }
}

inline void halves_to_floats(const uint16_t* halves, int64_t count, float* floats) {
  const half_t* source = reinterpret_cast<const half_t*>(halves);
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) Vec::load(source + i).store(floats + i);
  for (; i < count; ++i) floats[i] = to_float(source[i]);
}

// Sums and differences over each block of the largest power of two that divides dim: first of the
// block's halves, then of their halves, and so on.
inline void transform(float* row, int64_t dim) {
  constexpr int64_t kPair = 2 * Vec::kLanes;
  const int64_t block = dim & -dim;
  int64_t width = block / 2;
  for (; width >= kPair; width /= 2) {
    for (int64_t base = 0; base < dim; base += 2 * width) {
      for (int64_t i = base; i < base + width; i += Vec::kLanes) {
        const Vec a = Vec::load(row + i), b = Vec::load(row + i + width);
        (a + b).store(row + i);
        (a - b).store(row + i + width);
      }
    }
  }
  if (block >= kPair) {
    // Within pairs of vectors: each step puts the halves' sums and differences in turn, after which
    // the next halves stand where those stood; after the last, all are where they belong.
    for (int64_t base = 0; base < dim; base += kPair) {
      Vec a = Vec::load(row + base), b = Vec::load(row + base + Vec::kLanes);
      for (int64_t step = kPair; step > 1; step /= 2) {
        const Vec sum = a + b, difference = a - b;
        interleave(sum, difference, a, b);
      }
      a.store(row + base);
      b.store(row + base + Vec::kLanes);
    }
    return;
  }
  for (; width > 0; width /= 2) {
    for (int64_t base = 0; base < dim; base += 2 * width) {
      for (int64_t i = base; i < base + width; ++i) {
        const float a = row[i], b = row[i + width];
        row[i] = a + b;
        row[i + width] = a - b;
      }
    }
  }
}

// The channel, of a pair of vectors of them, that load_pair<T> gives at each place.
template <typename T>
struct PairOrder {
  int channel[2 * Vec::kLanes];

  PairOrder() {
    float place[2 * Vec::kLanes];
    for (int i = 0; i < 2 * Vec::kLanes; ++i) place[i] = static_cast<float>(i);
    const VecPair pair = in_order<T>({Vec::load(place), Vec::load(place + Vec::kLanes)});
    pair.a.store(place);
    pair.b.store(place + Vec::kLanes);
    for (int i = 0; i < 2 * Vec::kLanes; ++i) channel[static_cast<int>(place[i])] = i;
  }

  // Puts channels that stand in order into this one, as far as there are whole pairs of vectors.
  void apply(float* row, int64_t dim) const {
    float numbers[2 * Vec::kLanes];
    for (int64_t d = 0; d + 2 * Vec::kLanes <= dim; d += 2 * Vec::kLanes) {
      for (int i = 0; i < 2 * Vec::kLanes; ++i) numbers[i] = row[d + channel[i]];
      std::memcpy(row + d, numbers, sizeof numbers);
    }
  }
};

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

// Vectors of fp32 lanes for the instruction set that this file is compiled for, with loads from
// fp32, fp16 and bf16. Included once per instruction set; everything has internal linkage.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moekv::cpu::MOEKV_ISA {
namespace {

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(bfloat16_t value) { return bits_to_float(uint32_t{value.bits} << 16); }
inline float to_float(half_t value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Rounds to nearest, ties to even.
template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bfloat16_t from_float<bfloat16_t>(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline half_t from_float<half_t>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to inf
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 makes fp32 round at the last bit of the half.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

constexpr int32_t kSqrtHalf = 0x3f3504f3;  // the bits of sqrt(1/2)

#if defined(__AVX512F__)

using Mask = __mmask16;
inline uint64_t bits(Mask mask) { return mask; }  // of the lanes, the first lowest

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bfloat16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const half_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bfloat16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  __m256i narrow() const {  // to the nearest bf16
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    return _mm512_cvtepi32_epi16(rounded);
  }
  void store(int32_t* p) const { _mm512_storeu_si512(p, _mm512_cvtps_epi32(v)); }  // of integers

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // NaN in either operand gives b, like the x86 instructions.
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  // A comparison with NaN is true for !=, else false.
  friend Mask operator>(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  friend Mask operator!=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ); }
  friend Vec select(Mask mask, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(mask, no.v, yes.v)};
  }
  // a and b with their lanes in turn: a0 b0 a1 b1 ...
  friend void interleave(Vec a, Vec b, Vec& low, Vec& high) {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    low.v = _mm512_permutex2var_ps(a.v, first, b.v);
    high.v = _mm512_permutex2var_ps(a.v, second, b.v);
  }
  // p * 2^n for integral n in [-252, 127], with gradual underflow
  friend Vec scale2(Vec p, Vec n) { return {_mm512_scalef_ps(p.v, n.v)}; }
  friend Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, 0)}; }
  // 2^n for integral n in [-126, 127]
  friend Vec pow2(Vec n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
  }
  friend Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
  // The integer e that puts a * 2^-e into [sqrt(1/2), sqrt(2)), for positive normal a.
  friend Vec exponent(Vec a) {
    const __m512i above = _mm512_sub_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(kSqrtHalf));
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(above, 23))};
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float highest() const { return _mm512_reduce_max_ps(v); }  // of lanes without NaN
};

#elif defined(__AVX2__)

struct Mask {
  __m256 v;
};
inline uint64_t bits(Mask mask) { return static_cast<uint64_t>(_mm256_movemask_ps(mask.v)); }

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bfloat16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const half_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bfloat16_t* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
  void store(int32_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(v));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
  friend Mask operator!=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
  friend Vec select(Mask mask, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, mask.v)}; }
  friend void interleave(Vec a, Vec b, Vec& low, Vec& high) {
    const __m256 even = _mm256_unpacklo_ps(a.v, b.v), odd = _mm256_unpackhi_ps(a.v, b.v);
    low.v = _mm256_permute2f128_ps(even, odd, 0x20);
    high.v = _mm256_permute2f128_ps(even, odd, 0x31);
  }
  friend Vec scale2(Vec p, Vec n) {
    const Vec normal = max(n, Vec::set(-126.0f));
    return p * pow2(normal) * pow2(n - normal);
  }
  friend Vec round(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  friend Vec pow2(Vec n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
  }
  friend Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  friend Vec exponent(Vec a) {
    const __m256i above = _mm256_sub_epi32(_mm256_castps_si256(a.v), _mm256_set1_epi32(kSqrtHalf));
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(above, 23))};
  }
  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    half = _mm_add_ss(half, _mm_movehdup_ps(half));
    return _mm_cvtss_f32(half);
  }
  float highest() const {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    half = _mm_max_ss(half, _mm_movehdup_ps(half));
    return _mm_cvtss_f32(half);
  }
};

#else

// Four lanes in plain C++, which every compiler maps to its baseline vectors (SSE2, NEON).
struct Mask {
  bool v[4];
};
inline uint64_t bits(Mask mask) {
  return uint64_t{mask.v[0]} | uint64_t{mask.v[1]} << 1 | uint64_t{mask.v[2]} << 2 |
         uint64_t{mask.v[3]} << 3;
}

struct Vec {
  static constexpr int kLanes = 4;
  float v[4];

  template <typename Function>
  static Vec map(Function function) {
    Vec result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = function(i);
    return result;
  }
  static Vec set(float x) {
    return map([=](int) { return x; });
  }
  template <typename T>
  static Vec load(const T* p) {
    return map([=](int i) { return to_float(p[i]); });
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  void store(bfloat16_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<bfloat16_t>(v[i]);
  }
  void store(int32_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int32_t>(v[i]);
  }

  friend Vec operator+(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend Vec operator-(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend Vec operator*(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend Vec operator/(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  friend Vec fma(Vec a, Vec b, Vec c) {
    return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  friend Vec max(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend Vec min(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend Mask operator>(Vec a, Vec b) {
    return {{a.v[0] > b.v[0], a.v[1] > b.v[1], a.v[2] > b.v[2], a.v[3] > b.v[3]}};
  }
  friend Mask operator!=(Vec a, Vec b) {
    return {{a.v[0] != b.v[0], a.v[1] != b.v[1], a.v[2] != b.v[2], a.v[3] != b.v[3]}};
  }
  friend Vec select(Mask mask, Vec yes, Vec no) {
    return map([&](int i) { return mask.v[i] ? yes.v[i] : no.v[i]; });
  }
  friend void interleave(Vec a, Vec b, Vec& low, Vec& high) {
    low = {{a.v[0], b.v[0], a.v[1], b.v[1]}};
    high = {{a.v[2], b.v[2], a.v[3], b.v[3]}};
  }
  friend Vec scale2(Vec p, Vec n) {
    const Vec normal = max(n, Vec::set(-126.0f));
    return p * pow2(normal) * pow2(n - normal);
  }
  friend Vec round(Vec a) {
    // Adding 1.5 * 2^23 leaves no bits for a fraction; good for |a| < 2^22, and needs no libm call.
    return map([&](int i) { return (a.v[i] + 12582912.0f) - 12582912.0f; });
  }
  friend Vec pow2(Vec n) {
    return map([&](int i) {
      return bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23);
    });
  }
  friend Vec sqrt(Vec a) {
    return map([&](int i) { return __builtin_sqrtf(a.v[i]); });
  }
  friend Vec exponent(Vec a) {
    return map([&](int i) {
      return static_cast<float>(static_cast<int32_t>(float_to_bits(a.v[i]) - kSqrtHalf) >> 23);
    });
  }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  float highest() const {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
};

#endif

// The first `count` lanes from p, zeros behind them; the ends of rows that are no multiple of
// kLanes.
template <typename T>
inline Vec load_partial(const T* p, int64_t count) {
  T lanes[Vec::kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return Vec::load(lanes);
}

template <typename T>
inline Vec load_lanes(const T* p, int64_t count) {
  return count >= Vec::kLanes ? Vec::load(p) : load_partial(p, count);
}

// Two vectors of the first `count` of 2 * kLanes numbers from p, zeros behind them, in an order
// that is the same for every p: cheaper than two loads where the numbers have to be widened.
struct VecPair {
  Vec a, b;
};
template <typename T>
inline VecPair load_pair(const T* p) {
  return {Vec::load(p), Vec::load(p + Vec::kLanes)};
}
#if defined(__AVX512F__)
inline VecPair load_pair(const bfloat16_t* p) {  // even numbers, odd numbers
  const __m512i bits = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)))}};
}
#elif defined(__AVX2__)
inline VecPair load_pair(const bfloat16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)))}};
}
#endif
// load_pair for minima and maxima, cheaper for bf16: other bits may stand behind those of a number,
// which order numbers that are equal, and exactly() takes away.
template <typename T>
inline VecPair load_pair_loosely(const T* p) {
  return load_pair(p);
}
template <typename T>
inline VecPair exactly(VecPair pair) {
  return pair;
}
#if defined(__AVX512F__)
inline VecPair load_pair_loosely(const bfloat16_t* p) {
  const __m512i bits = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))}, {_mm512_castsi512_ps(bits)}};
}
template <>
inline VecPair exactly<bfloat16_t>(VecPair pair) {
  const __m512i bits = _mm512_castps_si512(pair.b.v);
  pair.b.v = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)));
  return pair;
}
#elif defined(__AVX2__)
inline VecPair load_pair_loosely(const bfloat16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))}, {_mm256_castsi256_ps(bits)}};
}
template <>
inline VecPair exactly<bfloat16_t>(VecPair pair) {
  const __m256i bits = _mm256_castps_si256(pair.b.v);
  pair.b.v = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)));
  return pair;
}
#endif

// The lanes of a pair of Ts, as load_pair gives them, in the order of the numbers in memory.
template <typename T>
inline VecPair in_order(VecPair pair) {
  return pair;
}
#if defined(__AVX512F__) || defined(__AVX2__)
template <>
inline VecPair in_order<bfloat16_t>(VecPair pair) {
  VecPair ordered;
  interleave(pair.a, pair.b, ordered.a, ordered.b);
  return ordered;
}
#endif
template <typename T>
inline VecPair load_pair(const T* p, int64_t count) {
  if (count >= 2 * Vec::kLanes) return load_pair(p);
  T numbers[2 * Vec::kLanes] = {};
  std::memcpy(numbers, p, count * sizeof(T));
  return load_pair(numbers);
}

// The first `count` lanes to p, at most kLanes, to the nearest.
template <typename T>
inline void store_lanes(Vec a, T* p, int64_t count) {
  if constexpr (!std::is_same_v<T, half_t>) {
    if (count >= Vec::kLanes) return a.store(p);
  }
  float lanes[Vec::kLanes];
  a.store(lanes);
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(p, lanes, count * sizeof(float));
  } else {
    for (int64_t i = 0; i < count && i < Vec::kLanes; ++i) p[i] = from_float<T>(lanes[i]);
  }
}

// Two vectors, one behind the other; in one store, if they fit: what loads both waits for none.
template <typename T>
inline void store_two(Vec a, Vec b, T* p) {
  store_lanes(a, p, Vec::kLanes);
  store_lanes(b, p + Vec::kLanes, Vec::kLanes);
}
#if defined(__AVX512BF16__)
inline void store_two(Vec a, Vec b, bfloat16_t* p) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(b.v, a.v);
  std::memcpy(p, &rounded, sizeof rounded);
}
#elif defined(__AVX512F__)
inline void store_two(Vec a, Vec b, bfloat16_t* p) {
  _mm512_storeu_si512(p, _mm512_inserti64x4(_mm512_castsi256_si512(a.narrow()), b.narrow(), 1));
}
#endif

// The numbers of N vectors, as a matrix [kLanes, N] in memory has them, become its columns:
// interleaving the two halves of the vectors, once per bit of the row number.
template <int N>
inline void transpose(Vec (&rows)[N]) {
  static_assert(N % 2 == 0);
  for (int step = 1; step < Vec::kLanes; step *= 2) {
    Vec next[N];
    for (int i = 0; i < N / 2; ++i)
      interleave(rows[i], rows[i + N / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < N; ++i) rows[i] = next[i];
  }
}

// The 16 sums, or largest lanes (of those without NaN), of 16 vectors.
#if defined(__AVX512F__)
template <typename Combine>
inline void reduce16(const Vec* vectors, float* results, const Combine& combine) {
  // Pairs of vectors are interleaved and combined until each lane holds the result of one vector.
  Vec quad[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 a = vectors[4 * i].v, b = vectors[4 * i + 1].v;
    const __m512 c = vectors[4 * i + 2].v, d = vectors[4 * i + 3].v;
    const Vec ab = combine({_mm512_unpacklo_ps(a, b)}, {_mm512_unpackhi_ps(a, b)});
    const Vec cd = combine({_mm512_unpacklo_ps(c, d)}, {_mm512_unpackhi_ps(c, d)});
    const __m512d x = _mm512_castps_pd(ab.v), y = _mm512_castps_pd(cd.v);
    // Per 128-bit lane: parts of the results of a, b, c, d.
    quad[i] = combine({_mm512_castpd_ps(_mm512_unpacklo_pd(x, y))},
                      {_mm512_castpd_ps(_mm512_unpackhi_pd(x, y))});
  }
  const auto halves = [&](Vec a, Vec b) {
    return combine({_mm512_shuffle_f32x4(a.v, b.v, 0x88)}, {_mm512_shuffle_f32x4(a.v, b.v, 0xdd)});
  };
  halves(halves(quad[0], quad[1]), halves(quad[2], quad[3])).store(results);
}
inline void sum16(const Vec* vectors, float* sums) {
  reduce16(vectors, sums, [](Vec a, Vec b) { return a + b; });
}
inline void highest16(const Vec* vectors, float* highest) {
  reduce16(vectors, highest, [](Vec a, Vec b) { return max(a, b); });
}
#else
inline void sum16(const Vec* vectors, float* sums) {
  for (int i = 0; i < 16; ++i) sums[i] = vectors[i].sum();
}
inline void highest16(const Vec* vectors, float* highest) {
  for (int i = 0; i < 16; ++i) highest[i] = vectors[i].highest();
}
#endif

// e^x within a few ulp of fp32 for x in [-87, 88], clamped outside (e^-87 is about 1e-38). NaN
// stays NaN. Cody-Waite reduction to [-ln2/2, ln2/2] and a degree-6 polynomial (Cephes expf).
inline Vec exp(Vec x) {
  // min(constant, x) and max(constant, x) return x where x is NaN.
  const Vec clamped = min(Vec::set(88.0f), max(Vec::set(-87.3f), x));
  const Vec n = round(clamped * Vec::set(1.44269504088896341f));
  Vec r = fma(n, Vec::set(-0.693359375f), clamped);
  r = fma(n, Vec::set(2.12194440e-4f), r);
  Vec p = Vec::set(1.9875691500e-4f);
  p = fma(p, r, Vec::set(1.3981999507e-3f));
  p = fma(p, r, Vec::set(8.3334519073e-3f));
  p = fma(p, r, Vec::set(4.1665795894e-2f));
  p = fma(p, r, Vec::set(1.6666665459e-1f));
  p = fma(p, r, Vec::set(5.0000001201e-1f));
  p = fma(p, r * r, r + Vec::set(1.0f));
  return p * pow2(n);
}

// 2^f for f in [0, 1], with a relative error below 2e-7: a minimax polynomial.
inline Vec exp2_polynomial(Vec f) {
  Vec p = Vec::set(1.8775767657e-3f);
  p = fma(p, f, Vec::set(8.9893398766e-3f));
  p = fma(p, f, Vec::set(5.5826318232e-2f));
  p = fma(p, f, Vec::set(2.4015361698e-1f));
  p = fma(p, f, Vec::set(6.9315307321e-1f));
  return fma(p, f, Vec::set(9.9999992506e-1f));
}

// 2^x with a relative error below 2e-7; 0 or 2^-126 far below -126, inf or 2^127 far above 127. NaN
// stays NaN. A polynomial of the fraction times 2^floor(x).
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec f = {_mm512_reduce_ps(x.v, 0x09)};  // x - floor(x)
#else
  x = min(Vec::set(127.0f), max(Vec::set(-125.5f), x));
  const Vec n = round(x - Vec::set(0.5f));  // floor(x); x - 1 for some integers, where f is 1
  const Vec f = x - n;
#endif
  const Vec p = exp2_polynomial(f);
#if defined(__AVX512F__)
  return {_mm512_scalef_ps(p.v, x.v)};  // multiplies by 2^floor(x)
#else
  return p * pow2(n);
#endif
}

// Natural logarithm within a few ulp for x in [2^-126, 2^126]. NaN stays NaN. With x = 2^e m, m
// around 1: log m = 2 artanh((m - 1) / (m + 1)), whose odd series converges fast.
inline Vec log(Vec x) {
  const Vec e = exponent(x);
  const Vec m = x * pow2(Vec::set(0.0f) - e);
  const Vec s = (m - Vec::set(1.0f)) / (m + Vec::set(1.0f));
  const Vec s2 = s * s;
  Vec p = Vec::set(2.0f / 9.0f);
  p = fma(p, s2, Vec::set(2.0f / 7.0f));
  p = fma(p, s2, Vec::set(2.0f / 5.0f));
  p = fma(p, s2, Vec::set(2.0f / 3.0f));
  p = fma(p * s2, s, s + s);
  return fma(e, Vec::set(0.69314718056f), p);
}

// Copies kStreamedBytes past the caches, both ends aligned to as many; 0: there is no such copy.
#if defined(__AVX512F__)
constexpr int64_t kStreamedBytes = 64;
inline void stream(void* to, const void* from) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
}
inline void finish_streams() { _mm_sfence(); }  // before others may rely on what was stored
#elif defined(__AVX2__)
constexpr int64_t kStreamedBytes = 32;
inline void stream(void* to, const void* from) {
  _mm256_stream_si256(static_cast<__m256i*>(to),
                      _mm256_load_si256(static_cast<const __m256i*>(from)));
}
inline void finish_streams() { _mm_sfence(); }
#else
constexpr int64_t kStreamedBytes = 0;
inline void stream(void*, const void*) {}
inline void finish_streams() {}
#endif

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

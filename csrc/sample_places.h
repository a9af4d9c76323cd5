// Which keys of a row stand for all of them in the softmax's sum of expected_attention.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOEKV_ANYWHERE __host__ __device__
#else
#define MOEKV_ANYWHERE
#endif

namespace moekv {
namespace {

constexpr int kReach = 4;     // keys behind its own that a query is asked about
constexpr int kSinks = 4;     // first keys, which take much of every attention
constexpr int kSamples = 60;  // keys that stand for the others
constexpr int kPlaces = kSinks + kSamples;

// Where key i of kPlaces stands in a row of `length` >= 1 keys: short rows are taken whole, longer
// ones have one place in each of kSamples equal parts, which repeats nowhere (the fractions of
// multiples of the golden ratio), so that no rhythm of the text is in step with it.
MOEKV_ANYWHERE constexpr int64_t sample_place(int i, int64_t length) {
  if (length <= kPlaces) return i < length ? i : length - 1;
  if (i < kSinks) return i;
  constexpr int64_t kOne = 65536, kGolden = 40503;
  const int64_t part = i - kSinks;
  return kSinks + (part * kOne + part * kGolden % kOne) * (length - kSinks) / (kSamples * kOne);
}

// How many keys it stands for.
MOEKV_ANYWHERE constexpr float sample_weight(int i, int64_t length) {
  if (length <= kPlaces) return i < length ? 1.0f : 0.0f;
  return i < kSinks ? 1.0f : static_cast<float>(length - kSinks) / static_cast<float>(kSamples);
}

}  // namespace
}  // namespace moekv

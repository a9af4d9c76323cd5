// Rows of queries, keys and values, read 16 bytes at a time where they lie so.
#pragma once

#include "../params.h"
#include "device.h"

namespace moekv::cuda {

constexpr int kChunkBytes = 64;  // of a row: 16 bytes for each lane of four

inline bool is_vectorized(const void* data, const int64_t (&stride)[3], int64_t dim, DType dtype) {
  const int64_t element = dtype == DType::kFloat ? 4 : 2;
  const auto bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) |
                    (stride[0] | stride[1] | stride[2] | dim) * element;
  return bits % 16 == 0;
}

// 16 bytes of a row from `channel` on, zeros beyond its end.
template <typename T>
__device__ __forceinline__ uint4 load_16_bytes(const T* row, int channel, int dim,
                                               bool vectorized) {
  if (!row || channel >= dim) return make_uint4(0, 0, 0, 0);
  if (vectorized) return *reinterpret_cast<const uint4*>(row + channel);
  uint4 bits = make_uint4(0, 0, 0, 0);
  T elements[kPackSize<T>];
  memcpy(elements, &bits, sizeof bits);
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) {
    if (channel + i < dim) elements[i] = row[channel + i];
  }
  memcpy(&bits, elements, sizeof bits);
  return bits;
}

// The same of bytes, four at a time: sixteen at once would take as many registers.
__device__ __forceinline__ uint4 load_16_bytes(const uint8_t* row, int begin, int end,
                                               bool vectorized) {
  uint4 bits = make_uint4(0, 0, 0, 0);
  if (!row || begin >= end) return bits;
  if (vectorized) return *reinterpret_cast<const uint4*>(row + begin);
#pragma unroll 1
  for (int first = begin; first < begin + 16; first += 4) {
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < end) word |= static_cast<unsigned>(row[first + i]) << 8 * i;
    }
    bits = make_uint4(bits.y, bits.z, bits.w, word);
  }
  return bits;
}

// kSize channels of a row, as they lie in memory. They are loaded first and cut off when they are
// used, by selection: where a load depends on a condition, the compiler waits for the load before
// it.
template <typename T, int kSize = kPackSize<T>>
struct RawChannels {
  static constexpr int kWords = kSize / kPackSize<T>;
  static_assert(kWords * kPackSize<T> == kSize);
  uint4 words[kWords];

  // From channel `first` on, of `dim` > 0; those that are not there read others instead. Called
  // with a constant for `vectorized`, or there is a branch between this load and the next.
  __device__ __forceinline__ void load(const T* row, int first, int dim, bool vectorized) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int channel = first + i * kPackSize<T>;
      words[i] = vectorized ? load_bits(row + min(channel, dim - kPackSize<T>))
                            : load_16_bytes(row, channel, dim, false);
    }
  }
  // The i-th 16 bytes; zeros beyond `dim`.
  __device__ __forceinline__ uint4 word(int i, int first, int dim) const {
    return first + i * kPackSize<T> < dim ? words[i] : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void unpack(int first, int dim, float (&x)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float pack[kPackSize<T>];
      cuda::unpack<T>(word(i, first, dim), pack);
#pragma unroll
      for (int j = 0; j < kPackSize<T>; ++j) x[i * kPackSize<T> + j] = pack[j];
    }
  }
};

// 16 bytes of each of several rows, zeros beyond their end.
template <int kCount, typename T>
__device__ __forceinline__ void load_16_bytes(const T* const (&rows)[kCount], int channel, int dim,
                                              bool vectorized, uint4 (&bits)[kCount]) {
  RawChannels<T> raw[kCount];
  const auto load = [&](bool aligned) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) raw[i].load(rows[i], channel, dim, aligned);
  };
  if (vectorized) {
    load(true);
  } else {
    load(false);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits[i] = raw[i].word(0, channel, dim);
}

template <int kSize>
__device__ __forceinline__ float dot(const float (&a)[kSize], const float (&b)[kSize],
                                     float sum = 0.0f) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

// Bytes between the rows of a tile in shared memory: the eight lanes that are served at once touch
// two rows of four lanes (16-bit types) or eight rows (fp32), in different banks.
template <typename T>
__host__ __device__ constexpr int tile_stride(int dim) {
  const int bytes = dim * static_cast<int>(sizeof(T));
  return sizeof(T) == 2 ? (ceil_div(bytes, kChunkBytes) | 1) * kChunkBytes
                        : ceil_div(bytes, 16) * 16 + 16;
}

}  // namespace moekv::cuda

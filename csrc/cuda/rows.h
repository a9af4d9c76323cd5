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

// The same of several rows, none of them null. Nothing branches between the loads, or the compiler
// would wait for each before it starts the next: channels beyond the end read others instead.
template <int kCount, typename T>
__device__ __forceinline__ void load_16_bytes(const T* const (&rows)[kCount], int channel, int dim,
                                              bool vectorized, uint4 (&bits)[kCount]) {
  if (vectorized) {
    const int last = dim - kPackSize<T>;
#pragma unroll
    for (int i = 0; i < kCount; ++i) bits[i] = load_bits(rows[i] + min(channel, last));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (channel > last) bits[i] = make_uint4(0, 0, 0, 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) bits[i] = load_16_bytes(rows[i], channel, dim, false);
  }
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

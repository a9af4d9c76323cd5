// Tiles of 16-bit rows for m16n8k16: rows that a warp holds in registers, and rows that stream past
// them through shared memory.
//
// Fragments are loaded 16 bytes at a time: lane t of four takes channels 8t ... 8t + 7 of a chunk
// of 32, where m16n8k16 wants 2t, 2t + 1, 2t + 8, 2t + 9, 2t + 16 ... A dot product does not mind
// the order of its terms as long as both sides agree.
#pragma once

#include "device.h"
#include "logit.h"
#include "rows.h"

namespace moekv::cuda {

// Starts to copy rows [first, first + num_rows) to shared memory, zeros for those that are null:
// kLanes lanes for each, which look up its address once, and copy 16 bytes each at a time. Rows of
// 16-bit types are filled up with zeros to as much.
template <int kThreads, typename T, int kLanes = 4, typename Rows>
__device__ __forceinline__ void copy_tile(char* tile, int stride, const Rows& rows, int first,
                                          int num_rows, int dim) {
  const int bytes = dim * static_cast<int>(sizeof(T));
  const int pieces = sizeof(T) == 2 ? ceil_div(bytes, 16 * kLanes) * kLanes : ceil_div(bytes, 16);
  for (int row = static_cast<int>(threadIdx.x) / kLanes; row < num_rows; row += kThreads / kLanes) {
    const T* source = rows(first + row);
    for (int piece = static_cast<int>(threadIdx.x) % kLanes; piece < pieces; piece += kLanes) {
      char* target = tile + row * stride + piece * 16;
      const int channel = piece * kPackSize<T>;
      if (rows.vectorized && source && channel < dim) {
        copy_async_16(target, source + channel);
      } else {
        *reinterpret_cast<uint4*>(target) = load_16_bytes(source, channel, dim, rows.vectorized);
      }
    }
  }
}

// Rows first + 16i + g and first + 16i + g + 8, zeros for those that are null, for lane l = 4g + t.
template <typename Rows, int kRowTiles, int kChunks>
__device__ __forceinline__ void load_fragments(const Rows& rows, int first, int dim,
                                               uint4 (&fragments)[kRowTiles][2][kChunks]) {
  const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto* row = rows(first + 16 * i + 8 * half + g);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        fragments[i][half][chunk] = load_16_bytes(row, chunk * 32 + t * 8, dim, rows.vectorized);
      }
    }
  }
}

// Adds the products with rows of a tile whose rows are tile_stride apart. Lane l = 4g + t has, like
// in the accumulators of m16n8k16, rows 16i + g and 16i + g + 8 and columns 8j + 2t, 8j + 2t + 1.
template <typename T, int kRowTiles, int kChunks, int kColumnTiles>
__device__ __forceinline__ void multiply_tile(const uint4 (&fragments)[kRowTiles][2][kChunks],
                                              const char* tile, int dim,
                                              float (&product)[kRowTiles][kColumnTiles][4]) {
  const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int stride = tile_stride<T>(dim);
  const int chunks = ceil_div(dim, 32);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk >= chunks) break;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const uint4 b = *reinterpret_cast<const uint4*>(tile + (8 * j + g) * stride +
                                                      chunk * kChunkBytes + t * 16);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const uint4 low = fragments[i][0][chunk], high = fragments[i][1][chunk];
        mma_m16n8k16<T>(product[i][j], {low.x, high.x, low.y, high.y}, {b.x, b.y});
        mma_m16n8k16<T>(product[i][j], {low.z, high.z, low.w, high.w}, {b.z, b.w});
      }
    }
  }
}

template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void cap_products(float (&product)[kRowTiles][kColumnTiles][4],
                                             const Logit& logit) {
  if (!logit.has_cap()) return;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4 * kColumnTiles; ++j) {
      product[i][j / 4][j % 4] = logit.capped(product[i][j / 4][j % 4]);
    }
  }
}

}  // namespace moekv::cuda

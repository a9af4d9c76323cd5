// Kept pairs move to the front, in place. Indices ascend, so destination <= source: a sweep from
// the front reads every pair before it writes there.
#pragma once

#include "../params.h"
#include "parallel.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

struct CacheSide {
  char* data;
  const int64_t* stride;  // batch, head, position, in bytes
  int64_t bytes;          // of a position
};

// The bytes [low, high) of every position that a sweep moves.
struct Slice {
  int64_t low, high;
};

struct KeptRow {
  const int32_t* indices;
  int64_t count;
};

inline KeptRow kept_row(const KvCompactParams& p, int64_t row) {
  if (!p.offsets) return {p.indices + row * p.num_kept, p.num_kept};
  return {p.indices + p.offsets[row], p.offsets[row + 1] - p.offsets[row]};
}

// Caches beyond this, keys and values together, leave the processor's caches before anybody reads
// them again: what is stored need not be loaded first, as it is on the way through the caches.
constexpr int64_t kStreamBytes = int64_t{64} << 20;
constexpr int64_t kAhead = 4096;  // bytes of kept pairs that are asked for in advance

template <bool kStream>
inline void copy_pair(char* to, const char* from, int64_t bytes) {
  int64_t i = 0;
  if constexpr (kStream && kStreamedBytes > 0) {
    for (; i < bytes; i += kStreamedBytes) stream(to + i, from + i);
  }
  for (; i + 256 <= bytes; i += 256) std::memcpy(to + i, from + i, 256);
  for (; i + 64 <= bytes; i += 64) std::memcpy(to + i, from + i, 64);
  if (i < bytes) std::memcpy(to + i, from + i, bytes - i);
}

// Moves a row's kept pairs behind one another to `target`. Which of them comes next is for the
// indices to say, not for the processor to guess: they are prefetched. A pair that moves at all
// moves by its own size at least, so that it never overlaps itself.
template <bool kStream>
inline void compact_row(const CacheSide& side, Slice slice, const char* row, KeptRow kept,
                        char* target) {
  const int64_t stride = side.stride[2], bytes = slice.high - slice.low;
  const int64_t ahead = bytes > kAhead ? 1 : kAhead / bytes;
  for (int64_t i = 0; i < kept.count; ++i) {
    const char* next = row + kept.indices[i + ahead < kept.count ? i + ahead : i] * stride;
    for (int64_t b = slice.low; b < slice.high; b += 64) __builtin_prefetch(next + b);
    const char* source = row + kept.indices[i] * stride + slice.low;
    char* destination = target + i * stride + slice.low;
    if (source != destination) copy_pair<kStream>(destination, source, bytes);
  }
}

// Whether all slices of a side can be stored past the caches, `kStreamedBytes` at a time.
inline bool streams(const KvCompactParams& p, const CacheSide& side) {
  const auto base = static_cast<int64_t>(reinterpret_cast<uintptr_t>(side.data));
  const int64_t bits = base | side.bytes | side.stride[0] | side.stride[1] | side.stride[2];
  const int64_t pairs = p.batch * p.num_kv_heads * p.num_keys;
  return kStreamedBytes > 0 && bits % 64 == 0 &&
         pairs * (p.key_bytes + p.value_bytes) > kStreamBytes;
}

inline void kv_compact_kernel(const KvCompactParams& p) {
  const CacheSide sides[2] = {{static_cast<char*>(p.keys), p.key_stride, p.key_bytes},
                              {static_cast<char*>(p.values), p.value_stride, p.value_bytes}};
  const int64_t rows = p.batch * p.num_kv_heads;
  // Packed rows land where earlier rows were, so they go one after another. But a slice of the head
  // dimension only ever lands on the same slice of other pairs: slices are independent sweeps, as
  // are keys and values, and rows that stay apart.
  const int64_t row_items = p.packed ? 1 : rows;
  const int64_t most_bytes = p.key_bytes > p.value_bytes ? p.key_bytes : p.value_bytes;
  int64_t slices = (num_threads() + 2 * row_items - 1) / (2 * row_items);
  if (slices > most_bytes / 64) slices = most_bytes / 64;
  if (slices < 1) slices = 1;

  parallel_for(0, 2 * row_items * slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const CacheSide& side = sides[item / (row_items * slices)];
      const int64_t row_item = item / slices % row_items;
      const int64_t width = ((side.bytes + slices - 1) / slices + 63) / 64 * 64;
      Slice slice{item % slices * width, (item % slices + 1) * width};
      if (slice.low >= side.bytes) continue;
      if (slice.high > side.bytes) slice.high = side.bytes;

      const bool streamed = streams(p, side);
      const int64_t first_row = p.packed ? 0 : row_item;
      const int64_t last_row = p.packed ? rows : row_item + 1;
      int64_t packed_pairs = 0;
      for (int64_t r = first_row; r < last_row; ++r) {
        char* row =
            side.data + r / p.num_kv_heads * side.stride[0] + r % p.num_kv_heads * side.stride[1];
        const KeptRow kept = kept_row(p, r);
        char* target = p.packed ? side.data + packed_pairs * side.bytes : row;
        if (streamed) {
          compact_row<true>(side, slice, row, kept, target);
        } else {
          compact_row<false>(side, slice, row, kept, target);
        }
        packed_pairs += kept.count;
      }
      if (streamed) finish_streams();
    }
  });
}

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA

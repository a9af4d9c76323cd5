// Moves kept pairs to the front, in place, at the speed of a copy.
//
// The flat list of indices is cut into items of consecutive pairs, one block per item: it reads its
// sources into registers, waits until all items before it have been read too, then writes. Blocks
// take items in order from a ticket counter, and any number of them may be in flight.
//
// Why nothing is overwritten before it is read. Give every pair the number row * T + position.
// Indices ascend, so along the list both sources and targets ascend, and no target exceeds its
// source. A write to a target t therefore meets as a source only pairs at or before it in the list:
// those after it have sources above t. The pairs at or before are in this item, read before the
// barrier, or in items before it, which have reported that they are read.
//
// Why no block waits for ever. Whoever holds an earlier ticket is running, and reads and reports
// without waiting for anyone.
#include <algorithm>

#include "../backend.h"
#include "device.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 8;
constexpr int64_t kUnitsPerItem = kThreads * kUnitsPerThread;  // 32 KiB of 16-byte units
constexpr int64_t kMaxPairs = kThreads;                        // a thread finds one pair's address

// Followed by one word for every 32 items: bit i % 32 of word i / 32 says that item i has been
// read.
struct Progress {
  unsigned next_item;
  unsigned first_word;  // all words before it are full
};

__device__ __forceinline__ unsigned* words_of(Progress* progress) {
  return reinterpret_cast<unsigned*>(progress + 1);
}

// Keys or values.
struct Plane {
  char* data;
  int64_t stride[3];        // batch, head, position, in bytes
  int64_t units;            // of one pair
  int64_t units_per_slice;  // a pair of more units than a block can hold is moved in slices
  int64_t slices;
  int64_t pairs;      // of an item
  int64_t num_items;  // an item is a run of pairs and a slice
  int64_t progress_offset;
};

struct Arguments {
  KvCompactParams params;
  Plane planes[2];
};

struct Plan {
  Arguments arguments;
  int64_t unit;  // bytes of the widest access that all addresses allow
  size_t workspace_bytes;
};

__device__ __forceinline__ int64_t address(const Plane& plane, int64_t num_kv_heads, int64_t row,
                                           int64_t position) {
  return row / num_kv_heads * plane.stride[0] + row % num_kv_heads * plane.stride[1] +
         position * plane.stride[2];
}

// Where the pair at `item` of the list comes from and goes to; false: it stays where it is.
__device__ __forceinline__ bool find_move(const KvCompactParams& params, const Plane& plane,
                                          int64_t pair, int64_t& source, int64_t& target) {
  const int64_t rows = params.batch * params.num_kv_heads;
  int64_t row, rank;
  if (params.offsets) {
    int64_t low = 0, high = rows;  // the first row that ends after `pair`
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (__ldg(params.offsets + middle + 1) <= pair) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low == rows) return false;
    row = low;
    rank = pair - __ldg(params.offsets + row);
  } else {
    row = pair / params.num_kept;
    rank = pair % params.num_kept;
  }
  const int64_t position = __ldg(params.indices + pair);
  const int64_t to = params.packed ? pair : row * params.num_keys + rank;
  const bool valid =
      position >= 0 && position < params.num_keys && to >= 0 && to < rows * params.num_keys;
  if (!valid || row * params.num_keys + position == to) return false;
  source = address(plane, params.num_kv_heads, row, position);
  target = address(plane, params.num_kv_heads, to / params.num_keys, to % params.num_keys);
  return true;
}

// Called by one warp: returns when all items before `item` have been read.
__device__ __forceinline__ void wait_for_items_before(unsigned item, Progress* progress) {
  const unsigned lane = threadIdx.x % kWarpSize;
  const unsigned last_word = item / 32;
  unsigned word = *static_cast<const volatile unsigned*>(&progress->first_word);
  word = __shfl_sync(kFullWarp, word, 0);
  while (word <= last_word) {
    const unsigned i = word + lane;
    unsigned wanted = 0;
    if (i < last_word) wanted = 0xffffffffu;
    if (i == last_word) wanted = (1u << item % 32) - 1;
    const unsigned read =
        wanted ? *static_cast<const volatile unsigned*>(words_of(progress) + i) : 0;
    const unsigned waiting = __ballot_sync(kFullWarp, (wanted & ~read) != 0);
    if (waiting) {
      word += __ffs(static_cast<int>(waiting)) - 1;
      __nanosleep(64);
    } else {
      word += kWarpSize;
    }
  }
  // Acquire: what was read of the words comes before all writes of this block, and before the mark
  // as well: whoever trusts that alone may overwrite what was read there.
  __threadfence();
  if (lane == 0) atomicMax(&progress->first_word, last_word);
}

// What a block works on: some consecutive pairs, and of each some units.
struct Item {
  unsigned number;
  int num_pairs, num_units;
  int64_t first_pair, first_unit;
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads, 4) kv_compact_kernel(Arguments arguments) {
  const KvCompactParams& params = arguments.params;
  const Plane& plane = arguments.planes[blockIdx.y];
  if (blockIdx.x >= plane.num_items) return;
  auto* progress =
      reinterpret_cast<Progress*>(static_cast<char*>(params.workspace) + plane.progress_offset);

  MOEKV_SHARED(Item, items, 1);
  MOEKV_SHARED(int64_t, source, kMaxPairs);  // -1: this pair is not moved
  MOEKV_SHARED(int64_t, target, kMaxPairs);
  const Item& item = items[0];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    const unsigned number = atomicAdd(&progress->next_item, 1u);
    const int64_t pair = number / plane.slices * plane.pairs;
    const int64_t unit = number % plane.slices * plane.units_per_slice;
    items[0] = {.number = number,
                .num_pairs = static_cast<int>(min(plane.pairs, params.num_indices - pair)),
                .num_units = static_cast<int>(min(plane.units_per_slice, plane.units - unit)),
                .first_pair = pair,
                .first_unit = unit};
  }
  __syncthreads();
  if (thread < item.num_pairs) {
    int64_t from = 0, to = 0;
    const bool moves = find_move(params, plane, item.first_pair + thread, from, to);
    const int64_t offset = item.first_unit * static_cast<int64_t>(sizeof(Unit));
    source[thread] = moves ? from + offset : -1;
    target[thread] = to + offset;
  }
  __syncthreads();

  // A thread's units are kThreads apart.
  const auto for_each_unit = [&](const auto& use) {
    const int num_pairs = item.num_pairs, num_units = item.num_units;
    int pair = thread / num_units, unit = thread % num_units;
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      if (pair < num_pairs && source[pair] >= 0) use(i, pair, unit);
      pair += kThreads / num_units;
      unit += kThreads % num_units;
      if (unit >= num_units) {
        unit -= num_units;
        ++pair;
      }
    }
  };

  Unit units[kUnitsPerThread];
  for_each_unit([&](int i, int pair, int unit) {
    units[i] = reinterpret_cast<const Unit*>(plane.data + source[pair])[unit];
  });
  // Release: all reads of the block come before the report, and so before any write that waits
  // for it.
  __threadfence();
  __syncthreads();
  if (thread == 0) atomicOr(words_of(progress) + item.number / 32, 1u << item.number % 32);
  if (thread < kWarpSize) wait_for_items_before(item.number, progress);
  __syncthreads();
  for_each_unit([&](int i, int pair, int unit) {
    reinterpret_cast<Unit*>(plane.data + target[pair])[unit] = units[i];
  });
}

Plan plan(const KvCompactParams& params) {
  Plan plan{.arguments = {.params = params, .planes = {}}, .unit = 16, .workspace_bytes = 0};
  auto& [keys, values] = plan.arguments.planes;
  keys.data = static_cast<char*>(params.keys);
  values.data = static_cast<char*>(params.values);
  std::copy(params.key_stride, params.key_stride + 3, keys.stride);
  std::copy(params.value_stride, params.value_stride + 3, values.stride);
  const int64_t bytes[2] = {params.key_bytes, params.value_bytes};

  int64_t alignment = 16;
  for (int i = 0; i < 2; ++i) {
    const Plane& plane = plan.arguments.planes[i];
    alignment |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(plane.data)) | bytes[i] |
                 plane.stride[0] | plane.stride[1] | plane.stride[2];
  }
  plan.unit = alignment & -alignment;  // the lowest bit that is set in any of them

  for (int i = 0; i < 2; ++i) {
    Plane& plane = plan.arguments.planes[i];
    plane.units = bytes[i] / plan.unit;
    plane.units_per_slice = std::clamp<int64_t>(plane.units, 1, kUnitsPerItem);
    plane.slices = ceil_div(plane.units, plane.units_per_slice);
    plane.pairs = std::min(kUnitsPerItem / plane.units_per_slice, kMaxPairs);
    plane.num_items = ceil_div(params.num_indices, plane.pairs) * plane.slices;
    plane.progress_offset = static_cast<int64_t>(plan.workspace_bytes);
    plan.workspace_bytes +=
        sizeof(Progress) + static_cast<size_t>(plane.num_items / 32 + 1) * sizeof(unsigned);
  }
  return plan;
}

}  // namespace

size_t kv_compact_workspace_bytes(const KvCompactParams& params) {
  return plan(params).workspace_bytes;
}

void kv_compact(const KvCompactParams& params, Stream stream) {
  check_device("kv_compact_");
  const Plan plan = cuda::plan(params);
  const auto& [keys, values] = plan.arguments.planes;
  const int64_t num_items = std::max(keys.num_items, values.num_items);
  if (num_items == 0) return;
  zero_async("kv_compact_", params.workspace, plan.workspace_bytes, stream);
  const dim3 grid(static_cast<unsigned>(num_items), 2);
  switch (plan.unit) {
    case 16:
      return MOEKV_LAUNCH(kv_compact_kernel<uint4>, grid, kThreads, 0, stream, plan.arguments);
    case 8:
      return MOEKV_LAUNCH(kv_compact_kernel<uint2>, grid, kThreads, 0, stream, plan.arguments);
    case 4:
      return MOEKV_LAUNCH(kv_compact_kernel<uint32_t>, grid, kThreads, 0, stream, plan.arguments);
    case 2:
      return MOEKV_LAUNCH(kv_compact_kernel<uint16_t>, grid, kThreads, 0, stream, plan.arguments);
    default:
      return MOEKV_LAUNCH(kv_compact_kernel<uint8_t>, grid, kThreads, 0, stream, plan.arguments);
  }
}

}  // namespace moekv::cuda

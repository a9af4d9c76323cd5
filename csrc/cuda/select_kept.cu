// Radix select over the score bits, then an ordered compaction: five reads of the scores, no sort.
//
// Every score becomes a 32-bit key whose unsigned order is the order of ranks. Pairs that are kept
// in any case (sinks, window) stand outside. What else a row keeps is a prefix of the row's order,
// so it is told by a threshold: keys above it, and the first few that equal it. Two selections find
// it:
//   per row    enough of the best for the floor (skipped where sinks and window fill it),
//   per group  the rest of the total, over all rows; ties go to the lower row, then position.
// A selection narrows the threshold by 11, 11 and 10 bits in three histogram passes. The last block
// of a segment (row or group) to finish a pass picks the digit. All sums are of integers, so the
// order in which blocks finish does not matter.
//
// A group of few keys is the work of one block, which reads them once and keeps them in shared
// memory, unless rows need a threshold of their own: one launch, and no workspace.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../backend.h"
#include "block.h"
#include "device.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;
constexpr int kTile = kThreads * kPerThread;
constexpr int64_t kMaxBlocks = 8192;  // beyond, a block works on several tiles of a row
constexpr int kBins = 2048;
constexpr int kPasses = 3;
constexpr int kGroupsPerLaunch = 256;
constexpr unsigned kPadding = 0, kNaN = 1;      // keys below every number's
constexpr unsigned kNoThreshold = 0xffffffffu;  // a key above every number's: nothing is kept

constexpr int kGroupThreads = 1024;       // of a block that has a whole group
constexpr int64_t kMaxGroupKeys = 20480;  // 80 KiB
// In place of keys, above every number's: of pairs that are kept in any case, and of none.
constexpr unsigned kAlways = 0xffffffffu, kAbsent = 0xfffffffeu;

struct Selection {
  unsigned key;   // the threshold, or the bits of it found so far
  unsigned need;  // how many of the keys that begin with these bits are kept; 0: not running
  unsigned finished_blocks;
};

// What each row of a group gets of its total, where it has as much.
struct Shares {
  unsigned sinks, window, floor;

  __host__ __device__ __forceinline__ Shares(const SelectKeptParams& params, int64_t total) {
    const int64_t share = total / params.rows;
    const int64_t num_sinks = params.sinks < share ? params.sinks : share;
    const int64_t rest = share - num_sinks;
    sinks = static_cast<unsigned>(num_sinks);
    window = static_cast<unsigned>(params.window < rest ? params.window : rest);
    floor = static_cast<unsigned>(params.floor < share ? params.floor : share);
  }
};

struct Group {
  Selection selection;
  unsigned total;
  unsigned first_index;  // where its indices begin
  Shares shares;
};

struct Row {
  Selection selection;  // for the floor
  unsigned num_above;   // kept in any case or above the row's threshold
  unsigned num_equal;
};

struct Chunk {
  unsigned num_above, num_equal;  // like those of the row
};

struct Arguments {
  SelectKeptParams params;
  Group* groups;
  Row* rows;
  Chunk* chunks;         // [groups * rows, num_chunks]
  unsigned* histograms;  // [segments, kBins]
  int num_chunks;        // of a row
  int tiles;             // of a chunk
  bool vectorized;       // scores may be read 16 bytes at a time
  bool select_in_rows;
  int row_stride;  // keys of a row in the shared memory of a block that has its group; 0: none does
};

// By value, so that the launch owns it: the totals live on the host, and a captured graph replays
// without them.
struct GroupTotals {
  int64_t first_group;
  unsigned total[kGroupsPerLaunch];
  unsigned first_index[kGroupsPerLaunch];
};

__device__ __forceinline__ unsigned key_of(float score) {
  if (isnan(score)) return kNaN;
  const unsigned bits = __float_as_uint(score + 0.0f);  // -0 becomes +0
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ unsigned first_real(const SelectKeptParams& params, int64_t row) {
  const int64_t start = params.start ? __ldg(params.start + row) : 0;
  return static_cast<unsigned>(max(int64_t{0}, min(start, params.num_keys)));
}

// A row as its blocks see it.
struct RowView {
  int64_t row;
  unsigned num_keys, first;          // positions, and the first real one
  unsigned sinks_end, window_begin;  // kept in any case: before, or from there on

  __device__ __forceinline__ RowView(const SelectKeptParams& params, int64_t row,
                                     const Shares& shares)
      : row(row),
        num_keys(static_cast<unsigned>(params.num_keys)),
        first(first_real(params, row)),
        sinks_end(min(num_keys, first + shares.sinks)),
        window_begin(max(first, num_keys - shares.window)) {}
  __device__ __forceinline__ RowView(const Arguments& arguments, int64_t row)
      : RowView(arguments.params, row, arguments.groups[row / arguments.params.rows].shares) {}

  __device__ __forceinline__ bool always(unsigned position) const {
    return position >= first && (position < sinks_end || position >= window_begin);
  }
  __device__ __forceinline__ unsigned num_always() const {
    return sinks_end - first + num_keys - max(sinks_end, window_begin);
  }

  // Keys of the thread's positions `begin`, `begin + 1`, ...
  template <typename T>
  __device__ __forceinline__ void load(const Arguments& arguments, unsigned begin,
                                       unsigned (&keys)[kPerThread]) const {
    const SelectKeptParams& params = arguments.params;
    const T* scores = static_cast<const T*>(params.scores) +
                      row / params.rows * params.score_stride[0] +
                      row % params.rows * params.score_stride[1] + begin;
    float score[kPerThread] = {};
    if (arguments.vectorized && begin + kPerThread <= num_keys) {
#pragma unroll
      for (int i = 0; i < kPerThread; i += kPackSize<T>) {
        float pack[kPackSize<T>];
        load_pack(scores + i, pack);
#pragma unroll
        for (int j = 0; j < kPackSize<T>; ++j) score[i + j] = pack[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (begin + i < num_keys) score[i] = to_float(scores[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) keys[i] = begin + i < first ? kPadding : key_of(score[i]);
  }
};

__device__ __forceinline__ Selection start_selection(unsigned need) {
  return {.key = need > 0 ? 0 : kNoThreshold, .need = need, .finished_blocks = 0};
}

// One block per group.
__global__ void __launch_bounds__(kThreads)
    select_kept_begin_kernel(Arguments arguments, GroupTotals totals) {
  const SelectKeptParams& params = arguments.params;
  const int64_t index = totals.first_group + blockIdx.x;
  Group& group = arguments.groups[index];
  if (threadIdx.x == 0) {
    group.total = totals.total[blockIdx.x];
    group.first_index = totals.first_index[blockIdx.x];
    group.shares = Shares(params, group.total);
  }
  __syncthreads();
  unsigned kept = 0;
  for (int64_t i = threadIdx.x; i < params.rows; i += kThreads) {
    const RowView view(arguments, index * params.rows + i);
    const unsigned always = view.num_always();
    const unsigned need =
        arguments.select_in_rows && group.shares.floor > always ? group.shares.floor - always : 0;
    Row& row = arguments.rows[view.row];
    row.selection = start_selection(need);
    row.num_above = row.num_equal = 0;
    kept += always + need;
  }
  kept = block_sum<kThreads>(kept);
  if (threadIdx.x == 0) group.selection = start_selection(group.total - kept);
}

// Finds the digit that holds the selection's threshold, highest bins first, and clears the
// histogram for the next pass.
__device__ __forceinline__ void pick_digit(Selection& selection, unsigned* histogram, int bits) {
  constexpr int kBinsPerThread = kBins / kThreads;
  unsigned counts[kBinsPerThread];
  unsigned sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    unsigned& bin = histogram[kBins - 1 - (static_cast<int>(threadIdx.x) * kBinsPerThread + i)];
    counts[i] = __ldcg(&bin);
    bin = 0;
    sum += counts[i];
  }
  const unsigned need = selection.need;
  const unsigned prefix = selection.key;
  // Behind the scan's barriers all have read the selection.
  unsigned total;
  unsigned above = block_exclusive_scan<kThreads>(sum, total);
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (above < need && need <= above + counts[i]) {
      const int digit = kBins - 1 - (static_cast<int>(threadIdx.x) * kBinsPerThread + i);
      selection.key = prefix << bits | static_cast<unsigned>(digit);
      selection.need = need - above;
      selection.finished_blocks = 0;
    }
    above += counts[i];
  }
}

// One block per chunk of a row, as in the kernels below. The segment is the row or its group.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    select_kept_histogram_kernel(Arguments arguments, bool in_rows, int pass) {
  const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
  const int bits = pass == 2 ? 10 : 11;
  const RowView view(arguments, blockIdx.x / arguments.num_chunks);
  const unsigned chunk = blockIdx.x % arguments.num_chunks;
  const int64_t group = view.row / arguments.params.rows;
  const int64_t segment = in_rows ? view.row : group;
  Selection& selection =
      in_rows ? arguments.rows[view.row].selection : arguments.groups[group].selection;
  if (selection.need == 0) return;
  const unsigned prefix = selection.key;
  const Selection row_selection = arguments.rows[view.row].selection;
  // Keys above are kept for the floor already.
  const unsigned highest = in_rows ? kNoThreshold : row_selection.key;

  MOEKV_SHARED(unsigned, counts, kBins);
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) counts[i] = 0;
  __syncthreads();
  // 32 - bits - shift bits are known; a shift by all 32 is undefined.
  const auto matches = [&](unsigned key) { return pass == 0 || key >> (shift + bits) == prefix; };
  const auto bin = [&](unsigned key) { return key >> shift & ((1u << bits) - 1); };
  for (int tile = 0; tile < arguments.tiles; ++tile) {
    const unsigned begin = (chunk * arguments.tiles + tile) * kTile + threadIdx.x * kPerThread;
    unsigned keys[kPerThread];
    view.template load<T>(arguments, begin, keys);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const unsigned position = begin + i;
      if (position < view.num_keys && !view.always(position) && keys[i] <= highest &&
          matches(keys[i])) {
        atomicAdd(&counts[bin(keys[i])], 1u);
      }
    }
  }
  __syncthreads();
  unsigned* histogram = arguments.histograms + segment * kBins;
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) {
    if (counts[i] > 0) atomicAdd(&histogram[i], counts[i]);
  }
  // Of the keys at the row's threshold, `need` are kept for the floor.
  if (!in_rows && chunk == 0 && threadIdx.x == 0 && row_selection.need > 0 &&
      matches(row_selection.key)) {
    atomicAdd(&histogram[bin(row_selection.key)], 0u - row_selection.need);
  }

  __threadfence();
  __syncthreads();
  int last = 0;
  if (threadIdx.x == 0) {
    const unsigned blocks =
        arguments.num_chunks * (in_rows ? 1u : static_cast<unsigned>(arguments.params.rows));
    last = atomicAdd(&selection.finished_blocks, 1u) == blocks - 1;
  }
  if (__syncthreads_or(last)) {
    __threadfence();
    pick_digit(selection, histogram, bits);
  }
}

// The key at which the row stops: the lower of the floor's and the group's.
__device__ __forceinline__ unsigned row_threshold(const Row& row, const Group& group) {
  return min(row.selection.key, group.selection.key);
}

// How many of the keys at the row's threshold are kept for the floor.
__device__ __forceinline__ unsigned num_equal_for_floor(const Row& row, const Group& group) {
  return row.selection.key <= group.selection.key ? row.selection.need : 0;
}

// How many of the keys at the row's threshold wait for what the group has left.
__device__ __forceinline__ unsigned num_candidates(const Row& row, const Group& group) {
  return group.selection.key <= row.selection.key ? row.num_equal - num_equal_for_floor(row, group)
                                                  : 0;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) select_kept_count_kernel(Arguments arguments) {
  const RowView view(arguments, blockIdx.x / arguments.num_chunks);
  const unsigned chunk = blockIdx.x % arguments.num_chunks;
  Row& row = arguments.rows[view.row];
  const unsigned threshold = row_threshold(row, arguments.groups[view.row / arguments.params.rows]);
  unsigned num_above = 0, num_equal = 0;
  for (int tile = 0; tile < arguments.tiles; ++tile) {
    const unsigned begin = (chunk * arguments.tiles + tile) * kTile + threadIdx.x * kPerThread;
    unsigned keys[kPerThread];
    view.template load<T>(arguments, begin, keys);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const unsigned position = begin + i;
      if (position >= view.num_keys) continue;
      const bool above = view.always(position) || keys[i] > threshold;
      num_above += above;
      num_equal += !above && keys[i] == threshold;
    }
  }
  num_above = block_sum<kThreads>(num_above);
  num_equal = block_sum<kThreads>(num_equal);
  if (threadIdx.x == 0) {
    arguments.chunks[blockIdx.x] = {num_above, num_equal};
    atomicAdd(&row.num_above, num_above);
    atomicAdd(&row.num_equal, num_equal);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) select_kept_write_kernel(Arguments arguments) {
  const SelectKeptParams& params = arguments.params;
  const RowView view(arguments, blockIdx.x / arguments.num_chunks);
  const unsigned chunk = blockIdx.x % arguments.num_chunks;
  const Group& group = arguments.groups[view.row / params.rows];
  const Row& row = arguments.rows[view.row];
  const int64_t first_row = view.row / params.rows * params.rows;

  // What the rows of the group keep before this one ...
  unsigned settled = 0, candidates = 0;
  for (int64_t i = first_row + threadIdx.x; i < view.row; i += kThreads) {
    const Row& before = arguments.rows[i];
    settled += before.num_above + num_equal_for_floor(before, group);
    candidates += num_candidates(before, group);
  }
  settled = block_sum<kThreads>(settled);
  candidates = block_sum<kThreads>(candidates);
  const unsigned given = min(candidates, group.selection.need);
  const unsigned row_begin = group.first_index + settled + given;
  const unsigned equal_kept = num_equal_for_floor(row, group) +
                              min(num_candidates(row, group), group.selection.need - given);
  if (chunk == 0 && threadIdx.x == 0) {
    params.offsets[view.row] = static_cast<int32_t>(row_begin);
    if (view.row == params.groups * params.rows - 1) {
      params.offsets[view.row + 1] = static_cast<int32_t>(group.first_index + group.total);
    }
  }
  // ... and the chunks of the row before this one.
  unsigned above_before = 0, equal_before = 0;
  for (unsigned i = threadIdx.x; i < chunk; i += kThreads) {
    const Chunk& before = arguments.chunks[view.row * arguments.num_chunks + i];
    above_before += before.num_above;
    equal_before += before.num_equal;
  }
  above_before = block_sum<kThreads>(above_before);
  equal_before = block_sum<kThreads>(equal_before);
  unsigned out = row_begin + above_before + min(equal_before, equal_kept);

  MOEKV_SHARED(int32_t, staged, kTile);
  const unsigned threshold = row_threshold(row, group);
  for (int tile = 0; tile < arguments.tiles; ++tile) {
    const unsigned begin = (chunk * arguments.tiles + tile) * kTile + threadIdx.x * kPerThread;
    unsigned keys[kPerThread];
    view.template load<T>(arguments, begin, keys);
    unsigned above = 0, equal = 0;  // bit i: position begin + i
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const unsigned position = begin + i;
      if (position >= view.num_keys) continue;
      if (view.always(position) || keys[i] > threshold) {
        above |= 1u << i;
      } else if (keys[i] == threshold) {
        equal |= 1u << i;
      }
    }
    unsigned num_equal, num_kept;
    unsigned equal_rank = equal_before + block_exclusive_scan<kThreads>(__popc(equal), num_equal);
    unsigned kept = above;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (equal >> i & 1) {
        if (equal_rank < equal_kept) kept |= 1u << i;
        ++equal_rank;
      }
    }
    unsigned rank = block_exclusive_scan<kThreads>(__popc(kept), num_kept);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (kept >> i & 1) staged[rank++] = static_cast<int32_t>(begin + i);
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < num_kept; i += kThreads) {
      params.indices[out + i] = staged[i];
    }
    out += num_kept;  // the next tile stages its positions behind the barriers of its scans
    equal_before += num_equal;
  }
}

// One block per group. Keys lie in shared memory in the order of ranks: rows, then positions.
template <typename T>
__global__ void __launch_bounds__(kGroupThreads, 1)
    select_kept_group_kernel(Arguments arguments, GroupTotals totals) {
  constexpr int kMaxRun = static_cast<int>(kMaxGroupKeys) / kGroupThreads + 1;
  static_assert(kMaxRun <= 32);
  const SelectKeptParams& params = arguments.params;
  MOEKV_SHARED_MEMORY(unsigned, group_keys);
  MOEKV_SHARED(unsigned, counts, kBins);
  MOEKV_SHARED(Selection, picked, 1);
  const int64_t first_row = (totals.first_group + blockIdx.x) * params.rows;
  const unsigned total = totals.total[blockIdx.x];
  const Shares shares(params, total);
  const int thread = static_cast<int>(threadIdx.x);
  const int stride = arguments.row_stride;
  const int num_keys = static_cast<int>(params.rows) * stride;

  unsigned num_always = 0;
  for (int i = thread * kPerThread; i < num_keys; i += kGroupThreads * kPerThread) {
    const RowView view(params, first_row + i / stride, shares);
    const auto begin = static_cast<unsigned>(i % stride);
    unsigned keys[kPerThread];
    view.template load<T>(arguments, begin, keys);
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const bool always = begin + j < view.num_keys && view.always(begin + j);
      num_always += always;
      if (always) keys[j] = kAlways;
      if (begin + j >= view.num_keys) keys[j] = kAbsent;
    }
#pragma unroll
    for (int j = 0; j < kPerThread; j += 4) {
      *reinterpret_cast<uint4*>(group_keys + i + j) =
          make_uint4(keys[j], keys[j + 1], keys[j + 2], keys[j + 3]);
    }
  }
  // How many of the keys at the threshold are kept. Behind the sum's barriers all keys are there.
  unsigned need = total - block_sum<kGroupThreads>(num_always);
  unsigned threshold = kNoThreshold;
  if (need > 0) {
    threshold = 0;
    for (int pass = 0; pass < kPasses; ++pass) {
      const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
      const int bits = pass == 2 ? 10 : 11;
      for (int i = thread; i < kBins; i += kGroupThreads) counts[i] = 0;
      __syncthreads();
      for (int i = thread; i < num_keys; i += kGroupThreads) {
        const unsigned key = group_keys[i];
        if (key < kAbsent && (pass == 0 || key >> (shift + bits) == threshold)) {
          atomicAdd(&counts[key >> shift & ((1u << bits) - 1)], 1u);
        }
      }
      __syncthreads();
      // Highest bins first, as in pick_digit.
      constexpr int kBinsPerThread = kBins / kGroupThreads;
      unsigned of_bin[kBinsPerThread];
      unsigned sum = 0;
#pragma unroll
      for (int i = 0; i < kBinsPerThread; ++i) {
        of_bin[i] = counts[kBins - 1 - (thread * kBinsPerThread + i)];
        sum += of_bin[i];
      }
      unsigned all;
      unsigned above = block_exclusive_scan<kGroupThreads>(sum, all);
#pragma unroll
      for (int i = 0; i < kBinsPerThread; ++i) {
        if (above < need && need <= above + of_bin[i]) {
          const auto digit = static_cast<unsigned>(kBins - 1 - (thread * kBinsPerThread + i));
          picked[0] = {
              .key = threshold << bits | digit, .need = need - above, .finished_blocks = 0};
        }
        above += of_bin[i];
      }
      __syncthreads();
      threshold = picked[0].key;
      need = picked[0].need;
    }
  }

  // A thread has a run of keys: of odd length, so that lanes read from different banks.
  const int run = ceil_div(num_keys, kGroupThreads) | 1;
  const int begin = min(thread * run, num_keys), end = min(begin + run, num_keys);
  unsigned num_above = 0, num_equal = 0;
  for (int i = begin; i < end; ++i) {
    const unsigned key = group_keys[i];
    num_above += key == kAlways || (key < kAbsent && key > threshold);
    num_equal += key < kAbsent && key == threshold;
  }
  unsigned all;
  unsigned equal_before = block_exclusive_scan<kGroupThreads>(num_equal, all);
  const unsigned above_before = block_exclusive_scan<kGroupThreads>(num_above, all);
  const unsigned rank = above_before + min(equal_before, need);
  unsigned kept = 0;  // bit i: key begin + i
  for (int i = begin; i < end; ++i) {
    const unsigned key = group_keys[i];
    const bool equal = key < kAbsent && key == threshold;
    const bool above = key == kAlways || (key < kAbsent && key > threshold);
    if (above || (equal && equal_before < need)) kept |= 1u << (i - begin);
    equal_before += equal;
  }
  // The keys make room for the positions that are kept.
  __syncthreads();
  const unsigned first_index = totals.first_index[blockIdx.x];
  unsigned place = rank;
  for (int i = begin; i < end; ++i) {
    if (i % stride == 0) {
      params.offsets[first_row + i / stride] = static_cast<int32_t>(first_index + place);
    }
    if (kept >> (i - begin) & 1) group_keys[place++] = static_cast<unsigned>(i % stride);
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < total; i += kGroupThreads) {
    params.indices[first_index + i] = static_cast<int32_t>(group_keys[i]);
  }
  if (thread == 0 && first_row + params.rows == params.groups * params.rows) {
    params.offsets[first_row + params.rows] = static_cast<int32_t>(first_index + total);
  }
}

struct Plan {
  Arguments arguments;
  size_t zeroed_bytes;  // the histograms, at the front
  size_t workspace_bytes;
};

Plan plan(const SelectKeptParams& params) {
  const int64_t rows = params.groups * params.rows;
  const int64_t tiles_per_row = ceil_div<int64_t>(params.num_keys, kTile);
  const int64_t tiles = std::max<int64_t>(1, rows * tiles_per_row / kMaxBlocks);
  const int64_t num_chunks = ceil_div(tiles_per_row, tiles);
  const int64_t element = params.dtype == DType::kFloat ? 4 : 2;

  // With one row, the total is the floor. Otherwise sinks and window fill it where every row is
  // known to have that many real positions.
  bool select_in_rows = false;
  for (int64_t g = 0; g < params.groups && params.rows > 1; ++g) {
    const Shares shares(params, params.total[g]);
    const int64_t always =
        params.start ? 0 : std::min<int64_t>(params.num_keys, shares.sinks + shares.window);
    select_in_rows = select_in_rows || shares.floor > always;
  }

  const int64_t stride = ceil_div<int64_t>(params.num_keys, kPerThread) * kPerThread;
  const bool by_group = !select_in_rows && stride > 0 && stride <= kMaxGroupKeys / params.rows;

  Plan plan{};
  auto* const base = static_cast<char*>(params.workspace);
  const auto take = [&](int64_t count, size_t size) {
    char* const begin = base + plan.workspace_bytes;
    plan.workspace_bytes += (static_cast<size_t>(count) * size + 15) / 16 * 16;
    return static_cast<void*>(begin);
  };
  const int64_t segments = select_in_rows ? rows : params.groups;
  auto* const histograms = static_cast<unsigned*>(take(segments, kBins * sizeof(unsigned)));
  plan.zeroed_bytes = plan.workspace_bytes;
  plan.arguments = {
      .params = params,
      .groups = static_cast<Group*>(take(params.groups, sizeof(Group))),
      .rows = static_cast<Row*>(take(rows, sizeof(Row))),
      .chunks = static_cast<Chunk*>(take(rows * num_chunks, sizeof(Chunk))),
      .histograms = histograms,
      .num_chunks = static_cast<int>(num_chunks),
      .tiles = static_cast<int>(tiles),
      .vectorized = reinterpret_cast<uintptr_t>(params.scores) % 16 == 0 &&
                    params.score_stride[0] * element % 16 == 0 &&
                    params.score_stride[1] * element % 16 == 0,
      .select_in_rows = select_in_rows,
      .row_stride = by_group ? static_cast<int>(stride) : 0,
  };
  if (by_group) plan.zeroed_bytes = plan.workspace_bytes = 0;
  return plan;
}

template <typename T>
void run_group(const Arguments& arguments, const GroupTotals& totals, unsigned groups,
               Stream stream) {
  const auto shared = static_cast<size_t>(arguments.params.rows * arguments.row_stride) * 4;
  MOEKV_LAUNCH(select_kept_group_kernel<T>, groups, kGroupThreads, shared, stream, arguments,
               totals);
}

void begin(const Arguments& arguments, const GroupTotals& totals, unsigned groups, Stream stream) {
  if (arguments.row_stride == 0) {
    return MOEKV_LAUNCH(select_kept_begin_kernel, groups, kThreads, 0, stream, arguments, totals);
  }
  switch (arguments.params.dtype) {
    case DType::kFloat:
      return run_group<float>(arguments, totals, groups, stream);
    case DType::kHalf:
      return run_group<__half>(arguments, totals, groups, stream);
    case DType::kBFloat16:
      return run_group<__nv_bfloat16>(arguments, totals, groups, stream);
  }
}

template <typename T>
void run(const Arguments& arguments, Stream stream) {
  const SelectKeptParams& params = arguments.params;
  const dim3 grid(static_cast<unsigned>(params.groups * params.rows * arguments.num_chunks));
  for (int in_rows = arguments.select_in_rows; in_rows >= 0; --in_rows) {
    for (int pass = 0; pass < kPasses; ++pass) {
      MOEKV_LAUNCH(select_kept_histogram_kernel<T>, grid, kThreads, 0, stream, arguments,
                   in_rows == 1, pass);
    }
  }
  MOEKV_LAUNCH(select_kept_count_kernel<T>, grid, kThreads, 0, stream, arguments);
  MOEKV_LAUNCH(select_kept_write_kernel<T>, grid, kThreads, 0, stream, arguments);
}

}  // namespace

size_t select_kept_workspace_bytes(const SelectKeptParams& params) {
  return plan(params).workspace_bytes;
}

void select_kept(const SelectKeptParams& params, Stream stream) {
  check_device("select_kept");
  if (params.groups * params.rows == 0) {
    return zero_async("select_kept", params.offsets, sizeof(int32_t), stream);
  }
  if (params.rows * params.num_keys >= int64_t{1} << 31) {
    throw std::runtime_error("moekv::select_kept: expected fewer than 2^31 pairs in a group, got " +
                             std::to_string(params.rows * params.num_keys));
  }
  const Plan plan = cuda::plan(params);
  zero_async("select_kept", params.workspace, plan.zeroed_bytes, stream);

  unsigned first_index = 0;
  for (int64_t group = 0; group < params.groups; group += kGroupsPerLaunch) {
    GroupTotals totals{.first_group = group, .total = {}, .first_index = {}};
    const int64_t count = std::min<int64_t>(kGroupsPerLaunch, params.groups - group);
    for (int64_t i = 0; i < count; ++i) {
      totals.total[i] = static_cast<unsigned>(params.total[group + i]);
      totals.first_index[i] = first_index;
      first_index += totals.total[i];
    }
    begin(plan.arguments, totals, static_cast<unsigned>(count), stream);
  }
  if (plan.arguments.row_stride > 0) return;
  switch (params.dtype) {
    case DType::kFloat:
      return run<float>(plan.arguments, stream);
    case DType::kHalf:
      return run<__half>(plan.arguments, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(plan.arguments, stream);
  }
}

}  // namespace moekv::cuda

// Attention of a few queries over heads of different lengths: flash decoding.
//
// The rows of a head are those stored and, behind them, the tail. They are cut into chunks of one
// size for all heads, so that long heads get more blocks; the cut depends on lengths that only the
// device knows, so every block works it out, and blocks too many leave. What the chunks of a head
// give meets in a fixed order, in a second kernel.
//
// Up to four queries, and fp32: each warp of a block, or part of one, walks its own rows with its
// own running softmax: eight channels per lane, for both keys and values, and up to eight queries,
// so that a head's group reads each row once. The products of a batch of rows are summed over the
// lanes so that each lane ends with a few of them: it alone takes their exponentials, and hands the
// weights round. A row of 512 bytes meets a handful of queries: this is to be bound by memory, so
// what counts is how few instructions a row takes.
//
// More queries of 16 bits go through tensor cores: a warp holds 16 of them, and the block's rows
// stream past through shared memory.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../backend.h"
#include "block.h"
#include "device.h"
#include "logit.h"
#include "rows.h"
#include "tiles.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChannels = 8;  // of a lane
constexpr int64_t kMaxDim = 256;
constexpr int kLeastLanes = 8;
constexpr int64_t kTargetBlocks = 512;  // a few per SM
constexpr int kFewQueries = 4;          // more than these, of 16 bits, go through tensor cores
constexpr int kTileQueries = 16 * kWarps;

struct Arguments {
  RaggedAttentionParams params;
  float2* extents;  // [max_chunks, rows]: the largest logit before it is scaled, the sum of weights
  float* sums;      // [max_chunks, rows, value_dim]: of weighted values
  int rows;         // queries of a KV head: G * Q
  int unit;         // chunks are multiples of so many rows
  int target_chunks, max_chunks;  // of all heads
  bool vectorized;                // keys, values and queries may be read 16 bytes at a time
};

// The rows of a head: those stored, then the tail.
struct HeadRows {
  int begin, num_stored, length;

  // Ranges that leave the stored rows are cut.
  __device__ __forceinline__ HeadRows(const RaggedAttentionParams& params, int64_t head) {
    const int limit = static_cast<int>(params.num_stored);
    begin = min(max(__ldg(params.begin + head), 0), limit);
    num_stored = min(max(__ldg(params.end + head), begin), limit) - begin;
    length = num_stored + static_cast<int>(params.num_tail);
  }
};

// Where they lie; null where there is nothing to read.
template <typename T>
struct PairRows {
  const T *stored, *tail;
  int64_t stored_stride, tail_stride;
  int num_stored, end;
  bool vectorized;

  __device__ __forceinline__ const T* at(int row) const {
    const int tail_row = row - num_stored;
    return tail_row < 0 ? stored + row * stored_stride : tail + tail_row * tail_stride;
  }
  __device__ __forceinline__ const T* operator()(int row) const {
    return row < end ? at(row) : nullptr;
  }
};

// The queries of a KV head: those of its query heads one after another.
template <typename T>
struct QueryRows {
  const T* base;
  int64_t head_stride, stride;
  int num_queries, rows;
  bool vectorized;

  __device__ __forceinline__ const T* at(int row) const {
    return base + row / num_queries * head_stride + row % num_queries * stride;
  }
  __device__ __forceinline__ const T* operator()(int row) const {
    return row < rows ? at(row) : nullptr;
  }
};

// What a query sees of the tail.
struct Sight {
  int last;
  const bool* mask;  // or null
  int64_t stride;

  __device__ __forceinline__ bool operator()(int tail) const {
    return tail <= last && (!mask || mask[tail * stride]);
  }
};

struct Chunk {
  int head;
  int number;  // within the head
};

// How the rows of all heads are cut into about target_chunks chunks. Every thread of a block must
// call its functions.
struct Cut {
  int num_heads, rows_per_chunk;

  __device__ __forceinline__ explicit Cut(const Arguments& arguments)
      : num_heads(static_cast<int>(arguments.params.batch * arguments.params.num_kv_heads)) {
    unsigned units = 0;
    for (int head = static_cast<int>(threadIdx.x); head < num_heads; head += kThreads) {
      units +=
          static_cast<unsigned>(ceil_div(HeadRows(arguments.params, head).length, arguments.unit));
    }
    units = block_sum<kThreads>(units);
    rows_per_chunk = arguments.unit *
                     max(1, static_cast<int>(ceil_div<unsigned>(units, arguments.target_chunks)));
  }
  __device__ __forceinline__ unsigned num_chunks(const RaggedAttentionParams& params,
                                                 int head) const {
    return static_cast<unsigned>(ceil_div(HeadRows(params, head).length, rows_per_chunk));
  }

  // Head num_heads: there is no such chunk.
  __device__ __forceinline__ Chunk find(const RaggedAttentionParams& params, unsigned chunk) const {
    MOEKV_SHARED(Chunk, found, 1);
    if (threadIdx.x == 0) found[0] = {num_heads, 0};
    unsigned first = 0;  // chunk of the heads at hand
    for (int base = 0; base < num_heads; base += kThreads) {
      const int head = base + static_cast<int>(threadIdx.x);
      const unsigned count = head < num_heads ? num_chunks(params, head) : 0;
      unsigned total;
      // The scan's barriers stand between this and the write above.
      const unsigned begin = first + block_exclusive_scan<kThreads>(count, total);
      if (begin <= chunk && chunk < begin + count) {
        found[0] = {head, static_cast<int>(chunk - begin)};
      }
      first += total;
    }
    __syncthreads();
    return found[0];
  }
  __device__ __forceinline__ unsigned first_chunk(const RaggedAttentionParams& params,
                                                  int wanted) const {
    unsigned sum = 0;
    for (int head = static_cast<int>(threadIdx.x); head < wanted; head += kThreads) {
      sum += num_chunks(params, head);
    }
    return block_sum<kThreads>(sum);
  }
};

// What a block works on: rows [begin, end) of a KV head, and queries from the first on.
struct Part {
  HeadRows rows;
  int64_t batch, head, group;
  int64_t chunk;  // of all
  int begin, end, first_query;

  __device__ __forceinline__ Part(const Arguments& arguments, const Cut& cut, const Chunk& which,
                                  int64_t chunk, int first_query)
      : rows(arguments.params, which.head),
        batch(which.head / arguments.params.num_kv_heads),
        head(which.head % arguments.params.num_kv_heads),
        group(arguments.params.num_query_heads / arguments.params.num_kv_heads),
        chunk(chunk),
        begin(which.number * cut.rows_per_chunk),
        end(min(begin + cut.rows_per_chunk, rows.length)),
        first_query(first_query) {}

  template <typename T>
  __device__ __forceinline__ PairRows<T> keys(const Arguments& arguments) const {
    const RaggedAttentionParams& params = arguments.params;
    return {static_cast<const T*>(params.keys) + rows.begin * params.key_stride,
            static_cast<const T*>(params.tail_keys) + batch * params.tail_key_stride[0] +
                head * params.tail_key_stride[1],
            params.key_stride,
            params.tail_key_stride[2],
            rows.num_stored,
            end,
            arguments.vectorized};
  }
  template <typename T>
  __device__ __forceinline__ PairRows<T> values(const Arguments& arguments) const {
    const RaggedAttentionParams& params = arguments.params;
    return {static_cast<const T*>(params.values) + rows.begin * params.value_stride,
            static_cast<const T*>(params.tail_values) + batch * params.tail_value_stride[0] +
                head * params.tail_value_stride[1],
            params.value_stride,
            params.tail_value_stride[2],
            rows.num_stored,
            end,
            arguments.vectorized};
  }
  template <typename T>
  __device__ __forceinline__ QueryRows<T> queries(const Arguments& arguments) const {
    const RaggedAttentionParams& params = arguments.params;
    return {static_cast<const T*>(params.query) + batch * params.query_stride[0] +
                head * group * params.query_stride[1],
            params.query_stride[1],
            params.query_stride[2],
            static_cast<int>(params.num_queries),
            arguments.rows,
            arguments.vectorized};
  }
  __device__ __forceinline__ Sight sight(const Arguments& arguments, int query) const {
    const RaggedAttentionParams& params = arguments.params;
    const int num_queries = static_cast<int>(params.num_queries);
    const int i = query % num_queries;
    const int64_t query_head = head * group + query / num_queries;
    return {static_cast<int>(params.num_tail) - num_queries + i,
            params.mask ? params.mask + batch * params.mask_stride[0] +
                              query_head * params.mask_stride[1] + i * params.mask_stride[2]
                        : nullptr,
            params.mask_stride[3]};
  }
};

// Sums of kCount values over groups of kLanes lanes, dealt out to them: the lane's own come first
// in x, kCount / kLanes of them, or one that kLanes / kCount lanes have.
template <int kLanes, int kCount>
__device__ __forceinline__ void deal_sums(float (&x)[kCount], int lane) {
  int count = kCount;
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    if (count == 1) {
      x[0] += __shfl_xor_sync(kFullWarp, x[0], distance);
      continue;
    }
    count /= 2;
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= count) continue;
      const float kept = upper ? x[i + count] : x[i];
      const float given = upper ? x[i] : x[i + count];
      x[i] = kept + __shfl_xor_sync(kFullWarp, given, distance);
    }
  }
}

// Attention so far: the largest logit before it is scaled, the sum of 2^(scale * (logit -
// highest)), and the values so weighted.
struct State {
  float highest, total;
  float sums[kChannels];

  __device__ __forceinline__ void rescale(float new_highest, const Logit& logit) {
    const float factor = logit.weight(highest, new_highest);
    highest = new_highest;
    total *= factor;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sums[i] *= factor;
  }
};

template <typename T, int kQueries, int kLanes>
__global__ void __launch_bounds__(kThreads, kQueries <= 4 ? 3 : 2)
    ragged_attention_kernel(Arguments arguments) {
  // Rows that a thread loads before it uses them: 64 bytes of keys, and of values.
  constexpr int kBatch = 4 / RawChannels<T, kChannels>::kWords;
  constexpr int kSlots = kThreads / kLanes;
  // Logits of a batch: number q * kBatch + b is that of row b and query q.
  constexpr int kLogits = kQueries * kBatch;
  constexpr int kOwn = kLogits > kLanes ? kLogits / kLanes : 1;     // a lane's
  constexpr int kCopies = kLanes > kLogits ? kLanes / kLogits : 1;  // lanes that have the same one
  constexpr int kQueryLanes = kBatch / kOwn * kCopies;              // that have those of a query
  static_assert(kOwn <= kBatch);
  const RaggedAttentionParams& params = arguments.params;
  const Cut cut(arguments);
  const unsigned tiles = ceil_div(static_cast<unsigned>(arguments.rows), unsigned{kQueries});
  const unsigned number = blockIdx.x / tiles;  // of the chunk; grid.y would end at 65,535
  const Chunk chunk = cut.find(params, number);
  if (chunk.head == cut.num_heads) return;
  const int first_query = static_cast<int>(blockIdx.x % tiles) * kQueries;
  const Part part(arguments, cut, chunk, number, first_query);
  const HeadRows& rows = part.rows;
  const int begin = part.begin, end = part.end;

  const int thread = static_cast<int>(threadIdx.x);
  const int slot = thread / kLanes;
  const int lane = thread % kLanes;
  const int first_channel = lane * kChannels;
  const int key_dim = static_cast<int>(params.key_dim);
  const int value_dim = static_cast<int>(params.value_dim);
  const Logit logit(params.scaling, params.softcap);

  const QueryRows<T> queries = part.queries<T>(arguments);
  float query[kQueries][kChannels];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const int row = min(first_query + q, arguments.rows - 1);  // what is not there sees no row
    RawChannels<T, kChannels> raw;
    raw.load(queries.at(row), first_channel, key_dim, arguments.vectorized);
    raw.unpack(first_channel, key_dim, query[q]);
  }

  const PairRows<T> keys = part.keys<T>(arguments), values = part.values<T>(arguments);
  const int own = lane / kCopies * kOwn;  // the first logit that is the lane's
  const int own_query = first_query + own / kBatch;
  const Sight sees = part.sight(arguments, own_query);

  float highest = -INFINITY, total = 0.0f;  // of the lane's query; total of the lane's own logits
  float sums[kQueries][kChannels] = {};
  for (int base = begin; base < end; base += kBatch * kSlots) {
    RawChannels<T, kChannels> raw_keys[kBatch], raw_values[kBatch];
    const auto load = [&](bool vectorized) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int row = min(base + b * kSlots + slot, end - 1);
        raw_keys[b].load(keys.at(row), first_channel, key_dim, vectorized);
        raw_values[b].load(values.at(row), first_channel, value_dim, vectorized);
      }
    };
    if (arguments.vectorized) {
      load(true);
    } else {
      load(false);
    }

    float logits[kLogits];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float key[kChannels];
      raw_keys[b].unpack(first_channel, key_dim, key);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        logits[q * kBatch + b] = dot(query[q], key);
      }
    }
    deal_sums<kLanes>(logits, lane);

    const float before = highest;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int row = base + (own % kBatch + j) * kSlots + slot;
      bool visible = row < end && own_query < arguments.rows;
      if (visible && row >= rows.num_stored) visible = sees(row - rows.num_stored);
      logits[j] = visible ? logit.unscaled(logits[j]) : -INFINITY;
      highest = fmaxf(highest, logits[j]);
    }
#pragma unroll
    for (int distance = kCopies; distance < kQueryLanes; distance *= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, distance));
    }
    if (__any_sync(kFullWarp, highest != before)) {
      const float factor = logit.weight(before, highest);
      total *= factor;
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        const float its_factor = __shfl_sync(kFullWarp, factor, q * kQueryLanes, kLanes);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) sums[q][i] *= its_factor;
      }
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      logits[j] = logit.weight(logits[j], highest);
      total += logits[j];
    }

#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float value[kChannels];
      raw_values[b].unpack(first_channel, value_dim, value);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        const int number_of_logit = q * kBatch + b;
        const float weight = __shfl_sync(kFullWarp, logits[number_of_logit % kOwn],
                                         number_of_logit / kOwn * kCopies, kLanes);
        // A weight of 0 hides the value, whatever it is.
        if (weight != 0.0f) {
#pragma unroll
          for (int i = 0; i < kChannels; ++i) sums[q][i] = fmaf(weight, value[i], sums[q][i]);
        }
      }
    }
  }
#pragma unroll
  for (int distance = kCopies; distance < kQueryLanes; distance *= 2) {
    total += __shfl_xor_sync(kFullWarp, total, distance);
  }
  State state[kQueries];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    state[q].highest = __shfl_sync(kFullWarp, highest, q * kQueryLanes, kLanes);
    state[q].total = __shfl_sync(kFullWarp, total, q * kQueryLanes, kLanes);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) state[q].sums[i] = sums[q][i];
  }

  // The slots of a warp, then the warps.
  MOEKV_SHARED(float, warp_highest, kWarps* kQueries);
  MOEKV_SHARED(float, warp_total, kWarps* kQueries);
  MOEKV_SHARED(float, warp_sums, kWarps * kQueries * static_cast<int>(kMaxDim));
  const int warp = thread / kWarpSize;
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    for (int distance = kLanes; distance < kWarpSize; distance *= 2) {
      const float other = __shfl_xor_sync(kFullWarp, state[q].highest, distance);
      state[q].rescale(fmaxf(state[q].highest, other), logit);
      state[q].total += __shfl_xor_sync(kFullWarp, state[q].total, distance);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        state[q].sums[i] += __shfl_xor_sync(kFullWarp, state[q].sums[i], distance);
      }
    }
    if (thread % kWarpSize < kLanes) {
      if (first_channel == 0) {
        warp_highest[warp * kQueries + q] = state[q].highest;
        warp_total[warp * kQueries + q] = state[q].total;
      }
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        warp_sums[(warp * kQueries + q) * kMaxDim + first_channel + i] = state[q].sums[i];
      }
    }
  }
  __syncthreads();
  for (int q = 0; q < min(kQueries, arguments.rows - first_query); ++q) {
    float highest = -INFINITY;
    for (int i = 0; i < kWarps; ++i) highest = fmaxf(highest, warp_highest[i * kQueries + q]);
    float factor[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      factor[i] = logit.weight(warp_highest[i * kQueries + q], highest);
    }
    const int64_t state = part.chunk * arguments.rows + first_query + q;
    float* out = arguments.sums + state * value_dim;
    for (int channel = thread; channel < value_dim; channel += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        sum = fmaf(factor[i], warp_sums[(i * kQueries + q) * kMaxDim + channel], sum);
      }
      out[channel] = sum;
    }
    if (thread == 0) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        total = fmaf(factor[i], warp_total[i * kQueries + q], total);
      }
      arguments.extents[state] = make_float2(highest, total);
    }
  }
}

// Rows that meet the queries of a warp at once: where they lie in shared memory, and how far apart.
// Values so that lanes which read 16 bytes of every second row, four of them, meet in no bank.
template <typename T, int kChunks>
struct Tiles {
  static constexpr int kRows = kChunks <= 4 ? 32 : 16;  // 16 KiB at most, and registers of logits
  // Few rows would leave so few products to a chunk of channels that the compiler makes predicates
  // of the branch around them: all chunks are there, filled up with zeros.
  static constexpr int kKeyLanes = kRows == 32 ? 4 : 4 * kChunks;

  int key_dim, key_stride, value_stride, values, bytes;

  __host__ __device__ __forceinline__ Tiles(int key_dim, int value_dim)
      : key_dim(kRows == 32 ? key_dim : 32 * kChunks),
        key_stride(tile_stride<T>(this->key_dim)),
        value_stride(ceil_div(value_dim, 64) * 128 + 16),
        values(kRows * key_stride),
        bytes(values + kRows * value_stride) {}
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}

// 16 queries of a warp and rows that stream by. Lane l = 4g + t has, like in the accumulators of
// m16n8k16, the queries g and g + 8: their logits for rows 8j + 2t and 8j + 2t + 1 of a tile, and
// their sums for channels 64c + 16t ... 64c + 16t + 15, those of j and of 8 + j in sums[c][j].
template <typename T, int kChunks>
struct TileState {
  static constexpr int kColumns = Tiles<T, kChunks>::kRows / 8;
  static constexpr int kWideChunks = kChunks / 2;  // of 64 channels

  float highest[2], total[2];  // totals: of the lane's own logits
  float sums[kWideChunks][8][4];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = -INFINITY;
      total[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kWideChunks * 32; ++i) sums[i / 32][i / 4 % 8][i % 4] = 0.0f;
  }

  // From logits to weights.
  __device__ __forceinline__ void weigh(float (&x)[kColumns][4], const Logit& logit) {
    float factor[2];
    bool grown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float peak = highest[half];
#pragma unroll
      for (int i = 0; i < 2 * kColumns; ++i) peak = fmaxf(peak, x[i / 2][2 * half + i % 2]);
      peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 2));
      grown = grown || peak != highest[half];
      factor[half] = logit.weight(highest[half], peak);
      highest[half] = peak;
      total[half] *= factor[half];
#pragma unroll
      for (int i = 0; i < 2 * kColumns; ++i) {
        float& weight = x[i / 2][2 * half + i % 2];
        weight = logit.weight(weight, peak);
        total[half] += weight;
      }
    }
    if (__any_sync(kFullWarp, grown)) {
#pragma unroll
      for (int i = 0; i < kWideChunks * 32; ++i) {
        sums[i / 32][i / 4 % 8][i % 4] *= factor[i % 4 / 2];
      }
    }
  }

  // m16n8k16 sums over pairs of neighbouring rows, which lie a row's length apart: a lane takes 16
  // bytes of each, eight channels, and joins them channel by channel.
  __device__ __forceinline__ void add(const float (&weights)[kColumns][4], const char* values,
                                      int stride, int dim) {
    const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
    const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int step = 0; step < kColumns / 2; ++step) {
      const auto& left = weights[2 * step];
      const auto& right = weights[2 * step + 1];
      const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                             pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
      for (int chunk = 0; chunk < kWideChunks; ++chunk) {
        if (chunk * 64 >= dim) break;
        uint32_t rows[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 bits = *reinterpret_cast<const uint4*>(
              values + (16 * step + i / 2 * 8 + 2 * t + i % 2) * stride + chunk * 128 + g * 16);
          memcpy(rows[i], &bits, sizeof bits);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const auto join = [&](int first) {
            const uint32_t low = rows[first][j / 2], high = rows[first + 1][j / 2];
            return __byte_perm(low, high, j % 2 == 0 ? 0x5410 : 0x7632);
          };
          mma_m16n8k16<T>(sums[chunk][j], a, {join(0), join(2)});
        }
      }
    }
  }

  // The same where values may be infinite or NaN: a weight of 0 hides them.
  __device__ __forceinline__ void add_carefully(float (&weights)[kColumns][4], const char* values,
                                                int stride, int dim) {
    const int t = static_cast<int>(threadIdx.x) % 4;
    const char* row = values;
#pragma unroll 1
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll 1
      for (int lane = 0; lane < 4; ++lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i, row += stride) {
          const float weight[2] = {__shfl_sync(kFullWarp, weights[0][i], lane, 4),
                                   __shfl_sync(kFullWarp, weights[0][2 + i], lane, 4)};
#pragma unroll
          for (int j = 0; j < kWideChunks * 16; ++j) {
            const int channel = j / 16 * 64 + 16 * t + j % 16;
            if (j / 16 * 64 >= dim) break;
            const float value = to_float(reinterpret_cast<const T*>(row)[channel]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& sum = sums[j / 16][j % 8][2 * half + j % 16 / 8];
              if (weight[half] != 0.0f) sum = fmaf(weight[half], value, sum);
            }
          }
        }
      }
      // The next column becomes the first: registers have no index.
#pragma unroll
      for (int i = 0; i < 4 * (kColumns - 1); ++i)
        weights[i / 4][i % 4] = weights[i / 4 + 1][i % 4];
    }
  }

  __device__ __forceinline__ bool is_finite() const {
    float zero = 0.0f;
#pragma unroll
    for (int i = 0; i < kWideChunks * 32; ++i) {
      zero = fmaf(sums[i / 32][i / 4 % 8][i % 4], 0.0f, zero);
    }
    return !isnan(zero);
  }

  // The queries from `first` on.
  __device__ __forceinline__ void write(const Arguments& arguments, int64_t chunk_of_all,
                                        int first) {
    const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
    const int t = static_cast<int>(threadIdx.x) % 4;
    const int dim = static_cast<int>(arguments.params.value_dim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(kFullWarp, total[half], 1);
      total[half] += __shfl_xor_sync(kFullWarp, total[half], 2);
      const int query = first + 8 * half + g;
      if (query >= arguments.rows) continue;
      const int64_t state = chunk_of_all * arguments.rows + query;
      if (t == 0) arguments.extents[state] = make_float2(highest[half], total[half]);
      float* out = arguments.sums + state * dim;
#pragma unroll
      for (int i = 0; i < kWideChunks * 16; i += 4) {
        const int channel = i / 16 * 64 + 16 * t + i % 16;
        float four[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          four[j] = sums[i / 16][(i + j) % 8][2 * half + i % 16 / 8];
        }
        if (dim % 4 == 0) {
          if (channel < dim) {
            *reinterpret_cast<float4*>(out + channel) =
                make_float4(four[0], four[1], four[2], four[3]);
          }
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (channel + j < dim) out[channel + j] = four[j];
          }
        }
      }
    }
  }
};

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads, kChunks <= 4 ? 3 : 2)
    ragged_attention_tiles_kernel(Arguments arguments) {
  MOEKV_SHARED_MEMORY(char, shared);
  const RaggedAttentionParams& params = arguments.params;
  const Cut cut(arguments);
  const unsigned tiles = ceil_div(static_cast<unsigned>(arguments.rows), unsigned{kTileQueries});
  const unsigned number = blockIdx.x / tiles;
  const Chunk chunk = cut.find(params, number);
  if (chunk.head == cut.num_heads) return;
  const int block_query = static_cast<int>(blockIdx.x % tiles) * kTileQueries;
  Part part(arguments, cut, chunk, number, block_query);
  const int num_queries = static_cast<int>(params.num_queries);
  const int num_stored = part.rows.num_stored;
  if (params.num_tail > 0) {
    // What is behind the last of the block's queries is seen by none.
    const int last_query = min(block_query + kTileQueries, arguments.rows) - 1;
    const bool one_head = block_query / num_queries == last_query / num_queries;
    const int last = one_head ? last_query % num_queries : num_queries - 1;
    part.end =
        min(part.end, num_stored + static_cast<int>(params.num_tail) - num_queries + last + 1);
  }
  // The same for all threads, which the compiler cannot know of what comes from shared memory: the
  // loop below is to run in whole warps.
  const int begin = __shfl_sync(kFullWarp, part.begin, 0);
  const int end = __shfl_sync(kFullWarp, part.end, 0);

  const int key_dim = static_cast<int>(params.key_dim);
  const int value_dim = static_cast<int>(params.value_dim);
  using Layout = Tiles<T, kChunks>;
  const Layout layout(key_dim, value_dim);
  const PairRows<T> keys = part.keys<T>(arguments), values = part.values<T>(arguments);
  const auto copy = [&](int row, int stage) {
    if (row < end) {
      char* tile = shared + stage * layout.bytes;
      copy_tile<kThreads, T, Layout::kKeyLanes>(tile, layout.key_stride, keys, row, Layout::kRows,
                                                key_dim);
      copy_tile<kThreads, T, 8>(tile + layout.values, layout.value_stride, values, row,
                                Layout::kRows, value_dim);
    }
    copy_async_commit();
  };

  const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int warp_query = block_query + static_cast<int>(threadIdx.x) / kWarpSize * 16;
  const bool idle = warp_query >= arguments.rows;
  uint4 queries[1][2][kChunks];
  load_fragments(part.queries<T>(arguments), warp_query, key_dim, queries);
  const Logit logit(params.scaling, params.softcap);

  using State = TileState<T, kChunks>;
  State state;
  int rounds = 1;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    state.reset();
    copy(begin, 0);
#pragma unroll 1
    for (int row = begin, stage = 0; row < end; row += Layout::kRows, stage ^= 1) {
      copy(row + Layout::kRows, stage ^ 1);
      copy_async_wait<1>();
      __syncthreads();
      if (!idle) {
        const char* tile = shared + stage * layout.bytes;
        float logits[1][State::kColumns][4] = {};
        multiply_tile<T>(queries, tile, layout.key_dim, logits);
        cap_products(logits, logit);
        if (row + Layout::kRows > min(end, num_stored)) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int query = min(warp_query + 8 * half + g, arguments.rows - 1);
            const Sight sees = part.sight(arguments, query);
#pragma unroll
            for (int i = 0; i < 2 * State::kColumns; ++i) {
              const int its_row = row + i / 2 * 8 + 2 * t + i % 2;
              const bool visible =
                  its_row < num_stored || (its_row < end && sees(its_row - num_stored));
              if (!visible) logits[0][i / 2][2 * half + i % 2] = -INFINITY;
            }
          }
        }
        state.weigh(logits[0], logit);
        const char* its_values = tile + layout.values;
        if (round > 0) {
          state.add_carefully(logits[0], its_values, layout.value_stride, value_dim);
        } else {
          state.add(logits[0], its_values, layout.value_stride, value_dim);
        }
      }
      __syncthreads();
    }
    // In products 0 times infinity is NaN. That is rare, and then a second round is careful.
    const int wrong = __syncthreads_or(!state.is_finite());
    rounds = __shfl_sync(kFullWarp, wrong, 0) != 0 ? 2 : 1;
  }
  state.write(arguments, part.chunk, warp_query);
}

// One block per KV head and query.
template <typename T>
__global__ void __launch_bounds__(kThreads) ragged_attention_merge_kernel(Arguments arguments) {
  const RaggedAttentionParams& params = arguments.params;
  const Cut cut(arguments);
  const Logit logit(params.scaling, params.softcap);
  const int index = static_cast<int>(blockIdx.x) / arguments.rows;
  const int64_t row = static_cast<int>(blockIdx.x) % arguments.rows;
  const int64_t first_chunk = cut.first_chunk(params, index);
  const int num_chunks = static_cast<int>(cut.num_chunks(params, index));
  const int value_dim = static_cast<int>(params.value_dim);
  const int64_t rows = arguments.rows;
  const float2* extents = arguments.extents + first_chunk * rows + row;
  const float* sums = arguments.sums + (first_chunk * rows + row) * value_dim;

  float highest = -INFINITY;
  for (int i = 0; i < num_chunks; ++i) highest = fmaxf(highest, extents[i * rows].x);
  float total = 0.0f;
  for (int i = 0; i < num_chunks; ++i) {
    const float2 extent = extents[i * rows];
    total = fmaf(logit.weight(extent.x, highest), extent.y, total);
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;  // nothing seen: 0

  const int64_t batch = index / params.num_kv_heads, head = index % params.num_kv_heads;
  const int64_t group = params.num_query_heads / params.num_kv_heads;
  const int64_t query_head = head * group + row / params.num_queries;
  T* output = static_cast<T*>(params.output) +
              ((batch * params.num_queries + row % params.num_queries) * params.num_query_heads +
               query_head) *
                  value_dim;
  for (int channel = static_cast<int>(threadIdx.x); channel < value_dim; channel += kThreads) {
    float sum = 0.0f;
    for (int i = 0; i < num_chunks; ++i) {
      const float factor = logit.weight(extents[i * rows].x, highest);
      sum = fmaf(factor, sums[i * rows * value_dim + channel], sum);
    }
    output[channel] = from_float<T>(sum * inverse);
  }
}

bool vectorized(const void* data, const int64_t* stride, int strides, int64_t dim, DType dtype) {
  const int64_t element = dtype == DType::kFloat ? 4 : 2;
  int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) | dim * element;
  for (int i = 0; i < strides; ++i) bits |= stride[i] * element;
  return bits % 16 == 0;
}

struct Plan {
  Arguments arguments;
  bool tiles;  // whether tensor cores take it
  size_t workspace_bytes;
};

Plan plan(const RaggedAttentionParams& params) {
  const int64_t heads = params.batch * params.num_kv_heads;
  const auto aligned = [&](const void* data, const int64_t* stride, int strides, int64_t dim) {
    return vectorized(data, stride, strides, dim, params.dtype);
  };
  const int64_t rows = params.num_query_heads / params.num_kv_heads * params.num_queries;
  const bool tiles = params.dtype != DType::kFloat && rows > kFewQueries;
  // Many queries fill the device by themselves, and their states would fill its memory.
  const int64_t target_chunks =
      ceil_div(kTargetBlocks, ceil_div<int64_t>(rows, tiles ? kTileQueries : 2 * kFewQueries));
  const int64_t max_chunks = target_chunks + heads;
  // Behind them the sums begin at a multiple of 16 bytes.
  const int64_t extents = ceil_div<int64_t>(max_chunks * rows, 2) * 2;
  auto* const workspace = static_cast<float2*>(params.workspace);
  return {
      .arguments =
          {
              .params = params,
              .extents = workspace,
              .sums = reinterpret_cast<float*>(workspace + extents),
              .rows = static_cast<int>(rows),
              // What a chunk of a tile's queries leaves is as much as 64 pairs.
              .unit = tiles ? 256 : 64,
              .target_chunks = static_cast<int>(target_chunks),
              .max_chunks = static_cast<int>(max_chunks),
              .vectorized =
                  aligned(params.keys, &params.key_stride, 1, params.key_dim) &&
                  aligned(params.tail_keys, params.tail_key_stride, 3, params.key_dim) &&
                  aligned(params.values, &params.value_stride, 1, params.value_dim) &&
                  aligned(params.tail_values, params.tail_value_stride, 3, params.value_dim) &&
                  aligned(params.query, params.query_stride, 3, params.key_dim),
          },
      .tiles = tiles,
      .workspace_bytes = static_cast<size_t>(extents) * sizeof(float2) +
                         static_cast<size_t>(max_chunks * rows * params.value_dim) * sizeof(float),
  };
}

template <typename T, int kChunks>
void run_tiles(const Arguments& arguments, Stream stream) {
  const RaggedAttentionParams& params = arguments.params;
  const auto tiles = ceil_div(static_cast<unsigned>(arguments.rows), unsigned{kTileQueries});
  const Tiles<T, kChunks> layout(static_cast<int>(params.key_dim),
                                 static_cast<int>(params.value_dim));
  MOEKV_LAUNCH((ragged_attention_tiles_kernel<T, kChunks>),
               static_cast<unsigned>(arguments.max_chunks) * tiles, kThreads,
               static_cast<size_t>(2 * layout.bytes), stream, arguments);
}

template <typename T, int kLanes>
void run_lanes(const Arguments& arguments, Stream stream) {
  const auto chunks = static_cast<unsigned>(arguments.max_chunks);
  const auto rows = static_cast<unsigned>(arguments.rows);
  if (rows <= kFewQueries) {
    MOEKV_LAUNCH((ragged_attention_kernel<T, kFewQueries, kLanes>), chunks, kThreads, 0, stream,
                 arguments);
  } else if constexpr (std::is_same_v<T, float>) {
    constexpr int kQueries = 2 * kFewQueries;
    MOEKV_LAUNCH((ragged_attention_kernel<T, kQueries, kLanes>),
                 chunks * ceil_div(rows, unsigned{kQueries}), kThreads, 0, stream, arguments);
  }
}

template <typename T>
void run(const Plan& plan, Stream stream) {
  const Arguments& arguments = plan.arguments;
  const RaggedAttentionParams& params = arguments.params;
  const int64_t dim = std::max(params.key_dim, params.value_dim);
  if (plan.tiles) {
    if constexpr (!std::is_same_v<T, float>) {
      if (dim <= 128) {
        run_tiles<T, 4>(arguments, stream);
      } else {
        run_tiles<T, 8>(arguments, stream);
      }
    }
  } else if (dim <= kLeastLanes * kChannels) {
    run_lanes<T, kLeastLanes>(arguments, stream);
  } else if (dim <= 2 * kLeastLanes * kChannels) {
    run_lanes<T, 2 * kLeastLanes>(arguments, stream);
  } else {
    run_lanes<T, kWarpSize>(arguments, stream);
  }
  const int64_t heads = params.batch * params.num_kv_heads;
  MOEKV_LAUNCH(ragged_attention_merge_kernel<T>, static_cast<unsigned>(heads * arguments.rows),
               kThreads, 0, stream, arguments);
}

}  // namespace

size_t ragged_attention_workspace_bytes(const RaggedAttentionParams& params) {
  return plan(params).workspace_bytes;
}

void ragged_attention(const RaggedAttentionParams& params, Stream stream) {
  check_device("ragged_attention");
  if (params.key_dim > kMaxDim || params.value_dim > kMaxDim) {
    throw std::runtime_error("moekv::ragged_attention: expected head dims of 1 to " +
                             std::to_string(kMaxDim) + " on CUDA, got " +
                             std::to_string(params.key_dim) + " for keys and " +
                             std::to_string(params.value_dim) + " for values");
  }
  // The last batch of a chunk counts on beyond a head's rows.
  constexpr int64_t kMaxRows = INT32_MAX - 4 * kThreads;
  if (params.num_stored > kMaxRows || params.num_stored + params.num_tail > kMaxRows) {
    throw std::runtime_error("moekv::ragged_attention: expected at most " +
                             std::to_string(kMaxRows) + " rows on CUDA, got " +
                             std::to_string(params.num_stored) + " stored and a tail of " +
                             std::to_string(params.num_tail));
  }
  const Plan plan = cuda::plan(params);
  switch (params.dtype) {
    case DType::kFloat:
      return run<float>(plan, stream);
    case DType::kHalf:
      return run<__half>(plan, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(plan, stream);
  }
}

}  // namespace moekv::cuda

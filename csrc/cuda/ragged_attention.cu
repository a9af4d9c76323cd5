// Attention of a few queries over heads of different lengths: flash decoding.
//
// The rows of a head are those stored and, behind them, the tail. They are cut into chunks of one
// size for all heads, so that long heads get more blocks; the cut depends on lengths that only the
// device knows, so every block works it out, and blocks too many leave. Within a block each warp,
// or part of one, walks its own rows with its own running softmax: eight channels per lane, for
// both keys and values, and up to eight queries, so that a head's group reads each row once. The
// products of a batch of rows are summed over the lanes so that each lane ends with a few of them:
// it alone takes their exponentials, and hands the weights round. States meet in a fixed order, in
// the block and then over the chunks of a head.
//
// A row of 512 bytes meets a handful of queries: this is to be bound by memory, so what counts is
// how few instructions a row takes.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../backend.h"
#include "block.h"
#include "device.h"
#include "logit.h"
#include "rows.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChannels = 8;  // of a lane
constexpr int64_t kMaxDim = 256;
constexpr int kLeastLanes = 8;
constexpr int64_t kTargetBlocks = 512;  // a few per SM
constexpr int kUnit = 64;               // rows; chunks are multiples of it

struct Arguments {
  RaggedAttentionParams params;
  float* states;                  // [max_chunks, rows, value_dim + 2]: sums, maximum, total
  int rows;                       // queries of a KV head: G * Q
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

struct Chunk {
  int head;
  int number;  // within the head
};

// How the rows of all heads are cut into about target_chunks chunks. Every thread of a block must
// call its functions.
struct Cut {
  int num_heads;
  int rows_per_chunk;

  __device__ __forceinline__ explicit Cut(const Arguments& arguments)
      : num_heads(static_cast<int>(arguments.params.batch * arguments.params.num_kv_heads)) {
    unsigned units = 0;
    for (int head = static_cast<int>(threadIdx.x); head < num_heads; head += kThreads) {
      units += static_cast<unsigned>(ceil_div(HeadRows(arguments.params, head).length, kUnit));
    }
    units = block_sum<kThreads>(units);
    rows_per_chunk =
        kUnit * max(1, static_cast<int>(ceil_div<unsigned>(units, arguments.target_chunks)));
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
  const HeadRows rows(params, chunk.head);
  const int64_t batch = chunk.head / params.num_kv_heads, head = chunk.head % params.num_kv_heads;
  const int64_t group = params.num_query_heads / params.num_kv_heads;
  const int begin = chunk.number * cut.rows_per_chunk;
  const int end = min(begin + cut.rows_per_chunk, rows.length);

  const int thread = static_cast<int>(threadIdx.x);
  const int slot = thread / kLanes;
  const int lane = thread % kLanes;
  const int first_channel = lane * kChannels;
  const int key_dim = static_cast<int>(params.key_dim);
  const int value_dim = static_cast<int>(params.value_dim);
  const int first_query = static_cast<int>(blockIdx.x % tiles) * kQueries;
  const int num_queries = static_cast<int>(params.num_queries);
  const Logit logit(params.scaling, params.softcap);

  float query[kQueries][kChannels];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const int row = min(first_query + q, arguments.rows - 1);  // what is not there sees no row
    RawChannels<T, kChannels> raw;
    raw.load(static_cast<const T*>(params.query) + batch * params.query_stride[0] +
                 (head * group + row / num_queries) * params.query_stride[1] +
                 row % num_queries * params.query_stride[2],
             first_channel, key_dim, arguments.vectorized);
    raw.unpack(first_channel, key_dim, query[q]);
  }

  const T* const keys = static_cast<const T*>(params.keys) + rows.begin * params.key_stride;
  const T* const values = static_cast<const T*>(params.values) + rows.begin * params.value_stride;
  const T* const tail_keys = static_cast<const T*>(params.tail_keys) +
                             batch * params.tail_key_stride[0] + head * params.tail_key_stride[1];
  const T* const tail_values = static_cast<const T*>(params.tail_values) +
                               batch * params.tail_value_stride[0] +
                               head * params.tail_value_stride[1];

  const int own = lane / kCopies * kOwn;  // the first logit that is the lane's
  const int own_query = first_query + own / kBatch;
  // Whether the lane's query sees a row of the tail.
  const auto sees = [&](int tail) {
    const int i = own_query % num_queries;
    if (tail > static_cast<int>(params.num_tail) - num_queries + i) return false;
    const int64_t query_head = head * group + own_query / num_queries;
    return !params.mask ||
           params.mask[batch * params.mask_stride[0] + query_head * params.mask_stride[1] +
                       i * params.mask_stride[2] + tail * params.mask_stride[3]];
  };

  float highest = -INFINITY, total = 0.0f;  // of the lane's query; total of the lane's own logits
  float sums[kQueries][kChannels] = {};
  for (int base = begin; base < end; base += kBatch * kSlots) {
    RawChannels<T, kChannels> raw_keys[kBatch], raw_values[kBatch];
    const auto load = [&](bool vectorized) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int row = min(base + b * kSlots + slot, end - 1);
        const int tail = row - rows.num_stored;
        const T* key = tail < 0 ? keys + row * params.key_stride
                                : tail_keys + tail * params.tail_key_stride[2];
        const T* value = tail < 0 ? values + row * params.value_stride
                                  : tail_values + tail * params.tail_value_stride[2];
        raw_keys[b].load(key, first_channel, key_dim, vectorized);
        raw_values[b].load(value, first_channel, value_dim, vectorized);
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
    float* out =
        arguments.states +
        (static_cast<int64_t>(number) * arguments.rows + first_query + q) * (value_dim + 2);
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
      out[value_dim] = highest;
      out[value_dim + 1] = total;
    }
  }
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
  const int64_t stride = arguments.rows * static_cast<int64_t>(value_dim + 2);
  const float* states = arguments.states + first_chunk * stride + row * (value_dim + 2);

  float highest = -INFINITY;
  for (int i = 0; i < num_chunks; ++i) highest = fmaxf(highest, states[i * stride + value_dim]);
  float total = 0.0f;
  for (int i = 0; i < num_chunks; ++i) {
    const float factor = logit.weight(states[i * stride + value_dim], highest);
    total = fmaf(factor, states[i * stride + value_dim + 1], total);
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
      const float factor = logit.weight(states[i * stride + value_dim], highest);
      sum = fmaf(factor, states[i * stride + channel], sum);
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

Arguments arguments_of(const RaggedAttentionParams& params) {
  const int64_t heads = params.batch * params.num_kv_heads;
  const auto aligned = [&](const void* data, const int64_t* stride, int strides, int64_t dim) {
    return vectorized(data, stride, strides, dim, params.dtype);
  };
  const int64_t rows = params.num_query_heads / params.num_kv_heads * params.num_queries;
  // Many queries fill the device by themselves, and their states would fill its memory.
  const int64_t target_chunks = ceil_div(kTargetBlocks, ceil_div<int64_t>(rows, 8));
  return {
      .params = params,
      .states = static_cast<float*>(params.workspace),
      .rows = static_cast<int>(rows),
      .target_chunks = static_cast<int>(target_chunks),
      .max_chunks = static_cast<int>(target_chunks + heads),
      .vectorized = aligned(params.keys, &params.key_stride, 1, params.key_dim) &&
                    aligned(params.tail_keys, params.tail_key_stride, 3, params.key_dim) &&
                    aligned(params.values, &params.value_stride, 1, params.value_dim) &&
                    aligned(params.tail_values, params.tail_value_stride, 3, params.value_dim) &&
                    aligned(params.query, params.query_stride, 3, params.key_dim),
  };
}

template <typename T, int kLanes>
void run(const Arguments& arguments, Stream stream) {
  const RaggedAttentionParams& params = arguments.params;
  const auto chunks = static_cast<unsigned>(arguments.max_chunks);
  const auto rows = static_cast<unsigned>(arguments.rows);
  if (rows <= 4) {
    MOEKV_LAUNCH((ragged_attention_kernel<T, 4, kLanes>), chunks, kThreads, 0, stream, arguments);
  } else {
    MOEKV_LAUNCH((ragged_attention_kernel<T, 8, kLanes>), chunks * ceil_div(rows, 8u), kThreads, 0,
                 stream, arguments);
  }
  const auto heads = static_cast<unsigned>(params.batch * params.num_kv_heads);
  MOEKV_LAUNCH(ragged_attention_merge_kernel<T>, heads * rows, kThreads, 0, stream, arguments);
}

template <typename T>
void run(const Arguments& arguments, Stream stream) {
  const int64_t dim = std::max(arguments.params.key_dim, arguments.params.value_dim);
  if (dim <= kLeastLanes * kChannels) return run<T, kLeastLanes>(arguments, stream);
  if (dim <= 2 * kLeastLanes * kChannels) return run<T, 2 * kLeastLanes>(arguments, stream);
  return run<T, kWarpSize>(arguments, stream);
}

}  // namespace

size_t ragged_attention_workspace_bytes(const RaggedAttentionParams& params) {
  const Arguments arguments = arguments_of(params);
  return static_cast<size_t>(arguments.max_chunks) * static_cast<size_t>(arguments.rows) *
         static_cast<size_t>(params.value_dim + 2) * sizeof(float);
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
  const Arguments arguments = arguments_of(params);
  switch (params.dtype) {
    case DType::kFloat:
      return run<float>(arguments, stream);
    case DType::kHalf:
      return run<__half>(arguments, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(arguments, stream);
  }
}

}  // namespace moekv::cuda

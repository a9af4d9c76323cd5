// Attention of a few queries over heads of different lengths: flash decoding.
//
// The rows of a head are those stored and, behind them, the tail. They are cut into chunks of one
// size for all heads, so that long heads get more blocks; the cut depends on lengths that only the
// device knows, so every block works it out, and blocks too many leave. Within a block each warp,
// or part of one, walks its own rows with its own running softmax: eight channels per lane, for
// both keys and values, and up to eight queries, so that a head's group reads each row once. States
// meet in a fixed order, in the block and then over the chunks of a head.
//
// A row of 512 bytes meets a handful of queries: this is bound by memory, and fp32 FMAs keep up.
#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

#include "../backend.h"
#include "block.h"
#include "device.h"
#include "logit.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChannels = 8;  // of a lane
constexpr int64_t kMaxDim = 256;
constexpr int64_t kTargetBlocks = 512;  // a few per SM
constexpr int kUnit = 64;               // rows; chunks are multiples of it

struct Arguments {
  RaggedAttentionParams params;
  float* states;                  // [max_chunks, rows, value_dim + 2]: sums, maximum, total
  int rows;                       // queries of a KV head: G * Q
  int target_chunks, max_chunks;  // of all heads
  int lanes;                      // of a key and its value, a power of two
  bool vectorized_keys, vectorized_values, vectorized_query;  // may be read 16 bytes at a time
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

// A lane's channels of a row, as they lie in memory.
template <typename T>
struct RawChannels {
  static constexpr int kWords = kChannels / kPackSize<T>;
  uint4 words[kWords];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = make_uint4(0, 0, 0, 0);
  }
  // Zeros beyond the last channel.
  __device__ __forceinline__ void load(const T* row, int first, int dim, bool vectorized) {
    clear();
    if (vectorized) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int channel = first + i * kPackSize<T>;
        if (channel < dim) words[i] = *reinterpret_cast<const uint4*>(row + channel);
      }
    } else {
      T elements[kChannels];
      memcpy(elements, words, sizeof words);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        if (first + i < dim) elements[i] = row[first + i];
      }
      memcpy(words, elements, sizeof words);
    }
  }
  __device__ __forceinline__ void unpack(float (&x)[kChannels]) const {
    T elements[kChannels];
    memcpy(elements, words, sizeof words);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = to_float(elements[i]);
  }
};

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

template <typename T, int kQueries>
__global__ void __launch_bounds__(kThreads, kQueries <= 4 ? 3 : 2)
    ragged_attention_kernel(Arguments arguments) {
  // Rows that a thread loads before it uses them: 64 bytes of keys, and of values.
  constexpr int kBatch = 4 / RawChannels<T>::kWords;
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
  const int slot = thread / arguments.lanes;
  const int num_slots = kThreads / arguments.lanes;
  const int first_channel = thread % arguments.lanes * kChannels;
  const int key_dim = static_cast<int>(params.key_dim);
  const int value_dim = static_cast<int>(params.value_dim);
  const int first_query = static_cast<int>(blockIdx.x % tiles) * kQueries;
  const int num_queries = static_cast<int>(params.num_queries);
  const Logit logit(params.scaling, params.softcap);

  float query[kQueries][kChannels];
  State state[kQueries];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    state[q] = {.highest = -INFINITY, .total = 0.0f, .sums = {}};
    RawChannels<T> raw;
    raw.clear();
    if (first_query + q < arguments.rows) {
      const int64_t query_head = head * group + (first_query + q) / num_queries;
      raw.load(static_cast<const T*>(params.query) + batch * params.query_stride[0] +
                   query_head * params.query_stride[1] +
                   (first_query + q) % num_queries * params.query_stride[2],
               first_channel, key_dim, arguments.vectorized_query);
    }
    raw.unpack(query[q]);
  }

  for (int base = begin; base < end; base += kBatch * num_slots) {
    RawChannels<T> keys[kBatch], values[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int row = base + b * num_slots + slot;
      keys[b].clear();
      values[b].clear();
      if (row >= end) continue;
      const T *key, *value;
      if (row < rows.num_stored) {
        key = static_cast<const T*>(params.keys) + (rows.begin + row) * params.key_stride;
        value = static_cast<const T*>(params.values) + (rows.begin + row) * params.value_stride;
      } else {
        const int tail = row - rows.num_stored;
        key = static_cast<const T*>(params.tail_keys) + batch * params.tail_key_stride[0] +
              head * params.tail_key_stride[1] + tail * params.tail_key_stride[2];
        value = static_cast<const T*>(params.tail_values) + batch * params.tail_value_stride[0] +
                head * params.tail_value_stride[1] + tail * params.tail_value_stride[2];
      }
      keys[b].load(key, first_channel, key_dim, arguments.vectorized_keys);
      values[b].load(value, first_channel, value_dim, arguments.vectorized_values);
    }

    float weights[kBatch][kQueries];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int row = base + b * num_slots + slot;
      const int tail = row - rows.num_stored;
      float key[kChannels];
      keys[b].unpack(key);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        float product = 0.0f;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) product = fmaf(query[q][i], key[i], product);
        for (int distance = arguments.lanes / 2; distance > 0; distance /= 2) {
          product += __shfl_xor_sync(kFullWarp, product, distance);
        }
        bool visible = row < end && first_query + q < arguments.rows;
        if (visible && tail >= 0) {
          const int64_t query_head = head * group + (first_query + q) / num_queries;
          const int i = (first_query + q) % num_queries;
          visible = tail <= static_cast<int>(params.num_tail) - num_queries + i;
          if (visible && params.mask) {
            visible =
                params.mask[batch * params.mask_stride[0] + query_head * params.mask_stride[1] +
                            i * params.mask_stride[2] + tail * params.mask_stride[3]];
          }
        }
        weights[b][q] = visible ? logit.unscaled(product) : -INFINITY;
      }
    }
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      float highest = state[q].highest;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) highest = fmaxf(highest, weights[b][q]);
      state[q].rescale(highest, logit);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        weights[b][q] = logit.weight(weights[b][q], highest);
        state[q].total += weights[b][q];
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float value[kChannels];
      values[b].unpack(value);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          // A weight of 0 hides the value, whatever it is.
          if (weights[b][q] != 0.0f) {
            state[q].sums[i] = fmaf(weights[b][q], value[i], state[q].sums[i]);
          }
        }
      }
    }
  }

  // The slots of a warp, then the warps.
  MOEKV_SHARED(float, warp_highest, kWarps* kQueries);
  MOEKV_SHARED(float, warp_total, kWarps* kQueries);
  MOEKV_SHARED(float, warp_sums, kWarps * kQueries * static_cast<int>(kMaxDim));
  const int warp = thread / kWarpSize;
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    for (int distance = arguments.lanes; distance < kWarpSize; distance *= 2) {
      const float other = __shfl_xor_sync(kFullWarp, state[q].highest, distance);
      state[q].rescale(fmaxf(state[q].highest, other), logit);
      state[q].total += __shfl_xor_sync(kFullWarp, state[q].total, distance);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        state[q].sums[i] += __shfl_xor_sync(kFullWarp, state[q].sums[i], distance);
      }
    }
    if (thread % kWarpSize < arguments.lanes) {
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
  const auto lanes = std::bit_ceil(static_cast<uint64_t>(
      ceil_div<int64_t>(std::max(params.key_dim, params.value_dim), kChannels)));
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
      .lanes = static_cast<int>(lanes),
      .vectorized_keys = aligned(params.keys, &params.key_stride, 1, params.key_dim) &&
                         aligned(params.tail_keys, params.tail_key_stride, 3, params.key_dim),
      .vectorized_values =
          aligned(params.values, &params.value_stride, 1, params.value_dim) &&
          aligned(params.tail_values, params.tail_value_stride, 3, params.value_dim),
      .vectorized_query = aligned(params.query, params.query_stride, 3, params.key_dim),
  };
}

template <typename T>
void run(const Arguments& arguments, Stream stream) {
  const RaggedAttentionParams& params = arguments.params;
  const auto chunks = static_cast<unsigned>(arguments.max_chunks);
  const auto rows = static_cast<unsigned>(arguments.rows);
  if (rows <= 4) {
    MOEKV_LAUNCH((ragged_attention_kernel<T, 4>), chunks, kThreads, 0, stream, arguments);
  } else {
    MOEKV_LAUNCH((ragged_attention_kernel<T, 8>), chunks * ceil_div(rows, 8u), kThreads, 0, stream,
                 arguments);
  }
  const auto heads = static_cast<unsigned>(params.batch * params.num_kv_heads);
  MOEKV_LAUNCH(ragged_attention_merge_kernel<T>, heads * rows, kThreads, 0, stream, arguments);
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

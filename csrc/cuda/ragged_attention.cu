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
//
// Quantised rows go through tensor cores whatever the number of queries. Their codes stream to
// shared memory as they are, where the whole block makes numbers of 16 bits of them, tile by tile.
// The tail has 16 bits as it is and another space of channels where values have 4 bits: it gets
// blocks of its own, in another launch, and meets the stored rows when all chunks meet.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "ragged_coded.h"
#include "ragged_tiles.h"

namespace moekv::cuda {
namespace {

using namespace ragged;

constexpr int kChannels = 8;  // of a lane
constexpr int kLeastLanes = 8;
constexpr int64_t kTargetBlocks = 512;  // a few per SM
constexpr int kFewQueries = 4;          // more than these, of 16 bits, go through tensor cores

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
  const Logit& logit = arguments.logit;

  const QueryRows<T> queries = part.queries<T>(arguments);
  float query[kQueries][kChannels];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const int row = min(first_query + q, arguments.rows - 1);  // what is not there sees no row
    RawChannels<T, kChannels> raw;
    raw.load(queries.at(row), first_channel, key_dim, arguments.vectorized);
    raw.unpack(first_channel, key_dim, query[q]);
  }

  const PairRows<T> keys = part.pairs<T>(arguments, arguments.keys);
  const PairRows<T> values = part.pairs<T>(arguments, arguments.values);
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

    // Of the lane's logits: what is added, and 0 where nothing is seen. Both are on their way with
    // the keys and values.
    float offsets[kOwn];
    uint8_t marks[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int row = base + (own % kBatch + j) * kSlots + slot;
      offsets[j] = part.offset(params, logit, row);
      const bool exists = row < end && own_query < arguments.rows;
      marks[j] = exists ? sees.mark(row - rows.num_stored) : uint8_t{0};
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
      logits[j] = marks[j] != 0 ? offset_by(logit.unscaled(logits[j]), offsets[j]) : -INFINITY;
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
  constexpr int kStride = static_cast<int>(kMaxDim);
  MOEKV_SHARED(float4, aligned_sums, kWarps * kQueries * kStride / 4);
  float* const warp_sums = reinterpret_cast<float*>(aligned_sums);
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
      // Lanes lie 32 bytes apart: every other four of them begin with their second half, so that
      // those which write at once have all banks between them.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool second = (lane / 4 + i) % 2 != 0;
        const float* low = state[q].sums;
        const float* high = low + 4;
        float* target = warp_sums + (warp * kQueries + q) * kStride + first_channel;
        *reinterpret_cast<float4*>(target + (second ? 4 : 0)) =
            make_float4(second ? high[0] : low[0], second ? high[1] : low[1],
                        second ? high[2] : low[2], second ? high[3] : low[3]);
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
        sum = fmaf(factor[i], warp_sums[(i * kQueries + q) * kStride + channel], sum);
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

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads, kChunks <= 4 ? 3 : 2)
    ragged_attention_tiles_kernel(Arguments arguments) {
  MOEKV_SHARED_MEMORY(char, shared);
  attend_tiles<T, kChunks, DenseSource<T, kChunks>>(arguments, shared);
}

// What the chunks of a head have left of a query. Every thread of a block must make it.
struct States {
  const float2* extents;
  const float* sums;
  int num_chunks, rows;
  int64_t stride;  // of a chunk's sums

  __device__ __forceinline__ States(const Arguments& arguments, int head, int64_t row)
      : rows(arguments.rows), stride(rows * arguments.params.value_dim) {
    const Cut cut(arguments);
    const int64_t first = cut.first_chunk(arguments.params, head);
    num_chunks = static_cast<int>(cut.num_chunks(arguments.params, head));
    extents = arguments.extents + first * rows + row;
    sums = arguments.sums + (first * rows + row) * arguments.params.value_dim;
  }
  __device__ __forceinline__ float highest(float value) const {
    for (int i = 0; i < num_chunks; ++i) value = fmaxf(value, extents[int64_t{i} * rows].x);
    return value;
  }
  __device__ __forceinline__ float total(const Logit& logit, float highest) const {
    float total = 0.0f;
    for (int i = 0; i < num_chunks; ++i) {
      const float2 extent = extents[int64_t{i} * rows];
      total = fmaf(logit.weight(extent.x, highest), extent.y, total);
    }
    return total;
  }
  __device__ __forceinline__ float sum(const Logit& logit, float highest, int channel) const {
    float sum = 0.0f;
    for (int i = 0; i < num_chunks; ++i) {
      const float factor = logit.weight(extents[int64_t{i} * rows].x, highest);
      sum = fmaf(factor, sums[i * stride + channel], sum);
    }
    return sum;
  }
};

// A row of sums back from the space of values of 4 bits, by all threads of the block: those a warp
// or more apart by pairs, the rest in registers.
__device__ __forceinline__ void transform_back(float* sums, int dim) {
  const int block = dim & -dim;
  const int thread = static_cast<int>(threadIdx.x);
  for (int width = block / 2; width >= kWarpSize; width /= 2) {
    __syncthreads();
    for (int i = thread; i < dim / 2; i += kThreads) {
      float* first = sums + i + (i & -width);  // i / width * 2 * width + i % width
      const float a = first[0], b = first[width];
      first[0] = a + b;
      first[width] = a - b;
    }
  }
  __syncthreads();
  for (int i = thread; i < ceil_div(dim, kThreads) * kThreads; i += kThreads) {
    float own = i < dim ? sums[i] : 0.0f;
    for (int width = min(block, kWarpSize) / 2; width > 0; width /= 2) {
      const float other = __shfl_xor_sync(kFullWarp, own, width);
      own = i & width ? other - own : own + other;
    }
    if (i < dim) sums[i] = own;
  }
}

// One block per KV head and query. Quantised rows: those and, apart from them, the tail.
template <typename T, bool kCoded>
__global__ void __launch_bounds__(kThreads)
    ragged_attention_merge_kernel(Arguments arguments, Arguments tail_arguments) {
  const RaggedAttentionParams& params = arguments.params;
  const Logit& logit = tail_arguments.logit;  // as all chunks have them
  const int index = static_cast<int>(blockIdx.x) / arguments.rows;
  const int64_t row = static_cast<int>(blockIdx.x) % arguments.rows;
  const int value_dim = static_cast<int>(params.value_dim);
  const States states(arguments, index, row);
  States tail = states;
  if constexpr (kCoded) tail = States(tail_arguments, index, row);

  const int64_t batch = index / params.num_kv_heads, head = index % params.num_kv_heads;
  const int64_t group = params.num_query_heads / params.num_kv_heads;
  const int64_t query_head = head * group + row / params.num_queries;
  float highest = states.highest(-INFINITY);
  if (kCoded) highest = tail.highest(highest);
  float total = states.total(logit, highest);
  if (kCoded) total += tail.total(logit, highest);
  // A sink takes its share where anything else is seen.
  if (params.sinks && highest > -INFINITY) {
    total += logit.weight(logit.unscaled_offset(__ldg(params.sinks + query_head)), highest);
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;  // nothing seen: 0

  T* output = static_cast<T*>(params.output) +
              ((batch * params.num_queries + row % params.num_queries) * params.num_query_heads +
               query_head) *
                  value_dim;
  MOEKV_SHARED(float, sums, kMaxDim);
  for (int channel = static_cast<int>(threadIdx.x); channel < value_dim; channel += kThreads) {
    sums[channel] = states.sum(logit, highest, channel);
  }
  if (kCoded && params.value_bits == 4) transform_back(sums, value_dim);
  for (int channel = static_cast<int>(threadIdx.x); channel < value_dim; channel += kThreads) {
    float sum = sums[channel];
    if (kCoded) sum += tail.sum(logit, highest, channel);
    output[channel] = from_float<T>(sum * inverse);
  }
}

bool vectorized(const void* data, const int64_t* stride, int strides, int64_t bytes,
                int64_t element) {
  int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) | bytes;
  for (int i = 0; i < strides; ++i) bits |= stride[i] * element;
  return bits % 16 == 0;
}

bool is_coded(const RaggedAttentionParams& params) { return params.key_bits != 16; }

// Whether tensor cores take it.
bool in_tiles(const Arguments& arguments) {
  return is_coded(arguments.params) ||
         (arguments.params.dtype != DType::kFloat && arguments.rows > kFewQueries);
}

struct Plan {
  Arguments arguments, tail;  // of quantised rows, the tail apart
  size_t workspace_bytes;
};

// The work on some rows; its states lie in the workspace from a multiple of 16 bytes on.
Arguments arguments_of(const RaggedAttentionParams& params, size_t& workspace_bytes) {
  Arguments arguments{};
  arguments.params = params;
  arguments.keys = {params.keys, params.tail_keys, params.key_stride, {}};
  arguments.values = {params.values, params.tail_values, params.value_stride, {}};
  // Queries are divided by it where they are transformed.
  const float part =
      params.key_bits == 4 ? static_cast<float>(params.key_dim & -params.key_dim) : 1.0f;
  arguments.logit = Logit(params.scaling * part, params.softcap);
  arguments.extent_unit = params.softcap > 0 ? 1.0f : part;
  arguments.rows =
      static_cast<int>(params.num_query_heads / params.num_kv_heads * params.num_queries);
  std::copy_n(params.tail_key_stride, 3, arguments.keys.tail_stride);
  std::copy_n(params.tail_value_stride, 3, arguments.values.tail_stride);
  const int64_t heads = params.batch * params.num_kv_heads, rows = arguments.rows;
  const bool tiles = in_tiles(arguments);
  // What a chunk of a tile's queries leaves is as much as 64 pairs.
  arguments.unit = tiles ? 256 : 64;
  // Many queries fill the device by themselves, and their states would fill its memory.
  const int64_t target_chunks =
      ceil_div(kTargetBlocks, ceil_div<int64_t>(rows, tiles ? kTileQueries : 2 * kFewQueries));
  const int64_t max_chunks = target_chunks + heads;
  // A head has no more than all rows, of which there may be few.
  const int64_t units = ceil_div<int64_t>(params.num_stored + params.num_tail, arguments.unit);
  arguments.target_chunks = static_cast<int>(target_chunks);
  arguments.max_chunks =
      static_cast<int>(std::min(max_chunks, heads * std::max<int64_t>(units, 1)));
  const int64_t element = params.dtype == DType::kFloat ? 4 : 2;
  const auto aligned = [&](const Plane& plane, int64_t dim, int bits) {
    const bool coded = bits != 16;
    return vectorized(plane.stored, &plane.stride, 1, coded ? code_bytes(dim, bits) : dim * element,
                      coded ? 1 : element) &&
           vectorized(plane.tail, plane.tail_stride, 3, dim * element, element);
  };
  arguments.vectorized =
      aligned(arguments.keys, params.key_dim, params.key_bits) &&
      aligned(arguments.values, params.value_dim, params.value_bits) &&
      vectorized(params.query, params.query_stride, 3, params.key_dim * element, element);

  char* const workspace = static_cast<char*>(params.workspace) + workspace_bytes;
  const int64_t states = arguments.max_chunks * rows;
  const int64_t extent_bytes =
      ceil_div<int64_t>(states, 2) * 2 * static_cast<int64_t>(sizeof(float2));
  arguments.extents = reinterpret_cast<float2*>(workspace);
  arguments.sums = reinterpret_cast<float*>(workspace + extent_bytes);
  const int64_t bytes =
      extent_bytes + states * params.value_dim * static_cast<int64_t>(sizeof(float));
  workspace_bytes += static_cast<size_t>(ceil_div<int64_t>(bytes, 16) * 16);
  return arguments;
}

Plan plan(const RaggedAttentionParams& params) {
  Plan plan{};
  if (!is_coded(params)) {
    plan.arguments = plan.tail = arguments_of(params, plan.workspace_bytes);
    return plan;
  }
  RaggedAttentionParams stored = params, tail = params;
  stored.tail_keys = stored.tail_values = nullptr;
  stored.mask = nullptr;
  stored.num_tail = 0;
  std::fill_n(stored.tail_key_stride, 3, 0);
  std::fill_n(stored.tail_value_stride, 3, 0);
  tail.keys = tail.values = nullptr;
  tail.bias = nullptr;
  tail.num_stored = tail.key_stride = tail.value_stride = 0;
  tail.key_bits = tail.value_bits = 16;
  plan.arguments = arguments_of(stored, plan.workspace_bytes);
  plan.tail = arguments_of(tail, plan.workspace_bytes);
  return plan;
}

template <typename T, int kChunks>
void run_tiles(const Arguments& arguments, Stream stream) {
  const auto tiles = ceil_div(static_cast<unsigned>(arguments.rows), unsigned{kTileQueries});
  MOEKV_LAUNCH((ragged_attention_tiles_kernel<T, kChunks>),
               static_cast<unsigned>(arguments.max_chunks) * tiles, kThreads,
               (DenseSource<T, kChunks>::shared_bytes(arguments)), stream, arguments);
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
void run_dense(const Arguments& arguments, Stream stream) {
  const RaggedAttentionParams& params = arguments.params;
  const int64_t dim = std::max(params.key_dim, params.value_dim);
  if (in_tiles(arguments)) {
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
}

template <typename T>
void run(const Plan& plan, Stream stream) {
  const Arguments& arguments = plan.arguments;
  const RaggedAttentionParams& params = arguments.params;
  const auto blocks = static_cast<unsigned>(params.batch * params.num_kv_heads * arguments.rows);
  if (!is_coded(params)) {
    run_dense<T>(arguments, stream);
    MOEKV_LAUNCH((ragged_attention_merge_kernel<T, false>), blocks, kThreads, 0, stream, arguments,
                 plan.tail);
  } else if constexpr (!std::is_same_v<T, float>) {
    attend_coded(arguments, stream);
    if (plan.tail.params.num_tail > 0) run_dense<T>(plan.tail, stream);
    MOEKV_LAUNCH((ragged_attention_merge_kernel<T, true>), blocks, kThreads, 0, stream, arguments,
                 plan.tail);
  }
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
  if (is_coded(params) && params.dtype == DType::kFloat) {
    throw std::runtime_error(
        "moekv::ragged_attention: expected a query of float16 or bfloat16 with quantised pairs on "
        "CUDA, got float32; backend=\"torch\" serves it");
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

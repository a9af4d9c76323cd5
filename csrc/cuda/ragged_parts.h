// What the kernels of ragged_attention work on: the chunks of the heads' rows, and where keys,
// values and queries lie.
#pragma once

#include "../backend.h"
#include "block.h"
#include "device.h"
#include "logit.h"

namespace moekv::cuda::ragged {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kMaxDim = 256;

// Keys or values, stored and behind them.
struct Plane {
  const void *stored, *tail;
  int64_t stride, tail_stride[3];
};

struct Arguments {
  RaggedAttentionParams params;
  Plane keys, values;
  Logit logit;        // of what the products of queries and keys are here
  float extent_unit;  // what makes largest logits such as all chunks have them
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
  // The same as a byte that is 0 where nothing is seen, also of stored rows, which come before the
  // tail. To be read ahead: who asks it at once waits for it.
  __device__ __forceinline__ uint8_t mark(int tail) const {
    if (tail < 0) return 1;
    if (tail > last) return 0;
    return mask ? reinterpret_cast<const uint8_t*>(mask)[tail * stride] : uint8_t{1};
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

// An offset of -inf hides a logit, NaN too.
__device__ __forceinline__ float offset_by(float logit, float offset) {
  return offset == -INFINITY ? -INFINITY : logit + offset;
}

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
  __device__ __forceinline__ PairRows<T> pairs(const Arguments& arguments,
                                               const Plane& plane) const {
    return {static_cast<const T*>(plane.stored) + rows.begin * plane.stride,
            static_cast<const T*>(plane.tail) + batch * plane.tail_stride[0] +
                head * plane.tail_stride[1],
            plane.stride,
            plane.tail_stride[2],
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
  // What a row adds to its logits, in their units before they are scaled.
  __device__ __forceinline__ float offset(const RaggedAttentionParams& params, const Logit& logit,
                                          int row) const {
    if (!params.bias || row >= min(end, rows.num_stored)) return 0.0f;
    return logit.unscaled_offset(half_of(__ldg(params.bias + rows.begin + row)));
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

}  // namespace moekv::cuda::ragged

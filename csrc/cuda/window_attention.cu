// Mean attention that the window queries pay to each key, in two passes over the keys.
//
// The G * W queries of a KV head are the rows of one matrix. The first pass holds rows of queries
// and streams the keys past them: the log-sum-exp of every row. The second holds keys and streams
// the queries: the column sums of the softmax. What is held sits in registers, as fragments of
// m16n8k16; what is streamed goes through shared memory, double buffered. In both passes a thread
// reduces along the streamed side, so it needs no other thread until the end.
//
// Where the second pass holds 16-bit keys, it also gives their cosines with a direction.
//
// fp32 inputs stay fp32: the same tiles, multiplied with FMAs out of shared memory.
#include <algorithm>

#include "expert_scores.h"
#include "logit.h"
#include "rows.h"
#include "tiles.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kTargetBlocks = 2048;  // of 64 rows; an SM runs a few at a time
constexpr int64_t kMinKeysPerSplit = 256;

struct Arguments {
  ExpertScoresParams params;
  // Both hold the maximum of a row's logits before they are scaled, and apart from it, so that
  // large logits do not swallow it, what is left.
  float2* partial;  // [B * H, splits, rows]: sum of 2^(scale * (logit - maximum))
  float2* lse;      // [B * H, rows]: its log2 over all splits, +inf for padding
  float* mass;      // [B, H, T]
  KeyCosines cosines;
  int rows;  // G * W
  int row_tiles, key_tiles;
  int splits, keys_per_split;
  bool vectorized_keys, vectorized_queries;  // may be read 16 bytes at a time
};

// Rows of keys; null where there is nothing to read.
template <typename T>
struct KeyRows {
  const T* base;
  int64_t stride;
  int first, end;
  bool vectorized;

  __device__ __forceinline__ const T* operator()(int key) const {
    return key >= first && key < end ? base + key * stride : nullptr;
  }
};

// Rows of queries of a KV head: its query heads one after another.
template <typename T>
struct QueryRows {
  const T* base;
  int64_t head_stride, stride;
  int num_queries, rows;
  int first;  // the first query that is not padding
  bool vectorized;

  __device__ __forceinline__ const T* operator()(int row) const {
    const int head = row / num_queries, query = row % num_queries;
    return row < rows && query >= first ? base + head * head_stride + query * stride : nullptr;
  }
};

// What a block works on.
struct Head {
  int64_t batch, head;
  int num_keys, num_queries, dim;
  int first_key;    // the first that is not padding
  int first_query;  // of the window: query 0 stands at this position

  __device__ __forceinline__ Head(const ExpertScoresParams& params, int64_t index)
      : batch(index / params.num_kv_heads),
        head(index % params.num_kv_heads),
        num_keys(static_cast<int>(params.num_keys)),
        num_queries(static_cast<int>(params.num_queries)),
        dim(static_cast<int>(params.key_dim)),
        first_key(first_real_key(params, batch)),
        first_query(num_keys - num_queries) {}

  __device__ __forceinline__ int first_real_query() const {
    return max(first_key - first_query, 0);
  }
  template <typename T>
  __device__ __forceinline__ KeyRows<T> keys(const Arguments& arguments, int end) const {
    const ExpertScoresParams& params = arguments.params;
    return {static_cast<const T*>(params.keys) + batch * params.key_stride[0] +
                head * params.key_stride[1],
            params.key_stride[2], first_key, end, arguments.vectorized_keys};
  }
  template <typename T>
  __device__ __forceinline__ QueryRows<T> queries(const Arguments& arguments) const {
    const ExpertScoresParams& params = arguments.params;
    const int64_t group = params.num_query_heads / params.num_kv_heads;
    return {static_cast<const T*>(params.queries) + batch * params.query_stride[0] +
                head * group * params.query_stride[1],
            params.query_stride[1],
            params.query_stride[2],
            num_queries,
            arguments.rows,
            first_real_query(),
            arguments.vectorized_queries};
  }
};

// A warp's rows that stay, and their products with rows that stream by. Lane l = 4g + t has, like
// in the accumulators of m16n8k16, rows 16i + g and 16i + g + 8 and columns 8j + 2t, 8j + 2t + 1.
template <typename T, int kChunks>
struct Held {
  static constexpr int kRowTiles = kChunks <= 4 ? 2 : 1;
  static constexpr int kColumnTiles = 4;
  static constexpr int kStreamed = 64;  // rows of a streamed tile
  static constexpr bool kInShared = false;

  uint4 fragments[kRowTiles][2][kChunks];

  template <typename Rows>
  __device__ __forceinline__ void load(const Rows& rows, int first, int dim, char*) {
    load_fragments(rows, first, dim, fragments);
  }

  // The rows' dot products with a vector of fp32, and with themselves.
  __device__ __forceinline__ void multiply_with(const float* vector, int dim,
                                                float (&product)[kRowTiles][2],
                                                float (&square)[kRowTiles][2]) const {
    const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) product[i / 2][i % 2] = square[i / 2][i % 2] = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int channel = chunk * 32 + t * 8;
      float factors[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) factors[c] = channel + c < dim ? __ldg(vector + channel + c) : 0;
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        T elements[8];
        memcpy(elements, &fragments[i / 2][i % 2][chunk], sizeof elements);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const float x = to_float(elements[c]);
          product[i / 2][i % 2] = fmaf(x, factors[c], product[i / 2][i % 2]);
          square[i / 2][i % 2] = fmaf(x, x, square[i / 2][i % 2]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      product[i / 2][i % 2] = sum_over_lanes(product[i / 2][i % 2], 4);
      square[i / 2][i % 2] = sum_over_lanes(square[i / 2][i % 2], 4);
    }
  }

  __device__ __forceinline__ void multiply(const char* tile, int dim,
                                           float (&product)[kRowTiles][kColumnTiles][4]) const {
    multiply_tile<T>(fragments, tile, dim, product);
  }
};

template <int kChunks>
struct Held<float, kChunks> {
  static constexpr int kRowTiles = 1;
  static constexpr int kColumnTiles = 2;
  static constexpr int kStreamed = 16;
  static constexpr bool kInShared = true;

  const char* tile_of_warp;

  template <typename Rows>
  __device__ __forceinline__ void load(const Rows& rows, int first, int dim, char* shared) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    // They travel with the first tile that streams by.
    copy_tile<kThreads, float>(shared, tile_stride<float>(dim), rows, first - 16 * warp,
                               16 * kWarps, dim);
    tile_of_warp = shared + 16 * warp * tile_stride<float>(dim);
  }

  __device__ __forceinline__ void multiply(const char* tile, int dim,
                                           float (&product)[kRowTiles][kColumnTiles][4]) const {
    const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
    const int t = static_cast<int>(threadIdx.x) % 4;
    const int stride = tile_stride<float>(dim);
    const auto load = [&](const char* base, int row, int piece) {
      return *reinterpret_cast<const float4*>(base + row * stride + piece * 16);
    };
    const auto add_dot = [](float& sum, float4 a, float4 b) {
      sum = fmaf(a.x, b.x, sum);
      sum = fmaf(a.y, b.y, sum);
      sum = fmaf(a.z, b.z, sum);
      sum = fmaf(a.w, b.w, sum);
    };
    for (int piece = 0; piece < ceil_div(dim, 4); ++piece) {
      const float4 low = load(tile_of_warp, g, piece), high = load(tile_of_warp, g + 8, piece);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const float4 left = load(tile, 8 * j + 2 * t, piece);
        const float4 right = load(tile, 8 * j + 2 * t + 1, piece);
        add_dot(product[0][j][0], low, left);
        add_dot(product[0][j][1], low, right);
        add_dot(product[0][j][2], high, left);
        add_dot(product[0][j][3], high, right);
      }
    }
  }
};

// Bytes of shared memory: the held rows of fp32, and two streamed tiles with four words a row.
template <typename T, int kChunks>
constexpr int shared_bytes(int dim) {
  using H = Held<T, kChunks>;
  return (H::kInShared ? 16 * kWarps : 0) * tile_stride<T>(dim) +
         2 * H::kStreamed * (tile_stride<T>(dim) + 16);
}

// Holds this warp's rows from `first_held` on, calls inspect(held), and streams rows [begin, end)
// past them. For every 32 (fp32: 16) of those calls reduce(product, row, words): the products with
// the rows from `row` on, and the words that prepare(row) gave for them.
template <typename T, int kChunks, typename HeldRows, typename Inspect, typename StreamedRows,
          typename Prepare, typename Reduce>
__device__ __forceinline__ void stream_past(const HeldRows& held_rows, int first_held,
                                            const Inspect& inspect,
                                            const StreamedRows& streamed_rows, int begin, int end,
                                            int dim, const Prepare& prepare, const Reduce& reduce) {
  using H = Held<T, kChunks>;
  constexpr int kColumns = 8 * H::kColumnTiles;
  MOEKV_SHARED_MEMORY(char, shared);
  const int stride = tile_stride<T>(dim);
  char* tiles = shared + (H::kInShared ? 16 * kWarps * stride : 0);
  uint4* words = reinterpret_cast<uint4*>(tiles + 2 * H::kStreamed * stride);

  H held;
  held.load(held_rows, first_held, dim, shared);
  const auto copy = [&](int row, int stage) {
    if (row < end) {
      copy_tile<kThreads, T>(tiles + stage * H::kStreamed * stride, stride, streamed_rows, row,
                             H::kStreamed, dim);
      const int i = static_cast<int>(threadIdx.x);
      if (i < H::kStreamed) words[stage * H::kStreamed + i] = prepare(row + i);
    }
    copy_async_commit();
  };
  copy(begin, 0);
  inspect(held);
  for (int row = begin, stage = 0; row < end; row += H::kStreamed, stage ^= 1) {
    copy(row + H::kStreamed, stage ^ 1);
    copy_async_wait<1>();
    __syncthreads();
    for (int column = 0; column < H::kStreamed; column += kColumns) {
      const int offset = stage * H::kStreamed + column;
      float product[H::kRowTiles][H::kColumnTiles][4] = {};
      held.multiply(tiles + offset * stride, dim, product);
      reduce(product, row + column, words + offset);
    }
    __syncthreads();
  }
}

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads, 3) attention_rows_kernel(Arguments arguments) {
  using H = Held<T, kChunks>;
  const ExpertScoresParams& params = arguments.params;
  const int64_t index = blockIdx.x / arguments.row_tiles;
  const Head head(params, index);
  const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int warp_row = (static_cast<int>(blockIdx.x) % arguments.row_tiles * kWarps +
                        static_cast<int>(threadIdx.x) / kWarpSize) *
                       16 * H::kRowTiles;
  const int split_begin = static_cast<int>(blockIdx.y) * arguments.keys_per_split;
  const int end = min(split_begin + arguments.keys_per_split, head.num_keys);
  const int begin = max(split_begin, head.first_key);
  const Logit logit(params.scaling, params.softcap);

  int last_key[H::kRowTiles][2];  // that the row sees
  float peak[H::kRowTiles][2], total[H::kRowTiles][2];
#pragma unroll
  for (int i = 0; i < H::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * i + 8 * half + g;
      last_key[i][half] = min(end - 1, head.first_query + row % head.num_queries);
      peak[i][half] = -INFINITY;
      total[i][half] = 0.0f;
    }
  }

  const auto prepare = [](int) { return make_uint4(0, 0, 0, 0); };
  const auto reduce = [&](float (&product)[H::kRowTiles][H::kColumnTiles][4], int key,
                          const uint4*) {
    cap_products(product, logit);
    if (key + 8 * H::kColumnTiles > min(end, head.first_query + 1)) {  // not every row sees all
#pragma unroll
      for (int i = 0; i < H::kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4 * H::kColumnTiles; ++j) {
          const int column = key + j / 4 * 8 + 2 * t + j % 2;
          if (column > last_key[i][j % 4 / 2]) product[i][j / 4][j % 4] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < H::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = -INFINITY;
#pragma unroll
        for (int j = 0; j < 2 * H::kColumnTiles; ++j) {
          highest = fmaxf(highest, product[i][j / 2][2 * half + j % 2]);
        }
        highest = fmaxf(peak[i][half], highest);
        const float shift = shift_of(highest);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 2 * H::kColumnTiles; ++j) {
          sum += exp2_fast((product[i][j / 2][2 * half + j % 2] - shift) * logit.scale);
        }
        const float factor = exp2_fast((peak[i][half] - shift) * logit.scale);
        total[i][half] = fmaf(total[i][half], factor, sum);
        peak[i][half] = highest;
      }
    }
  };
  const auto inspect = [](const H&) {};
  stream_past<T, kChunks>(head.queries<T>(arguments), warp_row, inspect,
                          head.keys<T>(arguments, end), begin, end, head.dim, prepare, reduce);

#pragma unroll
  for (int i = 0; i < H::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * i + 8 * half + g;
      float highest = peak[i][half];
      highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 2));
      const float shift = shift_of(highest);
      float sum = total[i][half] * exp2_fast((peak[i][half] - shift) * logit.scale);
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      if (t == 0 && row < arguments.rows) {
        arguments.partial[(index * arguments.splits + blockIdx.y) * arguments.rows + row] = {
            highest, sum};
      }
    }
  }
}

// One thread per row.
__global__ void __launch_bounds__(kThreads) attention_lse_kernel(Arguments arguments) {
  const ExpertScoresParams& params = arguments.params;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.batch * params.num_kv_heads * arguments.rows) return;
  const int64_t index = i / arguments.rows;
  const int row = static_cast<int>(i % arguments.rows);
  const Head head(params, index);
  const float2* partial = arguments.partial + index * arguments.splits * arguments.rows + row;
  const float scale = Logit(params.scaling, params.softcap).scale;
  float highest = -INFINITY, total = 0.0f;
  for (int split = 0; split < arguments.splits; ++split) {
    highest = fmaxf(highest, partial[static_cast<int64_t>(split) * arguments.rows].x);
  }
  const float shift = shift_of(highest);
  for (int split = 0; split < arguments.splits; ++split) {
    const float2 part = partial[static_cast<int64_t>(split) * arguments.rows];
    total += part.y * exp2_fast((part.x - shift) * scale);
  }
  const bool real = row % head.num_queries >= head.first_real_query();
  arguments.lse[i] = {shift, real ? log2f(total) : INFINITY};
}

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads, 3) attention_columns_kernel(Arguments arguments) {
  using H = Held<T, kChunks>;
  constexpr int kKeys = kWarps * 16 * H::kRowTiles;
  const ExpertScoresParams& params = arguments.params;
  const int64_t index = blockIdx.x / arguments.key_tiles;
  const Head head(params, index);
  const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int block_key = static_cast<int>(blockIdx.x) % arguments.key_tiles * kKeys;
  const int warp_key = block_key + static_cast<int>(threadIdx.x) / kWarpSize * 16 * H::kRowTiles;
  const bool all_visible = block_key + kKeys <= head.first_query + 1;
  const bool all_padding = block_key + kKeys <= head.first_key;
  const float2* lse = arguments.lse + index * arguments.rows;
  const Logit logit(params.scaling, params.softcap);

  float* const cosines =
      arguments.cosines.scores ? arguments.cosines.scores + index * params.num_keys : nullptr;
  const auto inspect = [&](const H& held) {
    if constexpr (!H::kInShared) {
      if (!cosines) return;
      float product[H::kRowTiles][2], square[H::kRowTiles][2];
      held.multiply_with(arguments.cosines.mean + index * head.dim, head.dim, product, square);
#pragma unroll
      for (int i = 0; i < H::kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = warp_key + 16 * i + 8 * half + g;
          if (t == 0 && key >= head.first_key && key < head.num_keys) {
            cosines[key] = -product[i][half] / fmaxf(sqrtf(square[i][half]), kLeastNorm);
          }
        }
      }
    }
  };

  float sums[H::kRowTiles][2] = {};
  // Of a query: its largest logit, what follows of its log-sum-exp, and the last key that it sees.
  const auto prepare = [&](int row) {
    const float2 value = row < arguments.rows ? lse[row] : make_float2(0.0f, INFINITY);
    return make_uint4(__float_as_uint(value.x), __float_as_uint(value.y),
                      static_cast<unsigned>(head.first_query + row % head.num_queries), 0);
  };
  const auto reduce = [&](float (&product)[H::kRowTiles][H::kColumnTiles][4], int,
                          const uint4* words) {
    cap_products(product, logit);
#pragma unroll
    for (int j = 0; j < 2 * H::kColumnTiles; ++j) {
      const uint4 query = words[j / 2 * 8 + 2 * t + j % 2];
      const float peak = __uint_as_float(query.x), rest = __uint_as_float(query.y);
#pragma unroll
      for (int i = 0; i < H::kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = product[i][j / 2][2 * half + j % 2];
          const int key = warp_key + 16 * i + 8 * half + g;
          if (!all_visible && key > static_cast<int>(query.z)) x = -INFINITY;
          sums[i][half] += exp2_fast(fmaf(x - peak, logit.scale, -rest));
        }
      }
    }
  };
  if (!all_padding) {
    stream_past<T, kChunks>(head.keys<T>(arguments, head.num_keys), warp_key, inspect,
                            head.queries<T>(arguments), 0, arguments.rows, head.dim, prepare,
                            reduce);
  }

  const int64_t group = params.num_query_heads / params.num_kv_heads;
  const int real_queries = head.num_queries - head.first_real_query();
  const float share = 1.0f / static_cast<float>(group * max(real_queries, 1));
#pragma unroll
  for (int i = 0; i < H::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = warp_key + 16 * i + 8 * half + g;
      float sum = sums[i][half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      if (t == 0 && key < head.num_keys) {
        arguments.mass[index * params.num_keys + key] = key < head.first_key ? 0.0f : sum * share;
        if (cosines && key < head.first_key) cosines[key] = -INFINITY;
      }
    }
  }
}

struct Plan {
  Arguments arguments;
  size_t workspace_bytes;
};

// `rows_per_block`: how many rows a block of the kernels holds.
Plan plan(const ExpertScoresParams& params, void* workspace, int rows_per_block) {
  const int64_t heads = params.batch * params.num_kv_heads;
  const int64_t rows = params.num_query_heads / params.num_kv_heads * params.num_queries;
  const int64_t wanted_splits =
      ceil_div(kTargetBlocks, std::max<int64_t>(1, heads * ceil_div<int64_t>(rows, 64)));
  const int64_t keys_per_split = std::max(
      kMinKeysPerSplit, ceil_div(ceil_div(params.num_keys, wanted_splits), int64_t{64}) * 64);
  const int64_t splits = ceil_div(params.num_keys, keys_per_split);

  const size_t partial_bytes = static_cast<size_t>(heads * splits * rows) * sizeof(float2);
  auto* const base = static_cast<char*>(workspace);
  return {
      .arguments =
          {
              .params = params,
              .partial = reinterpret_cast<float2*>(base),
              .lse = reinterpret_cast<float2*>(base + partial_bytes),
              .mass = nullptr,
              .cosines = {},
              .rows = static_cast<int>(rows),
              .row_tiles = static_cast<int>(ceil_div<int64_t>(rows, rows_per_block)),
              .key_tiles = static_cast<int>(ceil_div<int64_t>(params.num_keys, rows_per_block)),
              .splits = static_cast<int>(splits),
              .keys_per_split = static_cast<int>(keys_per_split),
              .vectorized_keys =
                  is_vectorized(params.keys, params.key_stride, params.key_dim, params.dtype),
              .vectorized_queries =
                  is_vectorized(params.queries, params.query_stride, params.key_dim, params.dtype),
          },
      .workspace_bytes = partial_bytes + static_cast<size_t>(heads * rows) * sizeof(float2),
  };
}

template <typename T, int kChunks>
constexpr int kRowsPerBlock = kWarps * 16 * Held<T, kChunks>::kRowTiles;

template <typename T, int kChunks>
void run(const ExpertScoresParams& params, void* workspace, float* mass, const KeyCosines& cosines,
         Stream stream) {
  Arguments arguments = plan(params, workspace, kRowsPerBlock<T, kChunks>).arguments;
  arguments.mass = mass;
  arguments.cosines = cosines;
  const auto heads = static_cast<unsigned>(params.batch * params.num_kv_heads);
  const auto bytes =
      static_cast<size_t>(shared_bytes<T, kChunks>(static_cast<int>(params.key_dim)));
  MOEKV_LAUNCH((attention_rows_kernel<T, kChunks>),
               dim3(heads * arguments.row_tiles, arguments.splits), kThreads, bytes, stream,
               arguments);
  MOEKV_LAUNCH(attention_lse_kernel,
               ceil_div<unsigned>(heads * static_cast<unsigned>(arguments.rows), kThreads),
               kThreads, 0, stream, arguments);
  MOEKV_LAUNCH((attention_columns_kernel<T, kChunks>), heads * arguments.key_tiles, kThreads, bytes,
               stream, arguments);
}

template <typename T>
void run(const ExpertScoresParams& params, void* workspace, float* mass, const KeyCosines& cosines,
         Stream stream) {
  if (params.key_dim <= 128) return run<T, 4>(params, workspace, mass, cosines, stream);
  return run<T, 8>(params, workspace, mass, cosines, stream);
}

}  // namespace

size_t window_attention_workspace_bytes(const ExpertScoresParams& params) {
  return plan(params, nullptr, kWarps * 16).workspace_bytes;  // whatever a block holds
}

bool window_attention_has_cosines(const ExpertScoresParams& params) {
  return params.dtype != DType::kFloat;
}

void window_attention(const ExpertScoresParams& params, void* workspace, float* mass,
                      const KeyCosines& cosines, Stream stream) {
  switch (params.dtype) {
    case DType::kFloat:
      return run<float, 0>(params, workspace, mass, cosines, stream);
    case DType::kHalf:
      return run<__half>(params, workspace, mass, cosines, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(params, workspace, mass, cosines, stream);
  }
}

}  // namespace moekv::cuda

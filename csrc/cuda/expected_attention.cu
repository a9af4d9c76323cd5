// The attention that pairs can expect: what the query of each token pays to the pair of its own
// token and to the kReach behind it, in a softmax whose sum a sample of all keys stands for.
//
// A block has kQueries positions of a KV head, a warp 16 of them, for each query head of the group
// in turn. The queries' products with the sampled keys, which lie in shared memory, and with the 24
// keys from the warp's first position on come out of m16n8k16 (fp32: out of FMAs) in the same
// fragments: a thread has two queries, and a quarter of the columns of each. Squares of the shares
// are summed up in shared memory, each by one thread; each pair then collects its own. Queries that
// look at a block's first pairs are computed twice, so that blocks share nothing.
#include <stdexcept>

#include "../backend.h"
#include "../sample_places.h"
#include "logit.h"
#include "rows.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 192;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kQueries = 16 * kWarps;
constexpr int kPairs = kQueries - kReach;  // of a block
constexpr int kSampleTiles = kPlaces / 8;
constexpr int kBandTiles = 3;  // of 8 keys: 16 + kReach of them
constexpr int kTiles = kSampleTiles + kBandTiles;
constexpr float kLeastSquare = 1e-36f;  // its root is a normal number
static_assert(kPlaces % 8 == 0 && 16 + kReach <= 8 * kBandTiles);

struct Arguments {
  ExpectedAttentionParams params;
  bool vectorized;  // queries and keys may be read 16 bytes at a time
};

// Rows of the queries of a head, or of its keys, counted from the first real one. Positions that
// are not there get the first or last row: what comes of them is left out later, and no load has to
// ask.
template <typename T>
struct RealRows {
  const T* base;
  int64_t stride;
  int length;

  __device__ __forceinline__ const T* operator()(int position) const {
    return base + min(max(position, 0), length - 1) * stride;
  }
};

// Products of a warp's 16 queries with the sample and the band: lane l = 4g + t has rows g and g +
// 8 and columns 8j + 2t, 8j + 2t + 1.
template <typename T>
__device__ __forceinline__ void multiply(const Arguments& arguments, const RealRows<T>& queries,
                                         const RealRows<T>& keys, const char* sample, int first,
                                         float (&product)[kTiles][4]) {
  const int dim = static_cast<int>(arguments.params.head_dim);
  const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int stride = tile_stride<T>(dim);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) product[j][i] = 0.0f;
  }
  if constexpr (sizeof(T) == 2) {
    const T* const rows[2 + kBandTiles] = {queries(first + g), queries(first + g + 8),
                                           keys(first + g), keys(first + g + 8),
                                           keys(first + g + 16)};
    for (int channel = 8 * t; channel < ceil_div(dim, 32) * 32; channel += 32) {
      uint4 x[2 + kBandTiles];
      load_16_bytes(rows, channel, dim, arguments.vectorized, x);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint4 b =
            j < kSampleTiles
                ? *reinterpret_cast<const uint4*>(sample + (8 * j + g) * stride + channel * 2)
                : x[2 + max(j - kSampleTiles, 0)];
        mma_m16n8k16<T>(product[j], {x[0].x, x[1].x, x[0].y, x[1].y}, {b.x, b.y});
        mma_m16n8k16<T>(product[j], {x[0].z, x[1].z, x[0].w, x[1].w}, {b.z, b.w});
      }
    }
  } else {
    const T* rows[2 + 2 * kBandTiles] = {queries(first + g), queries(first + g + 8)};
#pragma unroll
    for (int j = 0; j < kBandTiles; ++j) {
      rows[2 + 2 * j] = keys(first + 8 * j + 2 * t);
      rows[3 + 2 * j] = keys(first + 8 * j + 2 * t + 1);
    }
    const auto add = [](float& sum, const uint4& a, const uint4& b) {
      float x[4], y[4];
      unpack<float>(a, x);
      unpack<float>(b, y);
      sum = dot(x, y, sum);
    };
    for (int channel = 0; channel < dim; channel += 4) {
      uint4 x[2 + 2 * kBandTiles];
      load_16_bytes(rows, channel, dim, arguments.vectorized, x);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 b = j < kSampleTiles
                              ? *reinterpret_cast<const uint4*>(
                                    sample + (8 * j + 2 * t + i) * stride + channel * 4)
                              : x[2 + max(2 * (j - kSampleTiles), 0) + i];
          add(product[j][i], x[0], b);
          add(product[j][2 + i], x[1], b);
        }
      }
    }
  }
}

// Value of the four lanes that share rows.
template <typename Combine>
__device__ __forceinline__ float quad_reduce(float value, const Combine& combine) {
  value = combine(value, __shfl_xor_sync(kFullWarp, value, 1));
  return combine(value, __shfl_xor_sync(kFullWarp, value, 2));
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) expected_attention_kernel(Arguments arguments) {
  const ExpectedAttentionParams& params = arguments.params;
  MOEKV_SHARED_MEMORY(char, sample);
  MOEKV_SHARED(float, weights, kPlaces);
  MOEKV_SHARED(float, squares, (kReach + 1) * kQueries);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int num_keys = static_cast<int>(params.num_keys), dim = static_cast<int>(params.head_dim);
  const int group = static_cast<int>(params.num_query_heads / params.num_kv_heads);
  const int chunks = ceil_div(num_keys, kPairs);
  const int begin = static_cast<int>(blockIdx.x) % chunks * kPairs;
  const int64_t row = static_cast<int>(blockIdx.x) / chunks;
  const Logit logit(params.scaling, params.softcap);

  const int64_t batch = row / params.num_kv_heads, head = row % params.num_kv_heads;
  const int start = params.start ? min(max(__ldg(params.start + batch), 0), num_keys) : 0;
  const int length = num_keys - start;
  float* scores = params.scores + row * params.num_keys;
  for (int i = begin + thread; i < min(begin + kPairs, start); i += kThreads) scores[i] = 0.0f;
  if (begin >= length) return;

  const RealRows<T> keys{static_cast<const T*>(params.keys) + batch * params.key_stride[0] +
                             head * params.key_stride[1] + start * params.key_stride[2],
                         params.key_stride[2], length};
  const int pieces = tile_stride<T>(dim) / 16;  // of a row
  for (int i = thread; i < kPlaces * pieces; i += kThreads) {
    const T* key = keys(static_cast<int>(sample_place(i / pieces, length)));
    *reinterpret_cast<uint4*>(sample + i * 16) =
        load_16_bytes(key, i % pieces * kPackSize<T>, dim, arguments.vectorized);
  }
  for (int i = thread; i < kPlaces; i += kThreads) weights[i] = sample_weight(i, length);
  for (int i = thread; i < (kReach + 1) * kQueries; i += kThreads) squares[i] = 0.0f;
  __syncthreads();

  const int first = begin - kReach + 16 * warp;  // the warp's first query
  RealRows<T> queries{static_cast<const T*>(params.queries) + batch * params.query_stride[0] +
                          head * group * params.query_stride[1] + start * params.query_stride[2],
                      params.query_stride[2], length};
  for (int g = 0; g < group && first < length; ++g, queries.base += params.query_stride[1]) {
    float product[kTiles][4];
    multiply(arguments, queries, keys, sample, first, product);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = 16 * warp + lane / 4 + 8 * half;
      const int query = begin - kReach + local;
      float highest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = product[j][2 * half + i];
          x = logit.unscaled(x);
          const int step = 8 * (j - kSampleTiles) + 2 * (lane % 4) + i - local % 16;
          const bool near = step >= 0 && step <= kReach && query + step < length;
          if (j >= kSampleTiles && !near) x = -INFINITY;
          highest = fmaxf(highest, x);
        }
      }
      highest = quad_reduce(highest, [](float a, float b) { return fmaxf(a, b); });
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = product[j][2 * half + i];
          x = logit.weight(x, highest);
          if (j < kSampleTiles) {
            total = fmaf(weights[8 * j + 2 * (lane % 4) + i], x, total);
          } else if (length > kPlaces) {  // the sample may have missed just those
            total += x;
          }
        }
      }
      total = quad_reduce(total, [](float a, float b) { return a + b; });
#pragma unroll
      for (int j = kSampleTiles; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int step = 8 * (j - kSampleTiles) + 2 * (lane % 4) + i - local % 16;
          if (query < 0 || step < 0 || step > kReach || query + step >= length) continue;
          const float share = product[j][2 * half + i] / total;
          squares[step * kQueries + local] += share * share;
        }
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < min(kPairs, length - begin); i += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int step = 0; step <= kReach; ++step) {
      sum += squares[step * kQueries + i + kReach - step];
    }
    const float mean = sum / static_cast<float>(group);
    scores[start + begin + i] = 0.5f * logf(mean < kLeastSquare ? kLeastSquare : mean);
  }
}

template <typename T>
void run(const Arguments& arguments, Stream stream) {
  const ExpectedAttentionParams& params = arguments.params;
  const int64_t rows = params.batch * params.num_kv_heads;
  const auto blocks = static_cast<unsigned>(rows * ceil_div<int64_t>(params.num_keys, kPairs));
  const size_t shared = kPlaces * tile_stride<T>(static_cast<int>(params.head_dim));
  MOEKV_LAUNCH(expected_attention_kernel<T>, blocks, kThreads, shared, stream, arguments);
}

}  // namespace

size_t expected_attention_workspace_bytes(const ExpectedAttentionParams&) { return 0; }

void expected_attention(const ExpectedAttentionParams& params, Stream stream) {
  check_device("expected_attention");
  if (params.cos) {
    throw std::runtime_error(
        "moekv::expected_attention: expected rotated queries on CUDA, got cos and sin");
  }
  const Arguments arguments{
      .params = params,
      .vectorized =
          is_vectorized(params.queries, params.query_stride, params.head_dim, params.dtype) &&
          is_vectorized(params.keys, params.key_stride, params.head_dim, params.dtype),
  };
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

// Minus the cosine of each key with the mean direction of its row's keys: two reads of the keys.
#include <algorithm>

#include "expert_scores.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMeanThreads = 1024;
constexpr int kMaxChannels = 256;
constexpr int kBatch = 4;  // keys that a thread loads before it uses them
constexpr int64_t kMinKeysPerBlock = 128;
constexpr int64_t kMaxBlocks = 2048;
constexpr float kLeastNorm = 1e-12f;

struct Arguments {
  ExpertScoresParams params;
  Rows keys;
  float* partial;  // [B * H, blocks, D]: sums of directions
  float* mean;     // [B * H, D]: their direction
  float* scores;   // [B, H, T]
  int blocks, keys_per_block;
};

// What a block works on: a run of keys of one (b, h), and this thread's part of it.
struct Run {
  int64_t index;
  int block, first_real, begin, end, slot, num_slots, first_channel;

  __device__ __forceinline__ explicit Run(const Arguments& arguments)
      : index(blockIdx.x / arguments.blocks),
        block(static_cast<int>(blockIdx.x) % arguments.blocks),
        first_real(first_real_key(arguments.params, index / arguments.params.num_kv_heads)),
        begin(block * arguments.keys_per_block),
        end(min(begin + arguments.keys_per_block, static_cast<int>(arguments.params.num_keys))),
        slot(static_cast<int>(threadIdx.x) / arguments.keys.lanes),
        num_slots(kThreads / arguments.keys.lanes),
        first_channel(static_cast<int>(threadIdx.x) % arguments.keys.lanes * kChannelsPerLane) {}

  // Calls use(key, x, inverse_norm) with the lane's channels of each of the slot's real keys. All
  // threads of the block make the same number of calls; key >= end: x is zero.
  template <typename T, typename Use>
  __device__ __forceinline__ void for_each_key(const Arguments& arguments, const Use& use) const {
    const Rows& keys = arguments.keys;
    const T* base = static_cast<const T*>(keys.data) +
                    index / arguments.params.num_kv_heads * keys.stride[0] +
                    index % arguments.params.num_kv_heads * keys.stride[1];
    for (int first = max(begin, first_real); first < end; first += kBatch * num_slots) {
      float x[kBatch][kChannelsPerLane] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int key = first + i * num_slots + slot;
        if (key < end) load_channels(base + key * keys.stride[2], first_channel, keys, x[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float square = 0.0f;
#pragma unroll
        for (int j = 0; j < kChannelsPerLane; ++j) square = fmaf(x[i][j], x[i][j], square);
        const float norm = sqrtf(sum_over_lanes(square, keys.lanes));
        use(first + i * num_slots + slot, x[i], 1.0f / fmaxf(norm, kLeastNorm));
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) key_diversity_sum_kernel(Arguments arguments) {
  const Run run(arguments);
  float sum[kChannelsPerLane] = {};
  run.for_each_key<T>(arguments, [&](int, const float (&x)[kChannelsPerLane], float inverse_norm) {
#pragma unroll
    for (int j = 0; j < kChannelsPerLane; ++j) sum[j] = fmaf(x[j], inverse_norm, sum[j]);
  });

  MOEKV_SHARED(float, sums, kThreads* kChannelsPerLane);  // [slots, channels]
#pragma unroll
  for (int j = 0; j < kChannelsPerLane; ++j) {
    sums[threadIdx.x * kChannelsPerLane + j] = sum[j];
  }
  __syncthreads();
  const int channel = static_cast<int>(threadIdx.x);
  const int channels = arguments.keys.lanes * kChannelsPerLane;
  if (channel < arguments.keys.dim) {
    float total = 0.0f;
    for (int slot = 0; slot < run.num_slots; ++slot) total += sums[slot * channels + channel];
    arguments.partial[(run.index * arguments.blocks + run.block) * arguments.keys.dim + channel] =
        total;
  }
}

// One block per (b, h): the direction of the mean.
__global__ void __launch_bounds__(kMeanThreads) key_diversity_mean_kernel(Arguments arguments) {
  MOEKV_SHARED(float, sums, kMeanThreads);  // [parts, channels]
  MOEKV_SHARED(float, squares, kMaxChannels);
  const int64_t index = blockIdx.x;
  const int dim = arguments.keys.dim;
  const int channels = arguments.keys.lanes * kChannelsPerLane;
  const int parts = kMeanThreads / channels;
  const int thread = static_cast<int>(threadIdx.x);
  const int channel = thread % channels;
  float sum = 0.0f;
  if (channel < dim) {
    for (int block = thread / channels; block < arguments.blocks; block += parts) {
      sum += arguments.partial[(index * arguments.blocks + block) * dim + channel];
    }
  }
  sums[thread] = sum;
  __syncthreads();
  const int64_t batch = index / arguments.params.num_kv_heads;
  const int num_keys = static_cast<int>(arguments.params.num_keys);
  const int count = max(num_keys - first_real_key(arguments.params, batch), 1);
  float mean = 0.0f;
  if (thread < channels) {
    for (int part = 0; part < parts; ++part) mean += sums[part * channels + channel];
    mean /= static_cast<float>(count);
    squares[thread] = mean * mean;
  }
  __syncthreads();
  if (thread < dim) {
    float square = 0.0f;
    for (int i = 0; i < dim; ++i) square += squares[i];
    arguments.mean[index * dim + thread] = mean / fmaxf(sqrtf(square), kLeastNorm);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) key_diversity_cosine_kernel(Arguments arguments) {
  const Run run(arguments);
  float* scores = arguments.scores + run.index * arguments.params.num_keys;
  for (int key = run.begin + static_cast<int>(threadIdx.x); key < min(run.end, run.first_real);
       key += kThreads) {
    scores[key] = -INFINITY;
  }
  float mean[kChannelsPerLane];
#pragma unroll
  for (int j = 0; j < kChannelsPerLane; ++j) {
    const int channel = run.first_channel + j;
    const bool present = channel < arguments.keys.dim;
    mean[j] = present ? arguments.mean[run.index * arguments.keys.dim + channel] : 0.0f;
  }
  run.for_each_key<T>(arguments,
                      [&](int key, const float (&x)[kChannelsPerLane], float inverse_norm) {
                        float product = 0.0f;
#pragma unroll
                        for (int j = 0; j < kChannelsPerLane; ++j)
                          product = fmaf(x[j], mean[j], product);
                        product = sum_over_lanes(product, arguments.keys.lanes);
                        if (key < run.end && run.first_channel == 0)
                          scores[key] = -product * inverse_norm;
                      });
}

struct Plan {
  Arguments arguments;
  size_t workspace_bytes;
};

Plan plan(const ExpertScoresParams& params, void* workspace, float* scores) {
  const int64_t heads = params.batch * params.num_kv_heads;
  const int64_t keys_per_block =
      std::max(kMinKeysPerBlock, ceil_div(heads * params.num_keys, kMaxBlocks));
  const int64_t blocks = ceil_div(params.num_keys, keys_per_block);
  const int64_t partial = heads * blocks * params.key_dim;
  auto* const base = static_cast<float*>(workspace);
  return {
      .arguments = {.params = params,
                    .keys = rows_of(params.keys, params.key_stride, params.key_dim, params.dtype),
                    .partial = base,
                    .mean = base + partial,
                    .scores = scores,
                    .blocks = static_cast<int>(blocks),
                    .keys_per_block = static_cast<int>(keys_per_block)},
      .workspace_bytes = static_cast<size_t>(partial + heads * params.key_dim) * sizeof(float)};
}

template <typename T>
void run(const Arguments& arguments, Stream stream) {
  const auto heads = static_cast<unsigned>(arguments.params.batch * arguments.params.num_kv_heads);
  const unsigned blocks = heads * static_cast<unsigned>(arguments.blocks);
  MOEKV_LAUNCH(key_diversity_sum_kernel<T>, blocks, kThreads, 0, stream, arguments);
  MOEKV_LAUNCH(key_diversity_mean_kernel, heads, kMeanThreads, 0, stream, arguments);
  MOEKV_LAUNCH(key_diversity_cosine_kernel<T>, blocks, kThreads, 0, stream, arguments);
}

}  // namespace

size_t key_diversity_workspace_bytes(const ExpertScoresParams& params) {
  return plan(params, nullptr, nullptr).workspace_bytes;
}

void key_diversity(const ExpertScoresParams& params, void* workspace, float* scores,
                   Stream stream) {
  const Arguments arguments = plan(params, workspace, scores).arguments;
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

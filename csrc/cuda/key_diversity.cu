// Minus the cosine of each key with the mean direction of its row's keys: one read of the keys for
// the mean, and one for the cosines, if window_attention.cu does not give them on its way.
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

struct Arguments {
  ExpertScoresParams params;
  Rows keys;
  float* partial;      // [B * H, blocks, D]: sums of directions
  float* mean;         // [B * H, D]: their direction
  KeyCosines cosines;  // of the last kernel
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
      float x[kBatch][kChannelsPerLane];
      load_positions(base, keys, first + slot, num_slots, end, first_channel, x);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float norm = sqrtf(sum_over_lanes(dot(x[i], x[i]), keys.lanes));
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

  MOEKV_SHARED(float4, words, kThreads * 2);  // [slots, channels]
  const float4 low = make_float4(sum[0], sum[1], sum[2], sum[3]);
  const float4 high = make_float4(sum[4], sum[5], sum[6], sum[7]);
  static_assert(kChannelsPerLane == 8);
  // The eight lanes that are served at once write to different banks.
  const int thread = static_cast<int>(threadIdx.x);
  const int first = thread / 4 % 2;
  words[2 * thread + first] = first == 0 ? low : high;
  words[2 * thread + 1 - first] = first == 0 ? high : low;
  __syncthreads();
  const float* sums = reinterpret_cast<const float*>(words);
  const int channel = thread;
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
__global__ void __launch_bounds__(kThreads, 3) key_diversity_cosine_kernel(Arguments arguments) {
  const Run run(arguments);
  float* scores = arguments.cosines.scores + run.index * arguments.params.num_keys;
  for (int key = run.begin + static_cast<int>(threadIdx.x); key < min(run.end, run.first_real);
       key += kThreads) {
    scores[key] = -INFINITY;
  }
  float mean[kChannelsPerLane];
#pragma unroll
  for (int j = 0; j < kChannelsPerLane; ++j) {
    const int channel = run.first_channel + j;
    const bool present = channel < arguments.keys.dim;
    mean[j] = present ? arguments.cosines.mean[run.index * arguments.keys.dim + channel] : 0.0f;
  }
  run.for_each_key<T>(arguments,
                      [&](int key, const float (&x)[kChannelsPerLane], float inverse_norm) {
                        const float product = sum_over_lanes(dot(x, mean), arguments.keys.lanes);
                        if (key < run.end && run.first_channel == 0)
                          scores[key] = -product * inverse_norm;
                      });
}

Arguments plan(const ExpertScoresParams& params) {
  const int64_t heads = params.batch * params.num_kv_heads;
  const int64_t keys_per_block =
      std::max(kMinKeysPerBlock, ceil_div(heads * params.num_keys, kMaxBlocks));
  return {.params = params,
          .keys = rows_of(params.keys, params.key_stride, params.key_dim, params.dtype),
          .partial = nullptr,
          .mean = nullptr,
          .cosines = {},
          .blocks = static_cast<int>(ceil_div(params.num_keys, keys_per_block)),
          .keys_per_block = static_cast<int>(keys_per_block)};
}

template <typename T>
void run_mean(const Arguments& arguments, Stream stream) {
  const auto heads = static_cast<unsigned>(arguments.params.batch * arguments.params.num_kv_heads);
  MOEKV_LAUNCH(key_diversity_sum_kernel<T>, heads * static_cast<unsigned>(arguments.blocks),
               kThreads, 0, stream, arguments);
  MOEKV_LAUNCH(key_diversity_mean_kernel, heads, kMeanThreads, 0, stream, arguments);
}

template <typename T>
void run_cosines(const Arguments& arguments, Stream stream) {
  const auto heads = static_cast<unsigned>(arguments.params.batch * arguments.params.num_kv_heads);
  MOEKV_LAUNCH(key_diversity_cosine_kernel<T>, heads * static_cast<unsigned>(arguments.blocks),
               kThreads, 0, stream, arguments);
}

}  // namespace

size_t key_diversity_workspace_bytes(const ExpertScoresParams& params) {
  return static_cast<size_t>(params.batch * params.num_kv_heads * plan(params).blocks *
                             params.key_dim) *
         sizeof(float);
}

void key_mean_direction(const ExpertScoresParams& params, void* workspace, float* mean,
                        Stream stream) {
  Arguments arguments = plan(params);
  arguments.partial = static_cast<float*>(workspace);
  arguments.mean = mean;
  switch (params.dtype) {
    case DType::kFloat:
      return run_mean<float>(arguments, stream);
    case DType::kHalf:
      return run_mean<__half>(arguments, stream);
    case DType::kBFloat16:
      return run_mean<__nv_bfloat16>(arguments, stream);
  }
}

void key_cosines(const ExpertScoresParams& params, const KeyCosines& cosines, Stream stream) {
  Arguments arguments = plan(params);
  arguments.cosines = cosines;
  switch (params.dtype) {
    case DType::kFloat:
      return run_cosines<float>(arguments, stream);
    case DType::kHalf:
      return run_cosines<__half>(arguments, stream);
    case DType::kBFloat16:
      return run_cosines<__nv_bfloat16>(arguments, stream);
  }
}

}  // namespace moekv::cuda

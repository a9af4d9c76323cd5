// Spread of each token over its channels, relative to the next partition (LagKV).
//
// One block per partition reads the partition that follows for its channels' ranges, and then its
// own tokens. So everything is read twice, but the second time soon after the neighbouring block
// read it: out of the L2 cache, for all but absurd lags.
#include "block.h"
#include "expert_scores.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxChannels = 256;
constexpr int kBatch = 4;  // positions that a thread loads before it uses them
constexpr float kEpsilon = 1e-6f;

struct Arguments {
  ExpertScoresParams params;
  Rows keys, values;
  float* scores;        // [B, H, T]; holds the keys' spread on the way
  float* value_spread;  // [B, H, T]
  int lag, partitions;  // of the longest row
};

// Calls use(position, x) with the lane's channels of each position of the slot in [begin, end). All
// threads of the block make the same number of calls; position >= end: x is zero.
template <typename T, typename Use>
__device__ __forceinline__ void for_each_position(const T* base, const Rows& rows, int begin,
                                                  int end, const Use& use) {
  const int slot = static_cast<int>(threadIdx.x) / rows.lanes;
  const int num_slots = kThreads / rows.lanes;
  const int first_channel = static_cast<int>(threadIdx.x) % rows.lanes * kChannelsPerLane;
  for (int first = begin; first < end; first += kBatch * num_slots) {
    float x[kBatch][kChannelsPerLane];
    load_positions(base, rows, first + slot, num_slots, end, first_channel, x);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) use(first + i * num_slots + slot, x[i]);
  }
}

// Writes the spread of positions [begin, end) relative to the ranges of channels in
// [reference_begin, reference_end). Returns their maximum and the sum of e^(spread - maximum).
template <typename T>
__device__ __forceinline__ float2 write_spread(const T* base, const Rows& rows, int begin, int end,
                                               int reference_begin, int reference_end,
                                               float* spread) {
  MOEKV_SHARED(float, lows, kWarps* kMaxChannels);
  MOEKV_SHARED(float, highs, kWarps* kMaxChannels);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int first_channel = thread % rows.lanes * kChannelsPerLane;
  // Neighbouring lanes in neighbouring banks, and their channels apart: each reads its own.
  const auto place = [&](int j) { return j * rows.lanes + thread % rows.lanes; };

  float low[kChannelsPerLane], high[kChannelsPerLane];
#pragma unroll
  for (int j = 0; j < kChannelsPerLane; ++j) {
    low[j] = INFINITY;
    high[j] = -INFINITY;
  }
  for_each_position(base, rows, reference_begin, reference_end,
                    [&](int position, const float (&x)[kChannelsPerLane]) {
                      if (position >= reference_end) return;
#pragma unroll
                      for (int j = 0; j < kChannelsPerLane; ++j) {
                        low[j] = fminf(low[j], x[j]);
                        high[j] = fmaxf(high[j], x[j]);
                      }
                    });
#pragma unroll
  for (int j = 0; j < kChannelsPerLane; ++j) {
    for (int distance = rows.lanes; distance < kWarpSize; distance *= 2) {
      low[j] = fminf(low[j], __shfl_xor_sync(kFullWarp, low[j], distance));
      high[j] = fmaxf(high[j], __shfl_xor_sync(kFullWarp, high[j], distance));
    }
    if (thread % kWarpSize < rows.lanes) {
      lows[warp * kMaxChannels + place(j)] = low[j];
      highs[warp * kMaxChannels + place(j)] = high[j];
    }
  }
  __syncthreads();
  float scale[kChannelsPerLane];  // 0 beyond the last channel
#pragma unroll
  for (int j = 0; j < kChannelsPerLane; ++j) {
    const int channel = first_channel + j;
    for (int i = 0; i < kWarps; ++i) {
      low[j] = fminf(low[j], lows[i * kMaxChannels + place(j)]);
      high[j] = fmaxf(high[j], highs[i * kMaxChannels + place(j)]);
    }
    scale[j] = channel < rows.dim ? 1.0f / (high[j] - low[j] + kEpsilon) : 0.0f;
  }

  const float inverse_dim = 1.0f / static_cast<float>(rows.dim);
  const float inverse_degrees = 1.0f / static_cast<float>(max(rows.dim - 1, 1));
  float highest = -INFINITY;
  for_each_position(base, rows, begin, end, [&](int position, const float (&x)[kChannelsPerLane]) {
    float scaled[kChannelsPerLane];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kChannelsPerLane; ++j) {
      scaled[j] = (x[j] - low[j]) * scale[j];
      sum += scaled[j];
    }
    const float mean = sum_over_lanes(sum, rows.lanes) * inverse_dim;
    float square = 0.0f;
#pragma unroll
    for (int j = 0; j < kChannelsPerLane; ++j) {
      const float deviation = first_channel + j < rows.dim ? scaled[j] - mean : 0.0f;
      square = fmaf(deviation, deviation, square);
    }
    square = sum_over_lanes(square, rows.lanes);
    const float deviation = sqrtf(square * inverse_degrees);
    if (position >= end) return;
    if (first_channel == 0) spread[position] = deviation;
    highest = fmaxf(highest, deviation);
  });
  // Also orders the writes of the spread before the reads below.
  highest = block_max<kThreads>(highest);
  float sum = 0.0f;
  for (int position = begin + thread; position < end; position += kThreads) {
    sum += expf(spread[position] - highest);
  }
  return make_float2(highest, block_sum<kThreads>(sum));
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) lag_kernel(Arguments arguments) {
  const ExpertScoresParams& params = arguments.params;
  const int64_t index = blockIdx.x / arguments.partitions;
  const int64_t batch = index / params.num_kv_heads, head = index % params.num_kv_heads;
  const int num_keys = static_cast<int>(params.num_keys);
  const int lag = arguments.lag;
  const int first_real = first_real_key(params, batch);
  float* scores = arguments.scores + index * num_keys;
  float* value_spread = arguments.value_spread + index * num_keys;

  const int offset = static_cast<int>(blockIdx.x) % arguments.partitions * lag;
  for (int position = offset + static_cast<int>(threadIdx.x);
       position < min(offset + lag, first_real); position += kThreads) {
    scores[position] = -INFINITY;
  }
  const int length = num_keys - first_real;
  if (offset >= length) return;

  const int begin = first_real + offset;
  const int end = begin + min(lag, length - offset);
  // The next partition if it is complete, else the row's last positions.
  const bool has_next = lag <= length - end + first_real;
  const int reference_begin = has_next ? end : max(num_keys - lag, first_real);
  const int reference_end = has_next ? end + lag : num_keys;

  float2 key_softmax = make_float2(0.0f, 1.0f), value_softmax = key_softmax;
  // Two copies of the loops would leave no registers for loads in flight.
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const Rows& rows = i == 0 ? arguments.keys : arguments.values;
    const T* base =
        static_cast<const T*>(rows.data) + batch * rows.stride[0] + head * rows.stride[1];
    value_softmax = write_spread(base, rows, begin, end, reference_begin, reference_end,
                                 i == 0 ? scores : value_spread);
    if (i == 0) key_softmax = value_softmax;
  }
  const float half_size = 0.5f * static_cast<float>(end - begin);
  for (int position = begin + static_cast<int>(threadIdx.x); position < end; position += kThreads) {
    const float key_share = expf(scores[position] - key_softmax.x) / key_softmax.y;
    const float value_share = expf(value_spread[position] - value_softmax.x) / value_softmax.y;
    const float share = (key_share + value_share) * half_size;
    scores[position] = logf(share < kLeastShare ? kLeastShare : share);
  }
}

}  // namespace

size_t lag_workspace_bytes(const ExpertScoresParams& params) {
  return static_cast<size_t>(params.batch * params.num_kv_heads * params.num_keys) * sizeof(float);
}

void lag_scores(const ExpertScoresParams& params, void* workspace, float* scores, Stream stream) {
  const int64_t lag = params.lag < params.num_keys ? params.lag : params.num_keys;
  const int64_t partitions = ceil_div(params.num_keys, lag);
  const Arguments arguments{
      .params = params,
      .keys = rows_of(params.keys, params.key_stride, params.key_dim, params.dtype),
      .values = rows_of(params.values, params.value_stride, params.value_dim, params.dtype),
      .scores = scores,
      .value_spread = static_cast<float*>(workspace),
      .lag = static_cast<int>(lag),
      .partitions = static_cast<int>(partitions),
  };
  const auto blocks = static_cast<unsigned>(params.batch * params.num_kv_heads * partitions);
  switch (params.dtype) {
    case DType::kFloat:
      return MOEKV_LAUNCH(lag_kernel<float>, blocks, kThreads, 0, stream, arguments);
    case DType::kHalf:
      return MOEKV_LAUNCH(lag_kernel<__half>, blocks, kThreads, 0, stream, arguments);
    case DType::kBFloat16:
      return MOEKV_LAUNCH(lag_kernel<__nv_bfloat16>, blocks, kThreads, 0, stream, arguments);
  }
}

}  // namespace moekv::cuda

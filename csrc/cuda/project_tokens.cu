// Projections of the hidden states, and how much each token stands out: its cosine distance from
// the mean direction of its row's tokens, standardised over the row. Three reads of the hidden
// states: projections and norms, the sum of directions, and the cosines. Whole tokens are the work
// of a warp; in the sum, a thread has 16 bytes of channels.
#include <algorithm>

#include "../backend.h"
#include "block.h"
#include "device.h"
#include "rows.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRowThreads = 1024;
constexpr int kBatch = 4;        // loads of a thread from a token before it uses them
constexpr int kTokens = 8;       // from as many tokens
constexpr int kProjections = 4;  // for which a token is read once
constexpr int64_t kMinTokensPerRun = 64;
constexpr int64_t kMaxRuns = 256;  // of a row
constexpr int64_t kMaxGridY = 65535;
constexpr float kLeastNorm = 1e-12f;
// Far above the rounding noise of equal tokens and far below any real spread.
constexpr float kLeastSpread = 1e-4f;

struct Arguments {
  ProjectTokensParams params;
  float* partial;  // [B, runs, C]: sums of directions
  float* mean;     // [B, C]: their direction
  int64_t runs, tokens_per_run;
  bool vectorized;  // all rows may be read 16 bytes at a time
};

__device__ __forceinline__ bool is_real(const ProjectTokensParams& params, int64_t token) {
  return !params.mask || params.mask[token];
}

template <typename T>
__device__ __forceinline__ const T* row_of(const ProjectTokensParams& params, int64_t token) {
  return static_cast<const T*>(params.hidden_states) +
         token / params.num_tokens * params.stride[0] +
         token % params.num_tokens * params.stride[1];
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

// Projections, few beside the channels, and inverse norms; 0 at padding.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) token_norms_kernel(Arguments arguments) {
  const ProjectTokensParams& params = arguments.params;
  constexpr int kPack = kPackSize<T>, kStep = kWarpSize * kPack;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t token =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  if (token >= params.batch * params.num_tokens) return;
  const bool real = is_real(params, token);
  const int channels = real ? static_cast<int>(params.num_channels) : 0;
  const T* row = row_of<T>(params, token);
  float square = 0.0f;
  for (int64_t projection = 0; projection == 0 || projection < params.num_projections;
       projection += kProjections) {
    square = 0.0f;
    float product[kProjections] = {};
    for (int begin = 0; begin < channels; begin += kBatch * kStep) {
      const int first = begin + lane * kPack;
      const auto add = [&](bool vectorized) {
        RawChannels<T> tokens[kBatch], weights[kBatch];
        const auto load = [&](RawChannels<T>(&raw)[kBatch], const T* from) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            raw[i].load(from, first + i * kStep, channels, vectorized);
          }
        };
        load(tokens, row);
        float x[kPack], weight[kPack];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          tokens[i].unpack(first + i * kStep, channels, x);
          square = dot(x, x, square);
        }
#pragma unroll
        for (int p = 0; p < kProjections; ++p) {
          if (projection + p >= params.num_projections) break;
          load(weights,
               static_cast<const T*>(params.weight) + (projection + p) * params.weight_stride);
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            tokens[i].unpack(first + i * kStep, channels, x);
            weights[i].unpack(first + i * kStep, channels, weight);
            product[p] = dot(x, weight, product[p]);
          }
        }
      };
      if (arguments.vectorized) {
        add(true);
      } else {
        add(false);
      }
    }
#pragma unroll
    for (int p = 0; p < kProjections; ++p) {
      const float sum = warp_sum(product[p]);
      if (lane == 0 && projection + p < params.num_projections) {
        params.projected[token * params.num_projections + projection + p] = sum;
      }
    }
  }
  const float norm = sqrtf(warp_sum(square));
  if (lane == 0) {
    params.standout[token] = real ? 1.0f / (norm < kLeastNorm ? kLeastNorm : norm) : 0.0f;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) token_directions_kernel(Arguments arguments) {
  const ProjectTokensParams& params = arguments.params;
  const int channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * kPackSize<T>;
  if (channel >= params.num_channels) return;
  for (int64_t i = blockIdx.y; i < params.batch * arguments.runs; i += gridDim.y) {
    const int64_t first = i / arguments.runs * params.num_tokens;  // of the row
    const int64_t begin = i % arguments.runs * arguments.tokens_per_run;
    const int64_t end = min(begin + arguments.tokens_per_run, params.num_tokens);
    const T* row = row_of<T>(params, first);
    float sum[kPackSize<T>] = {};
    for (int64_t token = begin; token < end; token += kTokens) {
      const T* rows[kTokens];
      float inverse_norm[kTokens];
      uint4 bits[kTokens];
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const int64_t place = min(token + j, end - 1);
        inverse_norm[j] = token + j < end ? params.standout[first + place] : 0.0f;
        rows[j] = row + place * params.stride[1];
      }
      load_16_bytes(rows, channel, static_cast<int>(params.num_channels), arguments.vectorized,
                    bits);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        float x[kPackSize<T>];
        unpack<T>(bits[j], x);
#pragma unroll
        for (int k = 0; k < kPackSize<T>; ++k) {
          // Whatever padding holds, it adds nothing.
          sum[k] = inverse_norm[j] == 0.0f ? sum[k] : fmaf(x[k], inverse_norm[j], sum[k]);
        }
      }
    }
    float* partial = arguments.partial + i * params.num_channels;
#pragma unroll
    for (int k = 0; k < kPackSize<T>; ++k) {
      if (channel + k < params.num_channels) partial[channel + k] = sum[k];
    }
  }
}

// One block per row: the direction of the sum.
__global__ void __launch_bounds__(kRowThreads) token_mean_kernel(Arguments arguments) {
  const int64_t channels = arguments.params.num_channels;
  const float* partial = arguments.partial + blockIdx.x * arguments.runs * channels;
  float* mean = arguments.mean + blockIdx.x * channels;
  float square = 0.0f;
  for (int64_t c = threadIdx.x; c < channels; c += kRowThreads) {
    float sum = 0.0f;
    for (int64_t run = 0; run < arguments.runs; ++run) sum += partial[run * channels + c];
    mean[c] = sum;
    square = fmaf(sum, sum, square);
  }
  const float norm = sqrtf(block_sum<kRowThreads>(square));
  const float factor = 1.0f / (norm < kLeastNorm ? kLeastNorm : norm);
  for (int64_t c = threadIdx.x; c < channels; c += kRowThreads) mean[c] *= factor;
}

// Blocks on an SM: as many as there are registers for without a spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename T>
constexpr int kResident = sizeof(T) == 2 ? 4 : 5;
#else
template <typename T>
constexpr int kResident = sizeof(T) == 2 ? 3 : 4;
#endif

// Inverse norms become distances.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    token_distances_kernel(Arguments arguments) {
  const ProjectTokensParams& params = arguments.params;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t token =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  if (token >= params.batch * params.num_tokens || !is_real(params, token)) return;
  const T* row = row_of<T>(params, token);
  const float* mean = arguments.mean + token / params.num_tokens * params.num_channels;
  constexpr int kPack = kPackSize<T>, kStep = kWarpSize * kPack;
  const int channels = static_cast<int>(params.num_channels);
  float product = 0.0f;
  for (int begin = 0; begin < channels; begin += kBatch * kStep) {
    const int first = begin + lane * kPack;
    RawChannels<T> tokens[kBatch];
    RawChannels<float, kPack> means[kBatch];
    const auto load = [&](bool vectorized) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        tokens[i].load(row, first + i * kStep, channels, vectorized);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        means[i].load(mean, first + i * kStep, channels, vectorized);
      }
    };
    if (arguments.vectorized) {
      load(true);
    } else {
      load(false);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float x[kPack], direction[kPack];
      tokens[i].unpack(first + i * kStep, channels, x);
      means[i].unpack(first + i * kStep, channels, direction);
      product = dot(x, direction, product);
    }
  }
  product = warp_sum(product);
  if (lane == 0) params.standout[token] = 1.0f - product * params.standout[token];
}

// One block per row: distances become standardised ones, 0 at padding.
__global__ void __launch_bounds__(kRowThreads) token_standardise_kernel(Arguments arguments) {
  const ProjectTokensParams& params = arguments.params;
  const int64_t first = blockIdx.x * params.num_tokens, end = first + params.num_tokens;
  float sum = 0.0f, count = 0.0f;
  for (int64_t token = first + threadIdx.x; token < end; token += kRowThreads) {
    if (!is_real(params, token)) continue;
    sum += params.standout[token];
    count += 1.0f;
  }
  count = fmaxf(block_sum<kRowThreads>(count), 1.0f);
  const float mean = block_sum<kRowThreads>(sum) / count;
  float square = 0.0f;
  for (int64_t token = first + threadIdx.x; token < end; token += kRowThreads) {
    if (!is_real(params, token)) continue;
    const float deviation = params.standout[token] - mean;
    square = fmaf(deviation, deviation, square);
  }
  const float spread = sqrtf(block_sum<kRowThreads>(square) / count) + kLeastSpread;
  for (int64_t token = first + threadIdx.x; token < end; token += kRowThreads) {
    const bool real = is_real(params, token);
    params.standout[token] = real ? (params.standout[token] - mean) / spread : 0.0f;
  }
}

Arguments plan(const ProjectTokensParams& params) {
  const int64_t tokens_per_run = std::max(kMinTokensPerRun, ceil_div(params.num_tokens, kMaxRuns));
  const int64_t runs = ceil_div(params.num_tokens, tokens_per_run);
  const int64_t element = params.dtype == DType::kFloat ? 4 : 2;
  const auto bits =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(params.hidden_states)) |
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(params.weight)) |
      (params.stride[0] | params.stride[1] | params.weight_stride | params.num_channels) * element;
  auto* const partial = static_cast<float*>(params.workspace);
  return {.params = params,
          .partial = partial,
          .mean = partial + params.batch * runs * params.num_channels,
          .runs = runs,
          .tokens_per_run = tokens_per_run,
          .vectorized = bits % 16 == 0};
}

template <typename T>
void run(const Arguments& arguments, Stream stream) {
  const ProjectTokensParams& params = arguments.params;
  const auto rows = static_cast<unsigned>(params.batch);
  const auto tokens =
      static_cast<unsigned>(ceil_div<int64_t>(params.batch * params.num_tokens, kWarps));
  const dim3 sums(
      static_cast<unsigned>(ceil_div<int64_t>(params.num_channels, kThreads * kPackSize<T>)),
      static_cast<unsigned>(std::min(params.batch * arguments.runs, kMaxGridY)));
  MOEKV_LAUNCH(token_norms_kernel<T>, tokens, kThreads, 0, stream, arguments);
  if (params.num_channels > 0) {
    MOEKV_LAUNCH(token_directions_kernel<T>, sums, kThreads, 0, stream, arguments);
  }
  MOEKV_LAUNCH(token_mean_kernel, rows, kRowThreads, 0, stream, arguments);
  MOEKV_LAUNCH(token_distances_kernel<T>, tokens, kThreads, 0, stream, arguments);
  MOEKV_LAUNCH(token_standardise_kernel, rows, kRowThreads, 0, stream, arguments);
}

}  // namespace

size_t project_tokens_workspace_bytes(const ProjectTokensParams& params) {
  return static_cast<size_t>(params.batch * (plan(params).runs + 1) * params.num_channels) *
         sizeof(float);
}

void project_tokens(const ProjectTokensParams& params, Stream stream) {
  check_device("project_tokens");
  const Arguments arguments = plan(params);
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

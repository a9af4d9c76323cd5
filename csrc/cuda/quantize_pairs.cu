// Keys and values to codes and scales (params.h has the format), in the order of sums and with the
// roundings of the reference: codes are the same to the bit.
//
// A warp takes a key or a value, a lane every 32nd channel: a group of 32 channels is one register
// of each lane, so the transform is sums of registers and then shuffles, and so are the extremes.
#include "../backend.h"
#include "device.h"

namespace moekv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kFewGroups = 4;
constexpr int kMostGroups = static_cast<int>(kMaxCodeDim) / kCodeGroup;
static_assert(kCodeGroup == kWarpSize);

// The keys or the values.
struct Plane {
  const void* rows;
  uint8_t* codes;
  int64_t stride;  // of a row
  int dim, bits;
  int bytes, first_scale;
};

struct Arguments {
  Plane keys, values;
  uint16_t* scales;
  int64_t num_pairs;
  int num_scales;
};

__device__ __forceinline__ uint16_t bits_of(__half x) {
  uint16_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

constexpr uint16_t kNoScale = 0x7e00;  // NaN

__device__ __forceinline__ bool is_finite(uint16_t half) { return (half & 0x7c00u) != 0x7c00u; }

// The half at or above x, infinity beyond the last.
__device__ __forceinline__ uint16_t half_above(float x) {
  const uint16_t near = bits_of(__float2half_rn(x));
  if (!is_finite(near) || !(half_of(near) < x)) return near;
  if ((near & 0x7fffu) == 0) return 1;
  return static_cast<uint16_t>(near & 0x8000u ? near - 1 : near + 1);
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, distance));
  }
  return x;
}

// round((x - lo) / step), between least and most.
__device__ __forceinline__ int code(float x, float lo, float step, float least, float most) {
  if (!(step > 0.0f)) return 0;
  return static_cast<int>(rintf(fminf(fmaxf((x - lo) / step, least), most)));
}

// Sums and differences over each block of the largest power of two that divides dim, first of the
// block's halves, then of their halves; all divided by its size.
template <int kGroups>
__device__ __forceinline__ void transform(float (&x)[kGroups], int dim, int lane) {
  const int block = dim & -dim;
#pragma unroll
  for (int width = kGroups / 2; width > 0; width /= 2) {
    if (width * kCodeGroup >= block) continue;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (i & width) continue;
      const float a = x[i], b = x[i + width];
      x[i] = a + b;
      x[i + width] = a - b;
    }
  }
#pragma unroll
  for (int width = kCodeGroup / 2; width > 0; width /= 2) {
    if (width >= block) continue;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, x[i], width);
      x[i] = lane & width ? other - x[i] : x[i] + other;
    }
  }
  const float part = 1.0f / static_cast<float>(block);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) x[i] *= part;
}

template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads) quantize_pairs_kernel(Arguments arguments) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t pair = warp / 2;
  if (pair >= arguments.num_pairs) return;
  const Plane plane = warp % 2 == 0 ? arguments.keys : arguments.values;
  const int dim = plane.dim;
  const T* row = static_cast<const T*>(plane.rows) + pair * plane.stride;
  uint8_t* codes = plane.codes + pair * plane.bytes;
  uint16_t* scales = arguments.scales + pair * arguments.num_scales + plane.first_scale;

  float x[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int channel = i * kCodeGroup + lane;
    x[i] = channel < dim ? to_float(row[channel]) : 0.0f;
  }
  if (plane.bits == 4) transform(x, dim, lane);
  bool fits = true;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) fits = fits && fabsf(x[i]) < INFINITY;

  if (plane.bits == 8) {
    float highest = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) highest = fmaxf(highest, fabsf(x[i]));
    uint16_t scale = half_above(warp_max(highest) / 127.0f);
    fits = __all_sync(kFullWarp, fits && is_finite(scale)) != 0;
    if (!fits) scale = kNoScale;
    if (lane == 0) scales[0] = scale;
    const float step = fits ? half_of(scale) : 0.0f;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int channel = i * kCodeGroup + lane;
      if (channel < dim) codes[channel] = static_cast<uint8_t>(code(x[i], 0.0f, step, -127, 127));
    }
    return;
  }

  uint16_t lo[kGroups], step[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int channel = i * kCodeGroup + lane;
    if (i * kCodeGroup >= dim) break;
    const float most = warp_max(channel < dim ? x[i] : -INFINITY);
    lo[i] = half_above(warp_max(channel < dim ? -x[i] : -INFINITY)) ^ 0x8000u;
    step[i] = half_above((most - half_of(lo[i])) / 15.0f);
    fits = fits && is_finite(lo[i]) && is_finite(step[i]);
  }
  fits = __all_sync(kFullWarp, fits) != 0;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int left = dim - i * kCodeGroup;
    if (left <= 0) break;
    const int half = min(kCodeGroup, left) / 2;
    const int own = code(x[i], half_of(lo[i]), fits ? half_of(step[i]) : 0.0f, 0.0f, 15.0f);
    const int upper = __shfl_sync(kFullWarp, own, (lane + half) % kWarpSize);
    if (lane < half) codes[i * (kCodeGroup / 2) + lane] = static_cast<uint8_t>(own | upper << 4);
    if (lane == 0) {
      scales[2 * i] = fits ? lo[i] : kNoScale;
      scales[2 * i + 1] = fits ? step[i] : kNoScale;
    }
  }
}

template <typename T>
void run(const Arguments& arguments, unsigned blocks, Stream stream) {
  const int dim = max(arguments.keys.dim, arguments.values.dim);
  if (dim <= kFewGroups * kCodeGroup) {
    MOEKV_LAUNCH((quantize_pairs_kernel<T, kFewGroups>), blocks, kThreads, 0, stream, arguments);
  } else {
    MOEKV_LAUNCH((quantize_pairs_kernel<T, kMostGroups>), blocks, kThreads, 0, stream, arguments);
  }
}

}  // namespace

void quantize_pairs(const QuantizePairsParams& params, Stream stream) {
  check_device("quantize_pairs");
  const auto plane = [](const void* rows, uint8_t* codes, int64_t stride, int64_t dim, int bits,
                        int64_t first_scale) {
    return Plane{rows,
                 codes,
                 stride,
                 static_cast<int>(dim),
                 bits,
                 static_cast<int>(code_bytes(dim, bits)),
                 static_cast<int>(first_scale)};
  };
  const int64_t key_scales = code_scales(params.key_dim, params.key_bits);
  const int64_t num_scales = key_scales + code_scales(params.value_dim, params.value_bits);
  const Arguments arguments{
      plane(params.keys, params.key_codes, params.key_stride, params.key_dim, params.key_bits, 0),
      plane(params.values, params.value_codes, params.value_stride, params.value_dim,
            params.value_bits, key_scales),
      params.scales, params.num_pairs, static_cast<int>(num_scales)};
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(2 * params.num_pairs, kWarps));
  switch (params.dtype) {
    case DType::kFloat:
      return run<float>(arguments, blocks, stream);
    case DType::kHalf:
      return run<__half>(arguments, blocks, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(arguments, blocks, stream);
  }
}

}  // namespace moekv::cuda

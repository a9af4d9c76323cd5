// Quantised rows on tensor cores. params.h has their format.
//
// Codes come to shared memory by cp.async, in two stages; scales, which begin at any multiple of
// two bytes, through registers. The whole block then makes numbers of 16 bits of a tile, which is
// read by the warps that have queries, as rows of 16 bits are. A code becomes part of a float's
// bits, an FMA takes away what is around it and puts scales on it, and two numbers are rounded at
// once.
//
// Keys of 4 bits meet queries that are transformed like they are, in registers. Values of 4 bits
// leave sums that are; they are changed back once, where the chunks of a row meet.
#include "ragged_coded.h"
#include "ragged_tiles.h"

namespace moekv::cuda::ragged {
namespace {

constexpr int kItem = 8;  // channels: 16 bytes of numbers
constexpr int kMaxHalves = 4;

// How a row of codes of 4 or 8 bits becomes one of numbers.
struct Codes {
  int bits, dim;
  int bytes, stride, num_scales;  // of a row; its bytes in shared memory

  Codes(int bits, int64_t dim)
      : bits(bits),
        dim(static_cast<int>(dim)),
        bytes(static_cast<int>(code_bytes(dim, bits))),
        stride(ceil_div(bytes, 16) * 16),
        num_scales(static_cast<int>(code_scales(dim, bits))) {}

  // The codes of channels 8i ... 8i + 7, a byte each; anything beyond the last. Those of 8 bits
  // without a sign, 128 more than they are.
  template <int kBits>
  __device__ __forceinline__ uint2 item(const char* row, int i) const {
    if constexpr (kBits == 8) {
      const uint2 words = *reinterpret_cast<const uint2*>(row + i * kItem);
      return make_uint2(words.x ^ 0x80808080u, words.y ^ 0x80808080u);
    }
    constexpr int kItems = kCodeGroup / kItem;
    const char* group = row + i / kItems * (kCodeGroup / 2);
    const int first = i % kItems * kItem;
    const int half = min(kCodeGroup, dim - i / kItems * kCodeGroup) / 2;
    if (half % kItem == 0) {
      const bool upper = first >= half;
      const uint2 words = *reinterpret_cast<const uint2*>(group + (upper ? first - half : first));
      const int shift = upper ? 4 : 0;
      return make_uint2(words.x >> shift & 0x0f0f0f0fu, words.y >> shift & 0x0f0f0f0fu);
    }
    unsigned words[2] = {0, 0};
#pragma unroll 1
    for (int j = 0; j < kItem && first + j < 2 * half; ++j) {
      const bool upper = first + j >= half;
      const auto byte = static_cast<unsigned char>(group[first + j - (upper ? half : 0)]);
      const unsigned code = (upper ? byte >> 4 : byte & 15u) << j % 4 * 8;
      (j < 4 ? words[0] : words[1]) |= code;
    }
    return make_uint2(words[0], words[1]);
  }

  // Their numbers, zeros beyond the last channel. `scales`: of the row.
  template <typename T, int kBits>
  __device__ __forceinline__ uint4 numbers(const char* row, const uint16_t* scales, int i) const {
    const uint2 words = item<kBits>(row, i);
    float lo = 0.0f, step;
    if constexpr (kBits == 8) {
      step = half_of(scales[0]);
    } else {
      const uint16_t* its = scales + i * kItem / kCodeGroup * 2;
      lo = half_of(its[0]);
      step = half_of(its[1]);
    }
    // Byte 1 of 2^15, byte 2 of 2^7: there a step of the code is a step of 1.
    constexpr unsigned kAround = kBits == 8 ? 0x47000000u : 0x43000000u;
    constexpr float kZero = kBits == 8 ? 32768.0f + 128.0f : 128.0f;
    lo = fmaf(-kZero, step, lo);
    float x[kItem];
#pragma unroll
    for (int j = 0; j < kItem; ++j) {
      const unsigned selector = kBits == 8 ? 0x7404u + 0x10u * (j % 4) : 0x7044u + 0x100u * (j % 4);
      const unsigned word = j < 4 ? words.x : words.y;
      x[j] = fmaf(__uint_as_float(__byte_perm(word, kAround, selector)), step, lo);
    }
    if ((i + 1) * kItem > dim) {
#pragma unroll
      for (int j = 0; j < kItem; ++j) x[j] = i * kItem + j < dim ? x[j] : 0.0f;
    }
    return make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                      pack<T>(x[6], x[7]));
  }

  // A tile of rows. Lanes of a row read and write side by side.
  template <typename T, int kBits>
  __device__ __forceinline__ void decode_as(const char* rows, const uint16_t* scales,
                                            int num_scales, int num_rows, char* target,
                                            int target_stride) const {
    const int items = ceil_div(dim, kItem);
    const int lanes = items > 8 ? 16 : 8;
    const int thread = static_cast<int>(threadIdx.x);
    for (int row = thread / lanes; row < num_rows; row += kThreads / lanes) {
      for (int i = thread % lanes; i < items; i += lanes) {
        *reinterpret_cast<uint4*>(target + row * target_stride + i * 16) =
            numbers<T, kBits>(rows + row * stride, scales + row * num_scales, i);
      }
    }
  }
  template <typename T>
  __device__ __forceinline__ void decode(const char* rows, const uint16_t* scales, int num_scales,
                                         int num_rows, char* target, int target_stride) const {
    if (bits == 8) {
      decode_as<T, 8>(rows, scales, num_scales, num_rows, target, target_stride);
    } else {
      decode_as<T, 4>(rows, scales, num_scales, num_rows, target, target_stride);
    }
  }
};

// Sums and differences over each block of the largest power of two that divides dim, divided by its
// size. Channels of a lane are 8t ... 8t + 7 of each chunk of 32.
template <typename T, int kChunks>
__device__ __forceinline__ void transform(uint4 (&fragments)[1][2][kChunks], int dim) {
  const int block = dim & -dim;
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x[kChunks][8];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) unpack<T>(fragments[0][half][i], x[i]);
#pragma unroll
    for (int width = kChunks / 2; width > 0; width /= 2) {
      if (32 * width >= block) continue;
#pragma unroll
      for (int i = 0; i < 8 * kChunks; ++i) {
        if (i / 8 & width) continue;
        float &a = x[i / 8][i % 8], &b = x[i / 8 + width][i % 8];
        const float sum = a + b;
        b = a - b;
        a = sum;
      }
    }
#pragma unroll
    for (int width = 2; width > 0; width /= 2) {
      if (8 * width >= block) continue;
#pragma unroll
      for (int i = 0; i < 8 * kChunks; ++i) {
        float& own = x[i / 8][i % 8];
        const float other = __shfl_xor_sync(kFullWarp, own, width);
        own = t & width ? other - own : own + other;
      }
    }
#pragma unroll
    for (int width = 4; width > 0; width /= 2) {
      if (width >= block) continue;
#pragma unroll
      for (int i = 0; i < 8 * kChunks; ++i) {
        if (i & width) continue;
        float &a = x[i / 8][i % 8], &b = x[i / 8][i % 8 + width];
        const float sum = a + b;
        b = a - b;
        a = sum;
      }
    }
    const float part = 1.0f / static_cast<float>(block);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      fragments[0][half][i] = make_uint4(
          pack<T>(x[i][0] * part, x[i][1] * part), pack<T>(x[i][2] * part, x[i][3] * part),
          pack<T>(x[i][4] * part, x[i][5] * part), pack<T>(x[i][6] * part, x[i][7] * part));
    }
  }
}

// Where the codes of a tile lie in shared memory: behind its numbers, twice, and then the scales,
// twice.
struct CodedPlan {
  Codes keys, values;
  int stages, stage_bytes, scales, bytes, num_scales;

  CodedPlan(const RaggedAttentionParams& params, int num_rows, int number_bytes)
      : keys(params.key_bits, params.key_dim),
        values(params.value_bits, params.value_dim),
        stages(number_bytes),
        stage_bytes(num_rows * (keys.stride + values.stride)),
        scales(stages + 2 * stage_bytes),
        bytes(scales + 2 * kMaxHalves * kThreads * static_cast<int>(sizeof(uint16_t))),
        num_scales(keys.num_scales + values.num_scales) {}
};

// The rows of codes of a head: there is no tail behind them. Addresses are worked out from
// parameters each time: beside the sums there are no registers for them.
struct CodedRows {
  const Plane& plane;
  int begin, end;
  bool vectorized;

  __device__ __forceinline__ const uint8_t* operator()(int row) const {
    const auto* stored = static_cast<const uint8_t*>(plane.stored);
    return row < end ? stored + (begin + row) * plane.stride : nullptr;
  }
};

template <typename T, int kChunks>
struct CodedSource {
  static constexpr bool kHasTail = false;
  using Layout = Tiles<T, kChunks>;
  static constexpr int kRows = Layout::kRows;
  static_assert(kRows * code_scales(32 * kChunks, 4) * 2 <= kMaxHalves * kThreads);

  const Arguments& arguments;
  const CodedPlan& plan;
  Layout layout;
  int begin, end;  // of the head among all rows, of the block among those of the head
  char* shared;
  Halves<kMaxHalves> next;

  __device__ __forceinline__ CodedSource(const Arguments& arguments, const Part& part, char* shared,
                                         const CodedPlan& plan)
      : arguments(arguments),
        plan(plan),
        layout(plan.keys.dim, plan.values.dim),
        begin(part.rows.begin),
        end(part.end),
        shared(shared) {
    // Channels that there are not stay 0.
    for (int i = static_cast<int>(threadIdx.x) * 16; i < layout.bytes; i += kThreads * 16) {
      *reinterpret_cast<uint4*>(shared + i) = make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ uint16_t* near_scales(int stage) const {
    return reinterpret_cast<uint16_t*>(shared + plan.scales) + stage * kMaxHalves * kThreads;
  }

  __device__ __forceinline__ void prepare(uint4 (&queries)[1][2][kChunks]) const {
    if (plan.keys.bits == 4) transform<T>(queries, plan.keys.dim);
  }
  __device__ __forceinline__ void copy(int row, int stage) {
    char* target = shared + plan.stages + stage * plan.stage_bytes;
    const bool vectorized = arguments.vectorized;
    copy_tile<kThreads, uint8_t>(target, plan.keys.stride,
                                 CodedRows{arguments.keys, begin, end, vectorized}, row, kRows,
                                 plan.keys.bytes);
    copy_tile<kThreads, uint8_t>(target + kRows * plan.keys.stride, plan.values.stride,
                                 CodedRows{arguments.values, begin, end, vectorized}, row, kRows,
                                 plan.values.bytes);
    const int64_t stride = arguments.params.scale_stride;
    next.load(arguments.params.scales + (begin + row) * stride, stride, plan.num_scales,
              min(kRows, end - row));
  }
  __device__ __forceinline__ void put() { next.store(near_scales(0), kRows * plan.num_scales); }
  // Behind the numbers, for the scales have arrived by then, and have had no register beside sums.
  __device__ __forceinline__ const char* tile(int stage) {
    const char* codes = shared + plan.stages + stage * plan.stage_bytes;
    const uint16_t* its_scales = near_scales(stage);
    plan.keys.decode<T>(codes, its_scales, plan.num_scales, kRows, shared, layout.key_stride);
    plan.values.decode<T>(codes + kRows * plan.keys.stride, its_scales + plan.keys.num_scales,
                          plan.num_scales, kRows, shared + layout.values, layout.value_stride);
    next.store(near_scales(stage ^ 1), kRows * plan.num_scales);
    __syncthreads();
    return shared;
  }
};

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads, kChunks <= 4 ? 3 : 2)
    ragged_attention_coded_kernel(Arguments arguments, CodedPlan plan) {
  MOEKV_SHARED_MEMORY(char, shared);
  attend_tiles<T, kChunks, CodedSource<T, kChunks>>(arguments, shared, plan);
}

template <typename T, int kChunks>
void run(const Arguments& arguments, Stream stream) {
  const auto tiles = ceil_div(static_cast<unsigned>(arguments.rows), unsigned{kTileQueries});
  using Layout = Tiles<T, kChunks>;
  const Layout numbers(static_cast<int>(arguments.params.key_dim),
                       static_cast<int>(arguments.params.value_dim));
  const CodedPlan plan(arguments.params, Layout::kRows, numbers.bytes);
  MOEKV_LAUNCH((ragged_attention_coded_kernel<T, kChunks>),
               static_cast<unsigned>(arguments.max_chunks) * tiles, kThreads,
               static_cast<size_t>(plan.bytes), stream, arguments, plan);
}

template <typename T>
void run(const Arguments& arguments, Stream stream) {
  if (arguments.params.key_dim <= 128 && arguments.params.value_dim <= 128) {
    run<T, 4>(arguments, stream);
  } else {
    run<T, 8>(arguments, stream);
  }
}

}  // namespace

void attend_coded(const Arguments& arguments, Stream stream) {
  if (arguments.params.dtype == DType::kHalf) {
    run<__half>(arguments, stream);
  } else {
    run<__nv_bfloat16>(arguments, stream);
  }
}

}  // namespace moekv::cuda::ragged

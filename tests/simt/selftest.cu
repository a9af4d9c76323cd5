// Small kernels that use the simulator rightly, and others that each do one thing wrong. Every one
// takes an array of floats, or of words.
#include <functional>
#include <map>

#include "selftest.h"
#include "simt.h"

namespace simt {
namespace {

constexpr unsigned kFull = 0xffffffffu;

// --- Right
// ----------------------------------------------------------------------------------------

// [collectives, 32]
__global__ void collectives(uint32_t* out) {
  const unsigned lane = threadIdx.x;
  const auto put = [&](int row, uint32_t value) { out[row * 32 + lane] = value; };
  put(0, __shfl_sync(kFull, lane * 3, 5));
  put(1, __shfl_sync(kFull, lane, lane + 1, 8));
  put(2, __shfl_up_sync(kFull, lane, 3));
  put(3, __shfl_down_sync(kFull, lane, 3, 16));
  put(4, __shfl_xor_sync(kFull, lane, 9));
  put(5, __ballot_sync(kFull, lane % 3 == 0));
  put(6, __any_sync(kFull, lane == 31));
  put(7, __all_sync(kFull, lane < 31));
  put(8, static_cast<uint32_t>(__reduce_add_sync(kFull, static_cast<int>(lane) - 20)));
  put(9, static_cast<uint32_t>(__reduce_max_sync(kFull, static_cast<int>(lane) - 40)));
  put(10, __reduce_min_sync(kFull, lane + 7));
  // Half warps apart, each with its own mask.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  uint32_t sum;
  if (lane < 16) {
    sum = __reduce_add_sync(half, lane);
  } else {
    sum = __reduce_add_sync(half, lane);
  }
  put(11, sum);
  put(12, static_cast<uint32_t>(__syncthreads_count(lane > 20)));
}

// Inclusive sums of each 256 numbers.
template <bool kBarrier>
__global__ void scan(float* data) {
  MOEKV_SHARED(float, warp_sums, 8);
  float* const mine = data + blockIdx.x * 256 + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float sum = *mine;
  for (int distance = 1; distance < 32; distance *= 2) {
    const float below = __shfl_up_sync(kFull, sum, distance);
    if (lane >= distance) sum += below;
  }
  if (lane == 31) warp_sums[warp] = sum;
  if (kBarrier) __syncthreads();
  for (int i = 0; i < warp; ++i) sum += warp_sums[i];
  *mine = sum;
}

// [32, 32] in place. Rows of 32 words lie in the same banks.
template <int kRow>
__global__ void transpose(float* data) {
  MOEKV_SHARED(float, tile, 32 * kRow);
  for (int row = static_cast<int>(threadIdx.y); row < 32; row += 8) {
    tile[row * kRow + threadIdx.x] = data[row * 32 + threadIdx.x];
  }
  __syncthreads();
  for (int row = static_cast<int>(threadIdx.y); row < 32; row += 8) {
    data[row * 32 + threadIdx.x] = tile[threadIdx.x * kRow + row];
  }
}

// A [16, 16] and B [16, 8] of 16-bit numbers, in words; D [16, 8] of floats behind them.
template <typename T>
__global__ void multiply(uint32_t* data) {
  const auto* a = reinterpret_cast<const uint16_t*>(data);
  const auto* b = a + 256;
  float* const out = reinterpret_cast<float*>(data + 192);
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](uint16_t low, uint16_t high) {
    return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
  };
  const auto a_pair = [&](unsigned row, unsigned column) {
    return pair(a[row * 16 + column], a[row * 16 + column + 1]);
  };
  const auto b_pair = [&](unsigned row) { return pair(b[row * 8 + g], b[(row + 1) * 8 + g]); };
  const uint32_t a_words[4] = {a_pair(g, 2 * t), a_pair(g + 8, 2 * t), a_pair(g, 2 * t + 8),
                               a_pair(g + 8, 2 * t + 8)};
  const uint32_t b_words[2] = {b_pair(2 * t), b_pair(2 * t + 8)};
  float d[4];
  for (unsigned i = 0; i < 4; ++i) d[i] = out[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  moekv::cuda::mma_m16n8k16<T>(d, a_words, b_words);
  for (unsigned i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// Doubles 8 tiles of 128 floats, with two of them in flight.
template <bool kWait>
__global__ void stream(float* data) {
  MOEKV_SHARED_MEMORY(float, tiles);
  const auto copy = [&](unsigned tile) {
    if (tile < 8 && threadIdx.x < 32) {
      moekv::cuda::copy_async_16(tiles + tile % 2 * 128 + threadIdx.x * 4,
                                 data + tile * 128 + threadIdx.x * 4);
    }
    moekv::cuda::copy_async_commit();
  };
  copy(0);
  for (unsigned tile = 0; tile < 8; ++tile) {
    copy(tile + 1);
    if (kWait) moekv::cuda::copy_async_wait<1>();
    __syncthreads();
    data[tile * 128 + threadIdx.x] = 2 * tiles[tile % 2 * 128 + threadIdx.x];
    __syncthreads();
  }
}

// Each block writes its number; the last to finish adds them up. [blocks, sum, counter]
template <bool kRelease, bool kAcquire>
__global__ void hand_over(uint32_t* data) {
  uint32_t* const sum = data + gridDim.x;
  uint32_t* const counter = sum + 1;
  if (threadIdx.x == 1) data[blockIdx.x] = blockIdx.x;
  int last = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kRelease) __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (kAcquire) __threadfence();
  }
  if (__syncthreads_or(last) && threadIdx.x == 2) {
    uint32_t total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += data[i];
    *sum = total;
  }
}

// Blocks take turns, in the order of their tickets. [next ticket, turn, value]
__global__ void take_turns(uint32_t* data) {
  if (threadIdx.x != 0) return;
  const uint32_t ticket = atomicAdd(&data[0], 1u);
  while (*static_cast<volatile uint32_t*>(&data[1]) != ticket) __nanosleep(32);
  __threadfence();
  data[2] = data[2] * 3 + ticket;
  __threadfence();
  atomicAdd(&data[1], 1u);
}

// Blocks pass a word on in the order of their tickets, and behind it a flag that says that it is
// there. All accesses are `volatile` or atomic, so no two of them race.
// [flags of 12 blocks, words of 12 blocks, next ticket]
template <bool kFence>
__global__ void pass_on(uint32_t* data) {
  volatile uint32_t* const flags = data;
  volatile uint32_t* const words = data + 12;
  const uint32_t ticket = atomicAdd(data + 24, 1u);
  uint32_t word = 1;
  if (ticket > 0) {
    while (flags[ticket - 1] == 0) __nanosleep(32);
    if (kFence) __threadfence();
    word = words[ticket - 1] + 1;
  }
  words[ticket] = word;
  __threadfence();
  flags[ticket] = 1;
}

// [halves in, halves out, bfloat16s in, bfloat16s out] of `65536` each, as floats
__global__ void convert(float* data) {
  const unsigned i = blockIdx.x * 256 + threadIdx.x;
  const auto bits = static_cast<uint16_t>(i);
  data[i] = __half2float({bits});
  data[65536 + i] = __half2float(__float2half_rn(data[65536 + i]));
  data[131072 + i] = __bfloat162float({bits});
  data[196608 + i] = __bfloat162float(__float2bfloat16_rn(data[196608 + i]));
}

// [x, y, x y as rounded, x y less that, 2^x] of 1,024 each
__global__ void numerics(float* data) {
  const unsigned i = blockIdx.x * 256 + threadIdx.x;
  data[3072 + i] = data[i] * data[1024 + i] - data[2048 + i];
  data[4096 + i] = moekv::cuda::exp2_fast(data[i]);
}

// --- Wrong
// ----------------------------------------------------------------------------------------

// A shuffle does not order memory.
__global__ void no_syncwarp(uint32_t* data) {
  MOEKV_SHARED(uint32_t, words, 32);
  words[threadIdx.x] = threadIdx.x;
  const uint32_t sum = __reduce_add_sync(kFull, threadIdx.x);
  data[threadIdx.x] = sum + words[31 - threadIdx.x];
}

__global__ void same_word(uint32_t* data) {
  MOEKV_SHARED(uint32_t, count, 1);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  ++count[0];
  __syncthreads();
  data[threadIdx.x] = count[0];
}

__global__ void divergent_barrier(uint32_t* data) {
  if (threadIdx.x < 32) {
    data[threadIdx.x] = 1;
    __syncthreads();
  } else {
    data[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void barrier_after_exit(uint32_t* data) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  data[threadIdx.x] = 1;
}

__global__ void barrier_in_branch(uint32_t* data) {
  if (threadIdx.x < 32) __syncthreads();
  data[threadIdx.x] = __ballot_sync(kFull, true);
}

__global__ void lane_elsewhere(uint32_t* data) {
  if (threadIdx.x % 32 != 7) data[threadIdx.x] = __ballot_sync(kFull, true);
  __syncthreads();
}

__global__ void lane_exited(uint32_t* data) {
  if (threadIdx.x == 7) return;
  data[threadIdx.x] = __ballot_sync(kFull, true);
}

__global__ void not_in_mask(uint32_t* data) {
  data[threadIdx.x] = __ballot_sync(0x7fffffffu, true);
}

__global__ void other_mask(uint32_t* data) {
  data[threadIdx.x] = __ballot_sync(threadIdx.x == 3 ? 0xffu : kFull, true);
}

__global__ void other_collective(uint32_t* data) {
  if (threadIdx.x % 2) {
    data[threadIdx.x] = __ballot_sync(kFull, true);
  } else {
    data[threadIdx.x] = static_cast<uint32_t>(__any_sync(kFull, true));
  }
}

__global__ void source_not_in_mask(uint32_t* data) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_down_sync(0xffffu, threadIdx.x, 1);
}

// Three lanes wait in a circle.
__global__ void circle(uint32_t* data) {
  const unsigned lane = threadIdx.x;
  if (lane < 3) data[lane] = __ballot_sync(1u << lane | 1u << (lane + 1) % 3, true);
}

__global__ void misaligned(uint32_t* data) {
  const uint4 words = *reinterpret_cast<const uint4*>(data + threadIdx.x);
  data[128 + threadIdx.x] = words.x + words.w;
}

__global__ void misaligned_copy(float* data) {
  MOEKV_SHARED_MEMORY(float, tile);
  moekv::cuda::copy_async_16(tile + threadIdx.x * 4, data + threadIdx.x * 4 + 1);
  moekv::cuda::copy_async_wait<0>();
}

__global__ void dynamic_overrun(float* data) {
  MOEKV_SHARED_MEMORY(float, tile);
  tile[threadIdx.x] = data[threadIdx.x];
  if (threadIdx.x == 0) tile[blockDim.x] = 0;
}

// Through a pointer, so that no type tells the bound.
__global__ void static_overrun(float* data) {
  MOEKV_SHARED(float, tile, 64);
  float* const pointer = tile;
  pointer[threadIdx.x + 1 + static_cast<unsigned>(data[128])] = 0;
}

__global__ void read_overrun(float* data) { data[threadIdx.x] = data[threadIdx.x + 1024 - 63]; }
__global__ void write_overrun(float* data) { data[threadIdx.x + 1024 - 63] = 0; }

__global__ void never_written(float* data) {
  MOEKV_SHARED(float, tile, 64);
  if (threadIdx.x < 63) tile[threadIdx.x] = 0;
  __syncthreads();
  data[threadIdx.x] = tile[threadIdx.x];
}

__global__ void spin(uint32_t* data) {
  while (*static_cast<volatile uint32_t*>(data) == 0) __nanosleep(32);
}

__global__ void constant_written(uint32_t* data) {
  if (threadIdx.x == 0) data[0] = 5;
  data[1 + threadIdx.x] = threadIdx.x == 0 ? __ldg(data) : 0;
}

__global__ void no_dynamic_memory(float* data) {
  MOEKV_SHARED_MEMORY(float, tile);
  data[threadIdx.x] = tile[0];
}

__global__ void idle(float*) {}

}  // namespace

void selftest(const std::string& name, void* data) {
  auto* const floats = static_cast<float*>(data);
  auto* const words = static_cast<uint32_t*>(data);
  const std::map<std::string, std::function<void()>> tests = {
#define FLOATS(kernel, ...)                                                \
  {                                                                        \
    #kernel, [=] { MOEKV_LAUNCH((kernel), __VA_ARGS__, nullptr, floats); } \
  }
#define WORDS(kernel, ...)                                                \
  {                                                                       \
    #kernel, [=] { MOEKV_LAUNCH((kernel), __VA_ARGS__, nullptr, words); } \
  }
      WORDS(collectives, 1, 32, 0),
      FLOATS(scan<true>, 4, 256, 0),
      FLOATS(transpose<33>, 1, dim3(32, 8), 0),
      FLOATS(transpose<32>, 1, dim3(32, 8), 0),
      WORDS(multiply<__half>, 1, 32, 0),
      WORDS(multiply<__nv_bfloat16>, 1, 32, 0),
      FLOATS(stream<true>, 1, 128, 1024),
      {"hand_over<true, true>",
       [=] { MOEKV_LAUNCH((hand_over<true, true>), 50, 32, 0, nullptr, words); }},
      WORDS(take_turns, 60, 32, 0),
      WORDS(pass_on<true>, 12, 1, 0),
      WORDS(pass_on<false>, 12, 1, 0),
      FLOATS(convert, 256, 256, 0),
      FLOATS(numerics, 4, 256, 0),
      FLOATS(scan<false>, 4, 256, 0),
      FLOATS(stream<false>, 1, 128, 1024),
      {"hand_over<false, true>",
       [=] { MOEKV_LAUNCH((hand_over<false, true>), 50, 32, 0, nullptr, words); }},
      {"hand_over<true, false>",
       [=] { MOEKV_LAUNCH((hand_over<true, false>), 50, 32, 0, nullptr, words); }},
      WORDS(no_syncwarp, 1, 32, 0),
      WORDS(same_word, 1, 64, 0),
      WORDS(divergent_barrier, 1, 64, 0),
      WORDS(barrier_after_exit, 1, 64, 0),
      WORDS(barrier_in_branch, 1, 64, 0),
      WORDS(lane_elsewhere, 1, 64, 0),
      WORDS(lane_exited, 1, 32, 0),
      WORDS(not_in_mask, 1, 32, 0),
      WORDS(other_mask, 1, 32, 0),
      WORDS(other_collective, 1, 32, 0),
      WORDS(source_not_in_mask, 1, 32, 0),
      WORDS(circle, 1, 32, 0),
      WORDS(misaligned, 1, 32, 0),
      FLOATS(misaligned_copy, 1, 32, 512),
      FLOATS(dynamic_overrun, 1, 64, 256),
      FLOATS(static_overrun, 1, 64, 0),
      FLOATS(read_overrun, 1, 64, 0),
      FLOATS(write_overrun, 1, 64, 0),
      FLOATS(never_written, 1, 64, 0),
      WORDS(spin, 1, 32, 0),
      WORDS(constant_written, 1, 32, 0),
      FLOATS(no_dynamic_memory, 1, 32, 0),
      {"too_many_threads", [=] { MOEKV_LAUNCH(idle, 1, 1056, 0, nullptr, floats); }},
      {"no_blocks", [=] { MOEKV_LAUNCH(idle, 0, 32, 0, nullptr, floats); }},
      {"too_much_shared", [=] { MOEKV_LAUNCH(idle, 1, 32, 100 << 10, nullptr, floats); }},
      {"zero_overrun", [=] { moekv::cuda::zero_async("selftest", floats + 1, 4096, nullptr); }},
      {"host_reads", [=] { MOEKV_LAUNCH(idle, words[0] + 1, 32, 0, nullptr, floats); }},
#undef FLOATS
#undef WORDS
  };
  tests.at(name)();
}

}  // namespace simt

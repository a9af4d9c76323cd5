// CUDA's language and runtime, as far as csrc/cuda/device.h names them, for kernels compiled as
// C++20 and executed on the CPU: one fiber per thread, scheduled in a random order that a seed
// fixes. README.md beside this file says what is checked. machine.cpp holds the machine itself.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

// --- Language -----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

namespace simt {

// A thread's report of what is wrong, or the launcher's.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Site = std::source_location;

struct Index {
  unsigned x, y, z;
};
// They never change within a thread.
[[gnu::const]] Index thread_index();
[[gnu::const]] Index block_index();
[[gnu::const]] Index block_size();
[[gnu::const]] Index grid_size();

// Whether a bug that a test has put into the kernels is switched on; see kernels.py.
[[gnu::const]] bool seeded(int number);

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

// --- Types --------------------------------------------------------------------------------------

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Numbers in storage only, as the kernels use them.
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }

inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const unsigned bits = __float_as_uint(value);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const float sign = value.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return mantissa ? __uint_as_float(0x7fc00000u) : sign * __uint_as_float(0x7f800000u);
  }
  return sign * std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa),
                           std::max(exponent, 1) - 25);
}
inline __half __float2half_rn(float value) {
  const auto sign = static_cast<uint16_t>(__float_as_uint(value) >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // Steps of 2^-24 below the normal numbers, of 2^-10 of the power of two in them.
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps))};
}

// --- Arithmetic ---------------------------------------------------------------------------------

// Four of the eight bytes of two words, the first one's lower; a digit of `selector` for each.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = selector >> (4 * i) & 7;
    result |= static_cast<unsigned>(bytes >> (8 * byte) & 0xff) << (8 * i);
  }
  return result;
}
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) {
  return value ? std::countr_zero(static_cast<unsigned>(value)) + 1 : 0;
}

namespace simt {

// What the hardware's approximations may make of a number: up to two units in its last place more
// or less, always the same for the same number.
inline float approximate(float exact) {
  if (!std::isfinite(exact) || exact == 0.0f) return exact;
  const unsigned bits = __float_as_uint(exact);
  return __uint_as_float(bits + (bits * 2654435761u >> 8) % 5 - 2);
}

}  // namespace simt

inline float rsqrtf(float value) { return ::simt::approximate(1.0f / std::sqrt(value)); }
using std::isnan;

template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// --- Barriers and warp collectives --------------------------------------------------------------

namespace simt {

enum class Barrier : uint8_t { kSync, kOr, kAnd, kCount };
int barrier(Barrier kind, int predicate, Site site);

enum class Collective : uint8_t {
  kSyncWarp,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kReduceAdd,
  kReduceMin,
  kReduceMax,
  kMma,
};
// What a lane brings to a collective.
struct Offer {
  Collective kind;
  unsigned mask;
  uint32_t value = 0;
  int lane = 0, width = 32;  // of shuffles
  bool is_signed = false;    // of reductions
  // of kMma: A and B of 16-bit numbers
  float* d = nullptr;
  const uint32_t* a = nullptr;
  const uint32_t* b = nullptr;
  float (*to_float)(uint16_t) = nullptr;
};
uint32_t collective(const Offer& offer, Site site);

template <typename T>
T shuffle(Collective kind, unsigned mask, T value, int lane, int width, Site site) {
  static_assert(sizeof(T) == 4 && std::is_arithmetic_v<T>);
  return std::bit_cast<T>(collective({.kind = kind,
                                      .mask = mask,
                                      .value = std::bit_cast<uint32_t>(value),
                                      .lane = lane,
                                      .width = width},
                                     site));
}

}  // namespace simt

#define MOEKV_SITE ::simt::Site site = ::simt::Site::current()

inline void __syncthreads(MOEKV_SITE) { ::simt::barrier(::simt::Barrier::kSync, 0, site); }
inline int __syncthreads_or(int predicate, MOEKV_SITE) {
  return ::simt::barrier(::simt::Barrier::kOr, predicate, site);
}
inline int __syncthreads_and(int predicate, MOEKV_SITE) {
  return ::simt::barrier(::simt::Barrier::kAnd, predicate, site);
}
inline int __syncthreads_count(int predicate, MOEKV_SITE) {
  return ::simt::barrier(::simt::Barrier::kCount, predicate, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, MOEKV_SITE) {
  ::simt::collective({.kind = ::simt::Collective::kSyncWarp, .mask = mask}, site);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, MOEKV_SITE) {
  return ::simt::shuffle(::simt::Collective::kShuffle, mask, value, lane, width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MOEKV_SITE) {
  return ::simt::shuffle(::simt::Collective::kShuffleUp, mask, value, static_cast<int>(delta),
                         width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MOEKV_SITE) {
  return ::simt::shuffle(::simt::Collective::kShuffleDown, mask, value, static_cast<int>(delta),
                         width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, MOEKV_SITE) {
  return ::simt::shuffle(::simt::Collective::kShuffleXor, mask, value, lane_mask, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MOEKV_SITE) {
  return ::simt::collective(
      {.kind = ::simt::Collective::kBallot, .mask = mask, .value = predicate != 0}, site);
}
inline int __any_sync(unsigned mask, int predicate, MOEKV_SITE) {
  return static_cast<int>(::simt::collective(
      {.kind = ::simt::Collective::kAny, .mask = mask, .value = predicate != 0}, site));
}
inline int __all_sync(unsigned mask, int predicate, MOEKV_SITE) {
  return static_cast<int>(::simt::collective(
      {.kind = ::simt::Collective::kAll, .mask = mask, .value = predicate != 0}, site));
}

#define MOEKV_REDUCE(name, collective_kind)                                          \
  template <typename T>                                                              \
  T name(unsigned mask, T value, MOEKV_SITE) {                                       \
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);            \
    return static_cast<T>(::simt::collective({.kind = collective_kind,               \
                                              .mask = mask,                          \
                                              .value = static_cast<uint32_t>(value), \
                                              .is_signed = std::is_signed_v<T>},     \
                                             site));                                 \
  }
MOEKV_REDUCE(__reduce_add_sync, ::simt::Collective::kReduceAdd)
MOEKV_REDUCE(__reduce_min_sync, ::simt::Collective::kReduceMin)
MOEKV_REDUCE(__reduce_max_sync, ::simt::Collective::kReduceMax)
#undef MOEKV_REDUCE

// --- Memory -------------------------------------------------------------------------------------

namespace simt {

// An atomic is the pair of them: nothing else runs between.
uint64_t atomic_begin(const void* address, size_t size);
void atomic_end(void* address, size_t size, uint64_t value);

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T, typename Update>
T atomic(T* address, Update update) {
  const uint64_t bits = atomic_begin(address, sizeof(T));
  T old;
  std::memcpy(&old, &bits, sizeof old);
  atomic_end(address, sizeof(T), to_bits(static_cast<T>(update(old))));
  return old;
}

void fence();
void pause();                                          // lets others run
void load_constant(const void* address, size_t size);  // through the read-only cache
void* shared_array(const void* key, const char* name, size_t size, size_t alignment);
void* dynamic_shared();

}  // namespace simt

template <typename T>
T atomicAdd(T* address, T value) {
  return ::simt::atomic(address, [=](T old) { return old + value; });
}
template <typename T>
T atomicMin(T* address, T value) {
  return ::simt::atomic(address, [=](T old) { return min(old, value); });
}
template <typename T>
T atomicMax(T* address, T value) {
  return ::simt::atomic(address, [=](T old) { return max(old, value); });
}
template <typename T>
T atomicOr(T* address, T value) {
  return ::simt::atomic(address, [=](T old) { return old | value; });
}
template <typename T>
T atomicExch(T* address, T value) {
  return ::simt::atomic(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, T compare, T value) {
  return ::simt::atomic(address, [=](T old) { return old == compare ? value : old; });
}

template <typename T>
T __ldg(const T* address) {
  ::simt::load_constant(address, sizeof(T));
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
inline void __threadfence() { ::simt::fence(); }
inline void __nanosleep(unsigned) { ::simt::pause(); }

// The static's address tells one array of one instantiation from all others.
#define MOEKV_SHARED(type, name, size)             \
  static const char name##_key = 0;                \
  type(&name)[size] = *static_cast<type(*)[size]>( \
      ::simt::shared_array(&name##_key, #name, sizeof(type[size]), alignof(type)))
#define MOEKV_SHARED_MEMORY(type, name) type* name = static_cast<type*>(::simt::dynamic_shared())

// --- Launches and what stands for PTX -----------------------------------------------------------

namespace simt {

// Calls `kernel` with a copy of `arguments` on the thread's stack.
struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;
  const void* stream;
  const void* arguments;
  size_t arguments_size;
  void (*run)(const void* arguments);
};
void launch(const Launch& launch);
void check_stream(const char* what, const void* stream);  // throws if it is not the op's

template <typename... Parameters, typename... Args>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, void* stream, Args... args) {
  const auto call = [=] { kernel(args...); };
  static_assert(std::is_trivially_copyable_v<decltype(call)>);
  static_assert((0 + ... + sizeof(Parameters)) <= 4096, "more than 4 KiB of kernel parameters");
  launch({name, grid, block, shared_bytes, stream, &call, sizeof call,
          [](const void* copy) { (*static_cast<const decltype(call)*>(copy))(); }});
}

extern int compute_capability;  // of the simulated device, times 10

void zero(void* pointer, size_t bytes);
void copy_async_16(void* shared, const void* global);
void copy_async_commit();
void copy_async_wait(int pending);

}  // namespace simt

#define MOEKV_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::simt::launch_kernel(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace moekv::cuda {

struct ComputeCapability {
  int major, minor;
};
inline ComputeCapability compute_capability(const char*) {
  return {::simt::compute_capability / 10, ::simt::compute_capability % 10};
}
inline void zero_async(const char* op, void* pointer, size_t bytes, void* stream) {
  ::simt::check_stream(op, stream);
  ::simt::zero(pointer, bytes);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MOEKV_SITE) {
  ::simt::collective({.kind = ::simt::Collective::kMma,
                      .mask = 0xffffffffu,
                      .d = d,
                      .a = a,
                      .b = b,
                      .to_float =
                          [](uint16_t bits) {
                            if constexpr (std::is_same_v<T, __half>) return __half2float({bits});
                            if constexpr (std::is_same_v<T, __nv_bfloat16>) {
                              return __bfloat162float({bits});
                            }
                          }},
                     site);
}

inline float exp2_fast(float x) {
  const float result = std::exp2(x);
  if (result < 0x1p-120f) return result < 0x1p-126f ? 0.0f : result;
  return x == 0.0f ? 1.0f : ::simt::approximate(result);
}

inline void copy_async_16(void* shared, const void* global) {
  ::simt::copy_async_16(shared, global);
}
inline void copy_async_commit() { ::simt::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  ::simt::copy_async_wait(kPending);
}

}  // namespace moekv::cuda

#undef MOEKV_SITE

// The only door between the kernels and CUDA: everything that csrc/cuda uses of the CUDA language,
// its runtime and PTX comes through this header. Compiled with -DMOEKV_SIMT it includes "simt.h"
// instead, which executes the same kernels on the CPU; simt.h provides
//
//   language    __global__ __device__ __host__ __forceinline__ __launch_bounds__ __restrict__
//               threadIdx blockIdx blockDim gridDim (x, y, z), dim3, cudaStream_t
//   types       __half __nv_bfloat16 uint2 uint4 int4 float2 float4 and their make_ functions
//   conversion  __half2float __bfloat162float __float2half_rn __float2bfloat16_rn
//               __float_as_uint __uint_as_float
//   barriers    __syncthreads __syncthreads_or __syncwarp
//   warp        __shfl_sync __shfl_up_sync __shfl_xor_sync (int, unsigned, float, with width),
//               __ballot_sync __any_sync __all_sync __reduce_add_sync (int, unsigned)
//   bits        __popc __ffs __clz __byte_perm
//   memory      __ldg __ldcg (through L2, for what other blocks write) __threadfence
//               __nanosleep (lets other threads and blocks run)
//               atomicAdd (int, unsigned, unsigned long long), atomicOr atomicMax (unsigned)
//   math        expf exp2f logf log2f sqrtf rsqrtf tanhf fmaf fminf fmaxf fabsf rintf isnan min max
//   and the macros and functions below, with the same contracts.
//
//   MOEKV_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)
//       Launches a kernel, a template in parentheses, and throws if the launch fails.
//   MOEKV_SHARED_MEMORY(type, name)   type* name: the launch's shared_bytes, 16-byte aligned
//   MOEKV_SHARED(type, name, size)    type name[size]: shared memory of a fixed size
//
//   mma_m16n8k16<T>(d, a, b)          one warp's D += A B; T is __half or __nv_bfloat16
//   copy_async_16(shared, global)     starts a copy of 16 aligned bytes to shared memory
//   copy_async_commit()               closes a group of copies
//   copy_async_wait<n>()              waits for all but the last n groups of this thread
//   exp2_fast(x)                      2^x within 2 ulp; subnormals may be 0
//   compute_capability(op)            of the current device
//   zero_async(op, pointer, bytes, stream)
//
// Memory is read and written through pointers to wider types: compile with -fno-strict-aliasing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef MOEKV_SIMT
#include "simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace moekv::cuda {

// `what` names the kernel or the call; the op's name is in the kernel's.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  const bool no_image = status == cudaErrorNoKernelImageForDevice;
  throw std::runtime_error(
      std::string("moekv::cuda: ") + what + " failed: " + cudaGetErrorString(status) +
      (no_image ? "; `python -m moekv info` lists what the library was compiled for" : ""));
}

// More than 48 KiB of dynamic shared memory must be asked for per kernel.
template <typename Kernel, typename... Args>
void launch(const char* name, Kernel* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            void* stream, Args... args) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), name);
}

#define MOEKV_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::moekv::cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#define MOEKV_SHARED(type, name, size) __shared__ type name[size]
#define MOEKV_SHARED_MEMORY(type, name)                         \
  extern __shared__ __align__(16) unsigned char moekv_shared[]; \
  type* name = reinterpret_cast<type*>(moekv_shared)

struct ComputeCapability {
  int major, minor;
};
inline ComputeCapability compute_capability(const char* op) {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), op);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), op);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), op);
  return {major, minor};
}

inline void zero_async(const char* op, void* pointer, size_t bytes, void* stream) {
  if (bytes > 0) {
    check(cudaMemsetAsync(pointer, 0, bytes, static_cast<cudaStream_t>(stream)), op);
  }
}

// PTX's mma.m16n8k16 with fp32 accumulation. Lane l has row g = l / 4 and column t = l % 4 of each
// fragment; a pair is two neighbouring 16-bit elements, the lower index in the lower half.
//   a[0] = A[g    ][2t, 2t+1]   a[2] = A[g    ][2t+8, 2t+9]      (A is 16 x 16)
//   a[1] = A[g + 8][2t, 2t+1]   a[3] = A[g + 8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]       b[1] = B[2t+8, 2t+9][g]          (B is 16 x 8)
//   d[0], d[1] = D[g][2t, 2t+1] d[2], d[3] = D[g + 8][2t, 2t+1]  (D is 16 x 8)
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace moekv::cuda

#endif  // MOEKV_SIMT

namespace moekv::cuda {

// Every launcher calls it first: mma.m16n8k16 and cp.async came with 8.0.
inline void check_device(const char* op) {
  const auto [major, minor] = compute_capability(op);
  if (major < 8) {
    throw std::runtime_error(std::string("moekv::") + op +
                             ": expected a GPU of compute capability 8.0 or higher, got " +
                             std::to_string(major) + "." + std::to_string(minor));
  }
}

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// The number that the bits of a half are.
__device__ __forceinline__ float half_of(uint16_t bits) {
  __half half;
  memcpy(&half, &bits, sizeof half);
  return to_float(half);
}

// Within 2 ulp; 0 where b is above 2^126.
__device__ __forceinline__ float divide_fast(float a, float b) {
#ifdef MOEKV_SIMT
  return a / b;
#else
  return __fdividef(a, b);
#endif
}

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// 16 aligned bytes of T as fp32.
template <typename T>
constexpr int kPackSize = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ uint4 load_bits(const T* source) {
  return *reinterpret_cast<const uint4*>(source);
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& bits, float (&pack)[kPackSize<T>]) {
  T elements[kPackSize<T>];
  memcpy(elements, &bits, sizeof bits);
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) pack[i] = to_float(elements[i]);
}

template <typename T>
__device__ __forceinline__ void load_pack(const T* source, float (&pack)[kPackSize<T>]) {
  unpack<T>(load_bits(source), pack);
}

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace moekv::cuda

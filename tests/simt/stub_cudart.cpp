// Stands for the CUDA runtime beneath kernels that nvcc has compiled, the real half of device.h
// with them: what the host asks for is checked as a driver would, and written down. Nothing runs.
#include "stub_cudart.h"

#include <map>
#include <utility>

#include "machine.h"

namespace simt {
namespace {

enum Status { kSuccess = 0, kInvalidValue = 1, kInvalidDeviceFunction = 98, kNoKernelImage = 209 };
constexpr int kMaxDynamicShared = 8, kMajor = 75, kMinor = 76;  // attributes, as CUDA numbers them
constexpr size_t kDefaultShared = 48 * 1024;

struct Kernel {
  std::string name;                        // mangled
  size_t allowed_shared = kDefaultShared;  // dynamic
};

// Kernels register while the library is loaded, perhaps before this file's objects are made.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> kernels;
  return kernels;
}
std::map<std::string, Limits> limits;
std::vector<HostLaunch> launches;
std::string last_error;
int last_status = kSuccess, next_status = kSuccess;

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};
Configuration pushed;

int refuse(int status, const std::string& what) {
  last_status = status;
  last_error = what;
  return status;
}

int launch_kernel(const void* function, dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  if (next_status != kSuccess) return refuse(std::exchange(next_status, kSuccess), "as told");
  const auto found = kernels().find(function);
  if (found == kernels().end()) return refuse(kInvalidDeviceFunction, "no such kernel");
  const Kernel& kernel = found->second;
  const Limits& limit = limits[kernel.name];
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  try {
    check_stream(kernel.name.c_str(), stream);
    check_size(kernel.name.c_str(), grid, block, shared_bytes + limit.static_shared);
  } catch (const Error& error) {
    return refuse(kInvalidValue, error.what());
  }
  if (shared_bytes > kernel.allowed_shared) {
    return refuse(kInvalidValue, "expected at most the " + std::to_string(kernel.allowed_shared) +
                                     " bytes of dynamic shared memory that were asked for, got " +
                                     std::to_string(shared_bytes));
  }
  if (limit.threads > 0 && threads > limit.threads) {
    return refuse(kInvalidValue, "expected at most " + std::to_string(limit.threads) +
                                     " threads, as the launch bounds say, got " +
                                     std::to_string(threads));
  }
  launches.push_back({kernel.name, threads, shared_bytes});
  return kSuccess;
}

}  // namespace

void set_limits(const std::string& kernel, const Limits& limit) { limits[kernel] = limit; }
std::vector<HostLaunch> take_launches() { return std::exchange(launches, {}); }
std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& [function, kernel] : kernels()) names.push_back(kernel.name);
  return names;
}
void fail_next_launch(int status) { next_status = status; }

}  // namespace simt

// --- What compiled code calls -------------------------------------------------------------------

using namespace simt;

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  kernels()[function].name = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  *static_cast<void**>(stream) = pushed.stream;
  return kSuccess;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return kSuccess;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared_bytes,
                       void* stream) {
  return launch_kernel(kernel, grid, block, shared_bytes, stream);
}
int cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared_bytes,
                     void* stream) {
  return launch_kernel(function, grid, block, shared_bytes, stream);
}

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return refuse(kInvalidDeviceFunction, "no such kernel");
  if (attribute != kMaxDynamicShared) return refuse(kInvalidValue, "no such attribute");
  const size_t room = kMaxShared - limits[found->second.name].static_shared;
  if (static_cast<size_t>(value) > room) {
    return refuse(kInvalidValue, "expected at most " + std::to_string(room) +
                                     " bytes of dynamic shared memory, got " +
                                     std::to_string(value));
  }
  found->second.allowed_shared = static_cast<size_t>(value);
  return kSuccess;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != kMajor && attribute != kMinor) return kInvalidValue;
  *value = attribute == kMajor ? compute_capability / 10 : compute_capability % 10;
  return kSuccess;
}
int cudaMemsetAsync(void* pointer, int value, size_t bytes, void* stream) {
  try {
    check_stream("cudaMemsetAsync", stream);
    if (value != 0) throw Error("expected zeros");
    zero(pointer, bytes);
  } catch (const Error& error) {
    return refuse(kInvalidValue, error.what());
  }
  return kSuccess;
}
int cudaGetLastError() { return std::exchange(last_status, kSuccess); }
const char* cudaGetErrorString(int status) {
  return status == kNoKernelImage ? "no kernel image is available for execution on the device"
                                  : last_error.c_str();
}
}

// The kernels on inputs of their own: what the C++ benchmarks run. No torch, no Python. Compiled
// for one backend, like csrc/ops: MOEKV_BACKEND names its namespace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/params.h"

namespace moekv::bench {

// Memory that host and kernels see, aligned as torch's; throws std::bad_alloc.
void* allocate(size_t bytes);
void release(void* memory);

// What a kernel writes. Rounded numbers may differ between instruction sets, all else may not.
struct Output {
  enum class Kind { kFloat, kBFloat16, kHalf, kExact, kCodes };

  void* data;
  int64_t count;  // numbers; bytes, where these have to be the same
  Kind kind;
};

struct Workload {
  std::string name;  // of the kernel, and of what it is asked for
  int64_t moved;     // bytes to read or write, each as often as the algorithm needs it
  std::function<void(const Kernels&)> run;
  std::vector<Output> outputs;
};

// Every kernel on the attention of Llama-3.1-8B (32 query heads, 8 KV heads of 128 channels, bf16)
// behind `num_keys` positions. The inputs are the same in every run.
std::vector<Workload> workloads(int64_t num_keys);

}  // namespace moekv::bench

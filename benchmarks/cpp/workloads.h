// The CPU kernels on inputs of their own: what the C++ benchmarks run. No torch, no Python.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace moekv::bench {

struct Workload {
  std::string name;  // of the kernel, and of what it is asked for
  int64_t moved;     // bytes to read or write, each as often as the algorithm needs it
  std::function<void(const cpu::Kernels&)> run;
};

// Every kernel on the attention of Llama-3.1-8B (32 query heads, 8 KV heads of 128 channels, bf16)
// behind `num_keys` positions. The inputs are the same in every run.
std::vector<Workload> workloads(int64_t num_keys);

}  // namespace moekv::bench

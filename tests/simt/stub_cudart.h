// What tests ask of stub_cudart.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

// Of a kernel, by its mangled name, as the compiler says.
struct Limits {
  uint64_t threads = 0;  // of a block; 0: not told
  size_t static_shared = 0;
};
void set_limits(const std::string& kernel, const Limits& limits);

struct HostLaunch {
  std::string kernel;
  uint64_t threads;
  size_t shared_bytes;
};
std::vector<HostLaunch> take_launches();  // since the last call
std::vector<std::string> kernel_names();
void fail_next_launch(int status);

}  // namespace simt

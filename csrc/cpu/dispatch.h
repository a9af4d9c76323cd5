// The instruction sets that the kernels were compiled for. The ops use the best one that there is;
// the C++ benchmarks go through all.
#pragma once

#include <span>

#include "kernels.h"

namespace moekv::cpu {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool supported;  // by this processor and system
};

// From the lowest to the best.
std::span<const Isa> isas();

}  // namespace moekv::cpu

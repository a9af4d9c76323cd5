// The table of CPU kernels of one instruction set. csrc/cpu/isa.cpp is compiled once per
// instruction set, with MOEKV_ISA naming the namespace, and includes every kernel.
//
// Kernels live in anonymous namespaces and use no inline or template code from outside (no std::
// containers or algorithms): the linker may keep any one copy of such code, and one that was
// compiled for AVX-512 would crash an older processor. tests/tools/test_build.py looks for such
// symbols.
#pragma once

#include "../params.h"

namespace moekv::cpu {

namespace isa_default {
extern const Kernels kernels;
}
namespace isa_avx2 {
extern const Kernels kernels;
}
namespace isa_avx512 {
extern const Kernels kernels;
}
namespace isa_amx {
extern const Kernels kernels;
}

}  // namespace moekv::cpu

// The instruction set in use: the best of this processor ("default", "avx2", "avx512" or "amx"), or
// the lower one that the environment variable MOEKV_CPU_CAPABILITY names; null if it names
// something else, which makes every op throw. Read once. For Python's ctypes.
extern "C" __attribute__((visibility("default"))) const char* moekv_cpu_capability();

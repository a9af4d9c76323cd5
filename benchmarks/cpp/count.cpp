// Runs every CPU kernel of one instruction set once, inside moekv_counted, whose instructions
// valgrind's callgrind counts (tools/instruction_counts.py). Of the instruction sets, those that
// valgrind knows. Prints what decides on the machine code beside the sources, then the kernels.
#include <gnu/libc-version.h>

#include <cstdio>
#include <cstring>

#include "../../csrc/cpu/kernels.h"
#include "workloads.h"

extern "C" __attribute__((noinline)) void moekv_counted(const moekv::bench::Workload& workload,
                                                        const moekv::Kernels& kernels) {
  workload.run(kernels);
}

int main(int argc, char** argv) {
  constexpr int64_t kNumKeys = 512;
#ifdef __clang__
  std::printf("%s", __VERSION__);
#else
  std::printf("GCC %s", __VERSION__);
#endif
  std::printf(", glibc %s\n", gnu_get_libc_version());
  const moekv::Kernels* kernels = nullptr;
  if (argc == 2 && std::strcmp(argv[1], "default") == 0) {
    kernels = &moekv::cpu::isa_default::kernels;
  }
#ifdef MOEKV_X86_ISAS
  if (argc == 2 && std::strcmp(argv[1], "avx2") == 0) kernels = &moekv::cpu::isa_avx2::kernels;
#endif
  if (!kernels) {
    std::fprintf(stderr, "usage: moekv_count default|avx2\n");
    return 1;
  }
  for (const moekv::bench::Workload& workload : moekv::bench::workloads(kNumKeys)) {
    moekv_counted(workload, *kernels);
    std::puts(workload.name.c_str());
  }
}

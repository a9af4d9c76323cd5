// One thread for the CPU kernels, without a pool: what is measured is the kernels' own speed.
#include "../../csrc/cpu/parallel.h"

namespace moekv::cpu {

void parallel_for_impl(int64_t begin, int64_t end, int64_t, RangeFunction function, void* context) {
  if (begin < end) function(begin, end, context);
}

int64_t num_threads() { return 1; }

}  // namespace moekv::cpu

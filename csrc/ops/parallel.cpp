#include "../cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace moekv::cpu {

void parallel_for_impl(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                       void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t range_begin, int64_t range_end) {
    function(range_begin, range_end, context);
  });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace moekv::cpu

// Threads for the CPU kernels. Who links the kernels provides parallel_for_impl and num_threads:
// the ops use torch's thread pool, the C++ benchmarks their own.
#pragma once

#include <cstdint>

namespace moekv::cpu {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls function on disjoint ranges that cover [begin, end), each of at least `grain` items but the
// last. Which thread gets which range is not defined: results must not depend on it. A call from
// within a range runs on its thread alone.
void parallel_for_impl(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                       void* context);

// How many threads parallel_for uses at most: to divide the work well, never to define a result.
int64_t num_threads();

namespace {

template <typename Function>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Function& function) {
  if (end <= begin) return;
  parallel_for_impl(
      begin, end, grain,
      [](int64_t range_begin, int64_t range_end, void* context) {
        (*static_cast<const Function*>(context))(range_begin, range_end);
      },
      const_cast<void*>(static_cast<const void*>(&function)));
}

}  // namespace
}  // namespace moekv::cpu

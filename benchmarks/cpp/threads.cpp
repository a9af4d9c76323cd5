// Runs every CPU kernel on several threads, in parts as small as it allows, so that the compiler's
// thread sanitizer sees what they share: a pool of torch's would hide its own barriers from it.
//   moekv_threads [num_keys]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/parallel.h"
#include "workloads.h"

namespace moekv::cpu {
namespace {

constexpr int64_t kThreads = 4;
thread_local bool in_range = false;
int64_t most_ranges = 0;  // that one loop of a workload was cut into

}  // namespace

void parallel_for_impl(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                       void* context) {
  if (in_range) return function(begin, end, context);
  const int64_t step = std::max<int64_t>(grain, 1);
  most_ranges = std::max(most_ranges, (end - begin + step - 1) / step);
  // In turns, not to whoever comes: a thread that starts late would find no work left.
  const auto work = [&](int64_t thread) {
    in_range = true;
    for (int64_t at = begin + thread * step; at < end; at += kThreads * step) {
      function(at, std::min(at + step, end), context);
    }
    in_range = false;
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < kThreads; ++i) threads.emplace_back(work, i);
  work(0);
  for (std::thread& thread : threads) thread.join();
}

int64_t num_threads() { return kThreads; }

}  // namespace moekv::cpu

int main(int argc, char** argv) {
  const int64_t num_keys = argc > 1 ? std::atoll(argv[1]) : 2560;  // two tiles of mix_scores
  for (const moekv::bench::Workload& workload : moekv::bench::workloads(num_keys)) {
    for (const moekv::cpu::Isa& isa : moekv::cpu::isas()) {
      if (!isa.supported) continue;
      moekv::cpu::most_ranges = 0;
      workload.run(*isa.kernels);
      std::printf("%s/%s\n", workload.name.c_str(), isa.name);
      if (moekv::cpu::most_ranges < 2) {
        std::printf("expected a loop of several ranges, got one\n");
        return 1;
      }
    }
  }
}

// Times every CPU kernel on every instruction set that this processor has, on one thread:
//   moekv_bench --benchmark_filter='ragged_attention.*/avx512/32768'
#include <benchmark/benchmark.h>

#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "workloads.h"

namespace {

using moekv::bench::Workload;

// The limit: as many bytes, read and written by memcpy.
void copy(benchmark::State& state, int64_t moved) {
  const std::vector<char> source(static_cast<size_t>(moved / 2), 1);
  std::vector<char> target(source.size());
  for ([[maybe_unused]] auto _ : state) {
    std::memcpy(target.data(), source.data(), source.size());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * moved);
}

void kernel(benchmark::State& state, const Workload& workload, const moekv::cpu::Isa& isa) {
  workload.run(*isa.kernels);  // first touches
  for ([[maybe_unused]] auto _ : state) {
    workload.run(*isa.kernels);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * workload.moved);
}

}  // namespace

int main(int argc, char** argv) {
  for (const int64_t num_keys : {int64_t{8192}, int64_t{32768}}) {
    for (const Workload& workload : moekv::bench::workloads(num_keys)) {
      std::string keys(1, '/');
      keys += std::to_string(num_keys);
      for (const moekv::cpu::Isa& isa : moekv::cpu::isas()) {
        if (!isa.supported) continue;
        benchmark::RegisterBenchmark((workload.name + "/" + isa.name + keys).c_str(), kernel,
                                     workload, isa)
            ->Unit(benchmark::kMillisecond);
      }
      benchmark::RegisterBenchmark((workload.name + "/copy" + keys).c_str(), copy, workload.moved)
          ->Unit(benchmark::kMillisecond);
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

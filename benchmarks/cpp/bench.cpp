// Times every CPU kernel on every instruction set that this processor has, on one thread:
//   moekv_bench --benchmark_filter='ragged_attention.*/avx512/32768'
// Before a kernel is timed, what it writes is compared with what the one without vector
// instructions writes: one that differs is not timed, and the exit status is 1.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "workloads.h"

namespace {

using moekv::bench::Output;
using moekv::bench::Workload;
using Bytes = std::vector<char>;

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

size_t size_of(const Output& output) {
  const auto count = static_cast<size_t>(output.count);
  switch (output.kind) {
    case Output::Kind::kFloat:
      return 4 * count;
    case Output::Kind::kBFloat16:
    case Output::Kind::kHalf:
      return 2 * count;
    default:
      return count;
  }
}

// What a kernel writes; memory is then as it was, as some write to what they read.
std::vector<Bytes> written_by(const Workload& workload, const moekv::cpu::Isa& isa) {
  std::vector<Bytes> before, after;
  for (const Output& output : workload.outputs) {
    const char* data = static_cast<const char*>(output.data);
    before.emplace_back(data, data + size_of(output));
  }
  workload.run(*isa.kernels);
  for (size_t i = 0; i < before.size(); ++i) {
    char* data = static_cast<char*>(workload.outputs[i].data);
    after.emplace_back(data, data + before[i].size());
    std::memcpy(data, before[i].data(), before[i].size());
  }
  return after;
}

float number(const Output& output, const Bytes& bytes, int64_t i) {
  if (output.kind == Output::Kind::kHalf) {
    _Float16 half;
    std::memcpy(&half, bytes.data() + 2 * i, 2);
    return static_cast<float>(half);
  }
  float found = 0.0f;  // of bfloat16 the upper half
  const size_t size = output.kind == Output::Kind::kFloat ? 4 : 2;
  std::memcpy(reinterpret_cast<char*>(&found) + 4 - size, bytes.data() + size * i, size);
  return found;
}

// Rounded numbers may differ after sums in another order. One in 5,000 may differ by more:
// codes of numbers at the border of two, pairs that two others resemble as much.
bool agree(const Output& output, const Bytes& ours, const Bytes& plain) {
  if (output.kind == Output::Kind::kExact) return ours == plain;
  int64_t differ = 0;
  if (output.kind == Output::Kind::kCodes) {
    for (size_t i = 0; i < ours.size(); ++i) differ += ours[i] != plain[i];
  } else {
    const float tolerance = output.kind == Output::Kind::kFloat ? 2e-3f : 2e-2f;
    for (int64_t i = 0; i < output.count; ++i) {
      const float one = number(output, ours, i), other = number(output, plain, i);
      if (one == other) continue;  // infinities, too
      differ += !(std::abs(one - other) <= tolerance * (1 + std::abs(other)));
    }
  }
  return differ <= output.count / 5000;
}

bool all_agree = true;

bool is_right(const Workload& workload, const moekv::cpu::Isa& isa) {
  const std::vector<Bytes> ours = written_by(workload, isa);
  const std::vector<Bytes> plain = written_by(workload, moekv::cpu::isas().front());
  for (size_t i = 0; i < ours.size(); ++i) {
    if (!agree(workload.outputs[i], ours[i], plain[i])) return all_agree = false;
  }
  return true;
}

void kernel(benchmark::State& state, const Workload& workload, const moekv::cpu::Isa& isa,
            int64_t num_keys) {
  static std::map<std::pair<std::string, int64_t>, bool> known;  // called until times are steady
  const auto key = std::make_pair(workload.name + isa.name, num_keys);
  if (!known.contains(key)) known[key] = is_right(workload, isa);
  if (!known[key]) {
    state.SkipWithError("differs from what the kernel without vector instructions writes");
    return;
  }
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
      // Grows with the square of the keys: minutes without vector instructions.
      if (workload.name == "fold_pairs" && num_keys > 8192) continue;
      std::string keys(1, '/');
      keys += std::to_string(num_keys);
      for (const moekv::cpu::Isa& isa : moekv::cpu::isas()) {
        if (!isa.supported) continue;
        benchmark::RegisterBenchmark((workload.name + "/" + isa.name + keys).c_str(), kernel,
                                     workload, isa, num_keys)
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
  return all_agree ? 0 : 1;
}

// Times every CUDA kernel on the first GPU, with cold caches, beside a copy of as many bytes:
//   moekv_bench_cuda [part of a name]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/backend.h"
#include "workloads.h"

namespace moekv::bench {
namespace {

constexpr int kRepeats = 30;
constexpr size_t kFlushBytes = size_t{512} << 20;  // several times any L2 cache

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

template <typename Params, void (*kLaunch)(const Params&, cuda::Stream)>
void on_the_default_stream(const Params& params) {
  kLaunch(params, nullptr);
}

constexpr Kernels kKernels = {
    .gating_topk = on_the_default_stream<GatingTopkParams, cuda::gating_topk>,
    .expert_scores = on_the_default_stream<ExpertScoresParams, cuda::expert_scores>,
    .expected_attention = on_the_default_stream<ExpectedAttentionParams, cuda::expected_attention>,
    .project_tokens = on_the_default_stream<ProjectTokensParams, cuda::project_tokens>,
    .mix_scores = on_the_default_stream<MixScoresParams, cuda::mix_scores>,
    .select_kept = on_the_default_stream<SelectKeptParams, cuda::select_kept>,
    .kv_compact = on_the_default_stream<KvCompactParams, cuda::kv_compact>,
    .quantize_pairs = on_the_default_stream<QuantizePairsParams, cuda::quantize_pairs>,
    .fold_pairs = nullptr,  // there is no kernel yet, and no workload asks for it
    .ragged_attention = on_the_default_stream<RaggedAttentionParams, cuda::ragged_attention>,
};

// On the device, and gone with the benchmark.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) { check(cudaMalloc(&data_, bytes)); }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Median of the times of a few calls, in seconds. The flush of the caches keeps the GPU busy while
// the host queues the call, so no launch is waited for.
double seconds(const std::function<void()>& call, const DeviceMemory& flush) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i < kRepeats + 3; ++i) {
    check(cudaMemsetAsync(flush.data(), i, kFlushBytes));
    check(cudaEventRecord(begin));
    call();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 3) times.push_back(milliseconds * 1e-3);  // the first bring the inputs to the device
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void run(const std::string& wanted) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    throw std::runtime_error("expected a CUDA device, found none");
  }
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s\n\n| kernel | keys | us | GB/s | of a copy |\n|---|---:|---:|---:|---:|\n",
              properties.name);
  const DeviceMemory flush(kFlushBytes);
  for (const int64_t num_keys : {int64_t{4096}, int64_t{32768}, int64_t{131072}}) {
    for (const Workload& workload : workloads(num_keys)) {
      if (workload.name.find(wanted) == std::string::npos) continue;
      const auto half = static_cast<size_t>(workload.moved / 2);
      const DeviceMemory source(half), target(half);
      const auto copy = [&] {
        check(cudaMemcpyAsync(target.data(), source.data(), half, cudaMemcpyDeviceToDevice));
      };
      const double time = seconds([&] { workload.run(kKernels); }, flush);
      const double copied = seconds(copy, flush);
      std::printf("| `%s` | %lld | %.1f | %.0f | %.0f %% |\n", workload.name.c_str(),
                  static_cast<long long>(num_keys), time * 1e6,
                  static_cast<double>(workload.moved) / time * 1e-9, copied / time * 100);
      std::fflush(stdout);
    }
  }
}

}  // namespace

// Managed, so that the host can fill it; it moves to the device with its first use there.
void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (cudaMallocManaged(&memory, bytes) != cudaSuccess) throw std::bad_alloc();
  return memory;
}
void release(void* memory) { cudaFree(memory); }

}  // namespace moekv::bench

int main(int argc, char** argv) {
  try {
    moekv::bench::run(argc > 1 ? argv[1] : "");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "moekv_bench_cuda: %s\n", error.what());
    return 1;
  }
}

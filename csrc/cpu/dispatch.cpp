// Picks the instruction set once, and offers the kernels as the CPU backend.
#include <cstdlib>
#include <cstring>

#include "../backend.h"
#include "kernels.h"

namespace moekv::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
};

// From the lowest to the best that this processor runs.
int supported_isas(Isa (&isas)[3]) {
  int count = 0;
  isas[count++] = {"default", &isa_default::kernels};
#ifdef MOEKV_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    isas[count++] = {"avx2", &isa_avx2::kernels};
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      isas[count++] = {"avx512", &isa_avx512::kernels};
    }
  }
#endif
  return count;
}

const Isa& isa() {
  static const Isa chosen = [] {
    Isa isas[3];
    const int count = supported_isas(isas);
    const char* wanted = std::getenv("MOEKV_CPU_CAPABILITY");
    for (int i = 0; wanted && i < count; ++i) {
      if (std::strcmp(wanted, isas[i].name) == 0) return isas[i];
    }
    return isas[count - 1];
  }();
  return chosen;
}

}  // namespace

const char* capability() { return isa().name; }

void gating_topk(const GatingTopkParams& params, Stream) { isa().kernels->gating_topk(params); }
void expert_scores(const ExpertScoresParams& params, Stream) {
  isa().kernels->expert_scores(params);
}
void mix_scores(const MixScoresParams& params, Stream) { isa().kernels->mix_scores(params); }
void select_kept(const SelectKeptParams& params, Stream) { isa().kernels->select_kept(params); }
void kv_compact(const KvCompactParams& params, Stream) { isa().kernels->kv_compact(params); }
void ragged_attention(const RaggedAttentionParams& params, Stream) {
  isa().kernels->ragged_attention(params);
}

}  // namespace moekv::cpu

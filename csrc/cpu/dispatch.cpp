// Picks the instruction set once, and offers the kernels as the CPU backend.
#ifdef MOEKV_X86_ISAS
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../backend.h"
#include "dispatch.h"

namespace moekv::cpu {
namespace {

#ifdef MOEKV_X86_ISAS
// Asked of the processor, as clang 16 has no name for it in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

// Whether there are tiles of bf16 and of int8, and the system lets this process use them. Linux
// wants to be asked, for their 8 KiB a thread.
bool may_use_amx() {
#ifdef __linux__
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kNeeded = kAmxBf16 | kAmxTile | kAmxInt8;
  if ((edx & kNeeded) != kNeeded) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

auto detect() {
  std::array isas{
      Isa{"default", &isa_default::kernels, true},
#ifdef MOEKV_X86_ISAS
      Isa{"avx2", &isa_avx2::kernels, false},
      Isa{"avx512", &isa_avx512::kernels, false},
      Isa{"amx", &isa_amx::kernels, false},
#endif
  };
#ifdef MOEKV_X86_ISAS
  __builtin_cpu_init();
  isas[1].supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  isas[2].supported = isas[1].supported && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  isas[3].supported = isas[2].supported && __builtin_cpu_supports("avx512bf16") && may_use_amx();
#endif
  return isas;
}

// null: the environment names none of them.
const Isa* choose() {
  const char* wanted = std::getenv("MOEKV_CPU_CAPABILITY");
  const Isa* best = nullptr;
  for (const Isa& isa : isas()) {
    if (isa.supported) best = &isa;
    if (wanted && std::strcmp(wanted, isa.name) == 0) return best;
  }
  return wanted ? nullptr : best;
}

const Isa* chosen() {
  static const Isa* const isa = choose();
  return isa;
}

const Kernels& kernels() {
  if (!chosen()) {
    throw std::runtime_error(
        std::string(
            "moekv: expected MOEKV_CPU_CAPABILITY to be default, avx2, avx512 or amx, got '") +
        std::getenv("MOEKV_CPU_CAPABILITY") + "'");
  }
  return *chosen()->kernels;
}

}  // namespace

std::span<const Isa> isas() {
  static const auto all = detect();
  return all;
}

void gating_topk(const GatingTopkParams& params, Stream) { kernels().gating_topk(params); }
void expert_scores(const ExpertScoresParams& params, Stream) { kernels().expert_scores(params); }
void expected_attention(const ExpectedAttentionParams& params, Stream) {
  kernels().expected_attention(params);
}
void project_tokens(const ProjectTokensParams& params, Stream) { kernels().project_tokens(params); }
void mix_scores(const MixScoresParams& params, Stream) { kernels().mix_scores(params); }
void select_kept(const SelectKeptParams& params, Stream) { kernels().select_kept(params); }
void kv_compact(const KvCompactParams& params, Stream) { kernels().kv_compact(params); }
void quantize_pairs(const QuantizePairsParams& params, Stream) { kernels().quantize_pairs(params); }
void fold_pairs(const FoldPairsParams& params, Stream) { kernels().fold_pairs(params); }
void ragged_attention(const RaggedAttentionParams& params, Stream) {
  kernels().ragged_attention(params);
}

}  // namespace moekv::cpu

const char* moekv_cpu_capability() {
  return moekv::cpu::chosen() ? moekv::cpu::chosen()->name : nullptr;
}

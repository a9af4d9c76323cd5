// The table of kernels that workloads.cpp expects of a backend: the CUDA launchers, on one stream.
#pragma once

#include "../../csrc/params.h"

namespace moekv::cuda {

struct Kernels {
  void (*gating_topk)(const GatingTopkParams&);
  void (*expert_scores)(const ExpertScoresParams&);
  void (*project_tokens)(const ProjectTokensParams&);
  void (*mix_scores)(const MixScoresParams&);
  void (*select_kept)(const SelectKeptParams&);
  void (*kv_compact)(const KvCompactParams&);
  void (*ragged_attention)(const RaggedAttentionParams&);
};

}  // namespace moekv::cuda

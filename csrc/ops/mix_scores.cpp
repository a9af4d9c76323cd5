#include <torch/csrc/stable/library.h>

#include "../backend.h"
#include "../check.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "mix_scores";

// Gate weights or expert ids: [B, T, k], shared by the heads, or [B, H, T, k].
void check_gate(const char* name, const Tensor& gate, ScalarType dtype, const Tensor& scores) {
  const int64_t batch = scores.size(1), num_kv_heads = scores.size(2), num_keys = scores.size(3);
  const int64_t rank = gate.dim();
  MOEKV_CHECK((rank == 3 || (rank == 4 && gate.size(1) == num_kv_heads)) && gate.size(0) == batch &&
                  gate.size(rank - 2) == num_keys,
              kOp, "expected ", name, " [", batch, ", ", num_keys, ", k] or [", batch, ", ",
              num_kv_heads, ", ", num_keys, ", k], got ", shape(gate));
  check_dtype(kOp, name, gate, dtype);
  check_device(kOp, name, gate, scores);
}

void copy_gate_strides(const Tensor& gate, int64_t (&strides)[3]) {
  const int64_t rank = gate.dim();
  strides[0] = gate.stride(0);
  strides[1] = rank == 4 ? gate.stride(1) : 0;
  strides[2] = gate.stride(rank - 2);
}

std::optional<Tensor> check_affine(const char* name, const std::optional<Tensor>& map,
                                   const Tensor& scores) {
  if (!map) return map;
  MOEKV_CHECK(map->dim() == 3 && map->size(0) == scores.size(0) && map->size(1) == scores.size(1) &&
                  map->size(2) == scores.size(2),
              kOp, "expected ", name, " [", scores.size(0), ", ", scores.size(1), ", ",
              scores.size(2), "], got ", shape(*map));
  check_dtype(kOp, name, *map, ScalarType::Float);
  check_device(kOp, name, *map, scores);
  return contiguous(kOp, *map);
}

Tensor mix_scores_op(const Tensor& scores_in, const Tensor& weights_in, const Tensor& experts_in,
                     const std::optional<Tensor>& gain_in, const std::optional<Tensor>& offset_in) {
  check_rank(kOp, "scores", scores_in, 4, "[num_experts, batch, num_kv_heads, num_keys]");
  float_dtype(kOp, "scores", scores_in);
  const int64_t num_experts = scores_in.size(0), batch = scores_in.size(1);
  const int64_t num_kv_heads = scores_in.size(2), num_keys = scores_in.size(3);
  MOEKV_CHECK(num_experts >= 1 && num_experts <= kMaxExperts, kOp, "expected 1 to ", kMaxExperts,
              " experts, got ", num_experts);
  check_gate("weights", weights_in, ScalarType::Float, scores_in);
  check_gate("experts", experts_in, ScalarType::Int, scores_in);
  MOEKV_CHECK(shape(weights_in) == shape(experts_in), kOp, "expected weights and experts of one ",
              "shape, got ", shape(weights_in), " and ", shape(experts_in));
  const std::optional<Tensor> gain = check_affine("gain", gain_in, scores_in);
  const std::optional<Tensor> offset = check_affine("offset", offset_in, scores_in);

  const DeviceScope scope(scores_in);
  // Scores are fp32 wherever an op of moekv made them.
  const Tensor scores = with_dense_rows(kOp, torch::stable::to(scores_in, ScalarType::Float));
  const Tensor weights = with_dense_rows(kOp, weights_in),
               experts = with_dense_rows(kOp, experts_in);
  Tensor mixed = new_tensor(kOp, scores, {batch, num_kv_heads, num_keys}, ScalarType::Float);

  MixScoresParams params{};
  params.scores = static_cast<const float*>(scores.const_data_ptr());
  params.weights = static_cast<const float*>(weights.const_data_ptr());
  params.experts = static_cast<const int32_t*>(experts.const_data_ptr());
  params.gain = data<float>(gain);
  params.offset = data<float>(offset);
  params.mixed = static_cast<float*>(mixed.mutable_data_ptr());
  params.num_experts = num_experts;
  params.batch = batch;
  params.num_kv_heads = num_kv_heads;
  params.num_keys = num_keys;
  params.k = weights.size(weights.dim() - 1);
  for (int64_t i = 0; i < 3; ++i) params.score_stride[i] = scores.stride(i);
  copy_gate_strides(weights, params.weight_stride);
  copy_gate_strides(experts, params.expert_stride);
  if (mixed.numel() == 0) return mixed;
  check_experts(params);
  mix_scores(params, scope.stream());
  return mixed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("mix_scores", TORCH_BOX(&mix_scores_op));
}

}  // namespace moekv::MOEKV_BACKEND
